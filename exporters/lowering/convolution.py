"""Convolution and its gradients.

Forms chosen by measurement on ONNX Runtime's CPU provider (tables in docs/decisions/0009):

input gradient
    stride 1: a convolution with the flipped kernel (1.5 to 3 times faster than ConvTranspose);
    otherwise ConvTranspose (4 times faster than inserting zeros and convolving).
weight gradient
    dW[o, c, k] = sum over n and p of dY[n, o, p] * X[n, c, stride * p + dilation * k]:
    one matrix product for each kernel tap k. With stride 1 the padded map is flattened, so that the tap is one
    contiguous slice: dY is padded with zeros to the width of the padded map and both run over the same line. The
    product is batched over the samples while it is small; from 128 x 128 channels on the samples are merged into its
    inner dimension, because then summing N products costs more than the transposition. Written as a convolution
    with swapped axes the same gradient took 2 to 4 times as long. Depthwise: a product and a sum instead of 1 x 1
    matrices.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from edgelocal.exporters.lowering.registry import UnsupportedOperatorError, lowers
from edgelocal.exporters.onnx_graph import GraphBuilder, Value

aten = torch.ops.aten
MERGE_FROM = 128 * 128


class Geometry(NamedTuple):
    """Stride, padding and dilation along each spatial axis, and the groups."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


def _geometry(
    x: Value, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int
) -> Geometry:
    rank = x.rank - 2

    def full(values: Sequence[int]) -> tuple[int, ...]:
        return tuple(int(v) for v in values) * (rank if len(values) == 1 else 1)

    return Geometry(full(stride), full(padding), full(dilation), groups)


