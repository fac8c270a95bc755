"""Batch normalisation in training and inference.

A step graph never holds BatchNormalization: its training mode is refused by the CUDA provider, keeps the biased
running variance, and is quietly exported as inference elsewhere. Written out it is

    mean = E x,  var = E (x - mean)^2,  r = 1 / sqrt(var + eps),  y = x (g r) + (b - mean g r)

and, with M values per channel, dy the gradient of y and xc = x - mean,

    db = sum dy,  dg = r sum dy xc,  dx = g r (dy - db / M - xc r dg / M).

The running variance takes var M / (M - 1), as in PyTorch (Ioffe and Szegedy 2015, section 3.1).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from edgelocal.exporters.lowering.registry import lowers
from edgelocal.exporters.onnx_graph import Dim, GraphBuilder, Value, fixed

aten = torch.ops.aten


def _axes(x: Value) -> list[int]:
    return [0, *range(2, x.rank)]


def _per_channel(b: GraphBuilder, x: Value, vector: str) -> str:
    """(C,) -> (C, 1, ...), which broadcasts along the channels of x."""
    return vector if x.rank == 2 else b.reshape(vector, [x.shape[1], *([1] * (x.rank - 2))])


def _count(x: Value) -> Dim:
    return math.prod([x.shape[a] for a in _axes(x)])


@lowers(aten._native_batch_norm_legit_functional.default)
def _batch_norm(
    b: GraphBuilder,
    node: fx.Node,
    x: Value,
    weight: Value | None,
    bias: Value | None,
    running_mean: Value,
    running_var: Value,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[str, ...]:
    if not training:
        rstd = _rstd(b, running_var.name, eps, x.dtype)
        y = _affine(b, x, running_mean.name, rstd, weight, bias)
        return y, running_mean.name, rstd, running_mean.name, running_var.name
    mean, var = _moments(b, x)
    rstd = _rstd(b, var, eps, x.dtype)
    count = _count(x)
    # A single value has no unbiased variance: PyTorch refuses it, here its share is 0.
    degrees = b.op("Max", b.scalar(count - 1, x.dtype), b.scalar(1, x.dtype))
    unbiased = b.op("Mul", var, b.op("Div", b.scalar(count, x.dtype), degrees))
    new_mean = _blend(b, running_mean.name, mean, momentum, x.dtype)
    new_var = _blend(b, running_var.name, unbiased, momentum, x.dtype)
    return _affine(b, x, mean, rstd, weight, bias), mean, rstd, new_mean, new_var


@lowers(aten._native_batch_norm_legit.no_stats)
def _batch_norm_no_stats(
    b: GraphBuilder,
    node: fx.Node,
    x: Value,
    weight: Value | None,
    bias: Value | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[str, ...]:
    mean, var = _moments(b, x)
    rstd = _rstd(b, var, eps, x.dtype)
    return _affine(b, x, mean, rstd, weight, bias), mean, rstd


@lowers(aten._native_batch_norm_legit_no_training.default)
def batch_norm_inference(
    b: GraphBuilder,
    node: fx.Node,
    x: Value,
    weight: Value | None,
    bias: Value | None,
    running_mean: Value,
    running_var: Value,
    momentum: float,
    eps: float,
) -> tuple[str, ...]:
    """In forward graphs the operator itself, which every runtime folds into the convolution before it."""
    channels = fixed(x.shape[1])
    scale = weight.name if weight else b.op("Expand", b.scalar(1.0, x.dtype), b.ints([channels]))
    shift = bias.name if bias else b.op("Expand", b.scalar(0.0, x.dtype), b.ints([channels]))
    y = b.op("BatchNormalization", x.name, scale, shift, running_mean.name, running_var.name, epsilon=float(eps))
    return y, running_mean.name, running_var.name


@lowers(aten.native_batch_norm_backward.default)
def _batch_norm_backward(
    b: GraphBuilder,
    node: fx.Node,
    grad: Value,
    x: Value,
    weight: Value | None,
    running_mean: Value,
    running_var: Value,
    save_mean: Value,
    save_rstd: Value,
    train: bool,
    eps: float,
    wanted: Any,
) -> tuple[str | None, ...]:
    if train:
        mean, rstd = save_mean.name, save_rstd.name
    else:
        mean, rstd = running_mean.name, _rstd(b, running_var.name, eps, x.dtype)
    centred = b.op("Sub", x.name, _per_channel(b, x, mean))
    db = b.reduce("ReduceSum", grad.name, _axes(x))
    dot = b.reduce("ReduceSum", b.op("Mul", grad.name, centred), _axes(x))
    dg = b.op("Mul", dot, rstd)
    scale = b.op("Mul", rstd, weight.name) if weight else rstd
    dx = b.op("Mul", grad.name, _per_channel(b, x, scale))
    if train:
        share = b.op("Div", scale, b.scalar(_count(x), x.dtype))
        slope = b.op("Mul", b.op("Mul", share, rstd), dg)
        dx = b.op("Sub", dx, b.op("Mul", centred, _per_channel(b, x, slope)))
        dx = b.op("Sub", dx, _per_channel(b, x, b.op("Mul", share, db)))
    return tuple(v if w else None for v, w in zip((dx, dg, db), wanted, strict=True))


def _moments(b: GraphBuilder, x: Value) -> tuple[str, str]:
    mean = b.reduce("ReduceMean", x.name, _axes(x))
    centred = b.op("Sub", x.name, _per_channel(b, x, mean))
    return mean, b.reduce("ReduceMean", b.op("Mul", centred, centred), _axes(x))


def _rstd(b: GraphBuilder, var: str, eps: float, dtype: torch.dtype) -> str:
    return b.op("Reciprocal", b.op("Sqrt", b.op("Add", var, b.scalar(eps, dtype))))


def _affine(b: GraphBuilder, x: Value, mean: str, rstd: str, weight: Value | None, bias: Value | None) -> str:
    scale = b.op("Mul", rstd, weight.name) if weight else rstd
    offset = b.op("Mul", mean, scale)
    shift = b.op("Sub", bias.name, offset) if bias else b.op("Neg", offset)
    return b.op("Add", b.op("Mul", x.name, _per_channel(b, x, scale)), _per_channel(b, x, shift))


def _blend(b: GraphBuilder, old: str, new: str, momentum: float, dtype: torch.dtype) -> str:
    kept = b.op("Mul", old, b.scalar(1 - momentum, dtype))
    return b.op("Add", kept, b.op("Mul", new, b.scalar(momentum, dtype)))
