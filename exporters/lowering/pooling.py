"""Pooling and its gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from edgelocal.exporters.lowering.registry import UnsupportedOperatorError, lowers
from edgelocal.exporters.onnx_graph import GraphBuilder, Value, fixed

aten = torch.ops.aten


def _pair(values: Sequence[int] | int, default: Sequence[int] = ()) -> list[int]:
    listed = [values] if isinstance(values, int) else list(values) or list(default)
    return listed * 2 if len(listed) == 1 else listed


@lowers(aten.max_pool2d_with_indices.default)
def max_pool(
    b: GraphBuilder,
    node: fx.Node,
    x: Value,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil_mode: bool = False,
) -> tuple[str, str]:
    """The second result is ONNX's index: flat over the whole batch, where PyTorch's is flat over one map."""
    sizes = _pair(kernel)
    return b.multi(  # type: ignore[return-value]  # two names
        "MaxPool",
        [x.name],
        2,
        kernel_shape=sizes,
        strides=_pair(stride, sizes),
        pads=_pair(padding) * 2,
        dilations=_pair(dilation),
        ceil_mode=int(ceil_mode),
    )


@lowers(aten.max_pool2d_with_indices_backward.default)
def max_pool_backward(b: GraphBuilder, node: fx.Node, grad: Value, x: Value, *geometry: Any, **rest: Any) -> str:
    """Add each gradient to the place its maximum came from, on the flat batch."""
    indices: Value = geometry[-1]
    flat = b.ints([-1])
    zeros = b.op("Expand", b.scalar(0.0, grad.dtype), b.shape([math.prod(x.shape)]))
    places = b.op("Reshape", indices.name, flat)
    total = b.op("ScatterElements", zeros, places, b.op("Reshape", grad.name, flat), axis=0, reduction="add")
    return b.reshape(total, x.shape)


@lowers(aten.avg_pool2d.default)
def avg_pool(
    b: GraphBuilder,
    node: fx.Node,
    x: Value,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor: int | None = None,
) -> str:
    sizes = _pair(kernel)
    if divisor is not None:
        raise UnsupportedOperatorError(str(node.target), f"divisor_override={divisor}")
    return b.op(
        "AveragePool",
        x.name,
        kernel_shape=sizes,
        strides=_pair(stride, sizes),
        pads=_pair(padding) * 2,
        ceil_mode=int(ceil_mode),
        count_include_pad=int(count_include_pad),
    )


@lowers(aten.avg_pool2d_backward.default)
def avg_pool_backward(
    b: GraphBuilder,
    node: fx.Node,
    grad: Value,
    x: Value,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor: int | None,
) -> str:
    """Pooling is linear and separable: X (N, C, H, W) -> A_h X A_w^T, so the gradient is A_h^T G A_w."""
    sizes, pads = _pair(kernel), _pair(padding)
    strides = _pair(stride, sizes)
    if divisor is not None or (not count_include_pad and any(pads)) or ceil_mode:
        raise UnsupportedOperatorError(str(node.target), "ceil_mode, divisor_override or padding that is not counted")
    matrices = [
        _window_matrix(fixed(x.shape[2 + i]), fixed(grad.shape[2 + i]), sizes[i], strides[i], pads[i]) for i in (0, 1)
    ]
    return _sandwich(b, grad, matrices[0].T, matrices[1])


@lowers(aten._adaptive_avg_pool2d.default)
def adaptive_avg_pool(b: GraphBuilder, node: fx.Node, x: Value, sizes: Sequence[int]) -> str:
    if list(sizes) == [1, 1]:
        return b.op("GlobalAveragePool", x.name)
    rows, columns = (_adaptive_matrix(fixed(x.shape[2 + i]), int(sizes[i])) for i in (0, 1))
    return _sandwich(b, x, rows, columns.T)


@lowers(aten._adaptive_avg_pool2d_backward.default)
def adaptive_avg_pool_backward(b: GraphBuilder, node: fx.Node, grad: Value, x: Value) -> str:
    rows, columns = (_adaptive_matrix(fixed(x.shape[2 + i]), fixed(grad.shape[2 + i])) for i in (0, 1))
    return _sandwich(b, grad, rows.T, columns)


def _sandwich(b: GraphBuilder, x: Value, left: np.ndarray[Any, Any], right: np.ndarray[Any, Any]) -> str:
    """left @ x @ right on the last two axes, in the smaller order first."""
    rows = b.op("MatMul", b.constant(left.astype(np.float32)), x.name)
    return b.op("MatMul", rows, b.constant(right.astype(np.float32)))


def _adaptive_matrix(size: int, out: int) -> np.ndarray[Any, Any]:
    """(out, size): output i averages the inputs floor(i size / out) ... ceil((i + 1) size / out) - 1."""
    matrix = np.zeros((out, size))
    for i in range(out):
        first, last = i * size // out, -(-(i + 1) * size // out)
        matrix[i, first:last] = 1 / (last - first)
    return matrix


def _window_matrix(size: int, out: int, kernel: int, stride: int, pad: int) -> np.ndarray[Any, Any]:
    """(out, size): output i averages the `kernel` inputs from i * stride - pad on; padding counts as zeros."""
    matrix = np.zeros((out, size))
    for i in range(out):
        first = i * stride - pad
        matrix[i, max(first, 0) : max(first + kernel, 0)] = 1 / kernel
    return matrix