@lowers(aten.convolution.default)
def _convolution(
    b: GraphBuilder,
    node: fx.Node,
    x: Value,
    weight: Value,
    bias: Value | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> str:
    g = _geometry(x, stride, padding, dilation, groups)
    inputs = [x.name, weight.name] + ([bias.name] if bias is not None else [])
    shared: dict[str, Any] = {"strides": g.stride, "pads": g.padding * 2, "dilations": g.dilation, "group": groups}
    if not transposed:
        return b.op("Conv", *inputs, **shared)
    extra = list(_geometry(x, output_padding, [0], [1], 1).stride)
    return b.op("ConvTranspose", *inputs, output_padding=extra, **shared)


@lowers(aten.convolution_backward.default)
def _convolution_backward(
    b: GraphBuilder,
    node: fx.Node,
    grad: Value,
    x: Value,
    weight: Value,
    bias_sizes: Sequence[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    wanted: Sequence[bool],
) -> tuple[str | None, ...]:
    g = _geometry(x, stride, padding, dilation, groups)
    dx = dw = db = None
    if wanted[0]:
        dx = _transposed_input_gradient(b, grad, weight, g) if transposed else _input_gradient(b, grad, x, weight, g)
    if wanted[1]:
        dw = weight_gradient(b, grad, x, weight, g) if transposed else weight_gradient(b, x, grad, weight, g)
    if wanted[2]:
        db = b.reduce("ReduceSum", grad.name, [0, *range(2, grad.rank)])
    return dx, dw, db


def _transposed_input_gradient(b: GraphBuilder, grad: Value, weight: Value, g: Geometry) -> str:
    return b.op(
        "Conv", grad.name, weight.name, strides=g.stride, pads=g.padding * 2, dilations=g.dilation, group=g.groups
    )


def _input_gradient(b: GraphBuilder, grad: Value, x: Value, weight: Value, g: Geometry) -> str:
    kernel = weight.static(*range(2, weight.rank))
    reach = [d * (k - 1) for d, k in zip(g.dilation, kernel, strict=True)]
    flipped_pads = [r - p for r, p in zip(reach, g.padding, strict=True)]
    if set(g.stride) == {1} and min(flipped_pads) >= 0:
        mirrored = _mirror(b, weight, g.groups)
        return b.op("Conv", grad.name, mirrored, pads=flipped_pads * 2, dilations=g.dilation, group=g.groups)
    rest = [
        size - ((out - 1) * s - 2 * p + r + 1)
        for size, out, s, p, r in zip(
            x.static(*range(2, x.rank)), grad.static(*range(2, grad.rank)), g.stride, g.padding, reach, strict=True
        )
    ]
    return b.op(
        "ConvTranspose",
        grad.name,
        weight.name,
        strides=g.stride,
        pads=g.padding * 2,
        dilations=g.dilation,
        group=g.groups,
        output_padding=rest,
    )


def _mirror(b: GraphBuilder, weight: Value, groups: int) -> str:
    """(G*O, C, *k) -> (G*C, O, *k) with the kernel axes reversed."""
    out, channels, *kernel = weight.static(*range(weight.rank))
    axes = [a for a in range(2, weight.rank) if weight.shape[a] != 1]
    name = weight.name
    if axes:
        name = b.slice(name, [-1] * len(axes), [-(1 << 62)] * len(axes), axes, [-1] * len(axes))
    if groups == 1:
        return b.op("Transpose", name, perm=[1, 0, *range(2, weight.rank)])
    if out == groups and channels == 1:
        return name
    split = b.reshape(name, [groups, out // groups, channels, *kernel])
    swapped = b.op("Transpose", split, perm=[0, 2, 1, *range(3, weight.rank + 1)])
    return b.reshape(swapped, [groups * channels, out // groups, *kernel])


def weight_gradient(b: GraphBuilder, x: Value, grad: Value, weight: Value, g: Geometry) -> str:
    """Gradient of a convolution's weight, shape (out, channels / groups, *kernel); x (N, C, *S), grad (N, O, *P)."""
    if x.rank < 3:
        raise UnsupportedOperatorError("aten.convolution_backward", "an input without spatial axes")
    out, channels, *kernel = weight.static(*range(weight.rank))
    merged = g.groups == 1 and out * channels >= MERGE_FROM
    depthwise = channels == 1 and out == g.groups
    lines = _Lines.of(b, x, grad, kernel, g, merged)
    taps = [_tap(b, lines, offset, merged, depthwise) for offset in itertools.product(*(range(k) for k in kernel))]
    stacked = (
        taps[0] if len(taps) == 1 else b.op("Concat", *(b.op("Unsqueeze", t, b.ints([-1])) for t in taps), axis=-1)
    )
    return b.reshape(stacked, [out, channels, *kernel])


class _Lines(NamedTuple):
    """Input and output gradient laid out so that a tap of one meets the other.

    `x` is the padded input: flattened (batch, groups..., line) if `row_strides` is set, else with its spatial axes.
    `grad` is (N, G, O/G, L), or (O, N*L) if merged.
    """

    x: str
    grad: str
    lead: tuple[int, ...]  # leading axes of x for the product, -1 for the batch
    row_strides: tuple[int, ...] | None
    length: int
    out_sizes: tuple[int, ...]
    geometry: Geometry

    @classmethod
    def of(cls, b: GraphBuilder, x: Value, grad: Value, kernel: Sequence[int], g: Geometry, merged: bool) -> _Lines:
        sizes, outs = x.static(*range(2, x.rank)), grad.static(*range(2, grad.rank))
        channels, filters = x.static(1)[0], grad.static(1)[0]
        flat = set(g.stride) == {1}
        padded = [s + 2 * p for s, p in zip(sizes, g.padding, strict=True)]
        # The last taps of a flattened map run past its end when they are shifted along a later axis.
        spill = int(flat and any(k > 1 for k in kernel[1:]))
        source, target = x.name, grad.name
        if merged:
            swap = [1, 0, *range(2, x.rank)]
            source, target = b.op("Transpose", source, perm=swap), b.op("Transpose", target, perm=swap)
        after = [g.padding[0] + spill, *g.padding[1:]]
        source = b.pad(source, [0, 0, *g.padding], [0, 0, *after])
        lead = (channels, -1) if merged else (-1, g.groups, channels // g.groups)
        strides: tuple[int, ...] | None = None
        length = math.prod(outs)
        if flat:
            widths = [outs[0], *padded[1:]]
            target = b.pad(target, [0] * x.rank, [0, 0, 0, *(w - o for w, o in zip(widths[1:], outs[1:], strict=True))])
            length = math.prod(widths)
            strides = tuple(math.prod(padded[i + 1 :]) for i in range(len(padded)))
            line = (padded[0] + spill) * strides[0]
            source = b.op("Reshape", source, b.ints([*lead, line]))
        shape = [filters, -1] if merged else [-1, g.groups, filters // g.groups, length]
        return cls(source, b.op("Reshape", target, b.ints(shape)), lead, strides, length, outs, g)


def _tap(b: GraphBuilder, lines: _Lines, offset: Sequence[int], merged: bool, depthwise: bool) -> str:
    """The gradient of one kernel element for all channel pairs: (O, C), or (G, O/G, C/G)."""
    window = _window(b, lines, offset, merged)
    if merged:
        return b.op("Gemm", lines.grad, b.op("Reshape", window, b.ints([lines.lead[0], -1])), transB=1)
    if depthwise:
        return b.reduce("ReduceSum", b.op("Mul", lines.grad, window), [0, 3])
    product = b.op("MatMul", lines.grad, b.op("Transpose", window, perm=[0, 1, 3, 2]))
    return b.reduce("ReduceSum", product, [0])


def _window(b: GraphBuilder, lines: _Lines, offset: Sequence[int], merged: bool) -> str:
    g = lines.geometry
    starts = [o * d for o, d in zip(offset, g.dilation, strict=True)]
    if lines.row_strides is not None:
        start = sum(s * r for s, r in zip(starts, lines.row_strides, strict=True))
        axis = len(lines.lead)
        return b.slice(lines.x, [start], [start + lines.length], [axis])
    ends = [s + (n - 1) * step + 1 for s, n, step in zip(starts, lines.out_sizes, g.stride, strict=True)]
    axes = list(range(2, 2 + len(starts)))
    window = b.slice(lines.x, starts, ends, axes, list(g.stride))
    return b.op("Reshape", window, b.ints([*lines.lead, lines.length]))
