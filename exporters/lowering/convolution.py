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
    # The weight's gradient first: its workspace is large, and the input's gradient would have to wait beside it.
    if wanted[1]:
        dw = weight_gradient(b, grad, x, weight, g) if transposed else weight_gradient(b, x, grad, weight, g)
    if wanted[0]:
        dx = _transposed_input_gradient(b, grad, weight, g) if transposed else _input_gradient(b, grad, x, weight, g)
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
    form = _Form(x, grad, kernel, g, merged, depthwise=channels == 1 and out == g.groups)
    taps: dict[tuple[int, ...], str] = {}
    lines = ""
    for phase in itertools.product(*(range(s) for s in g.stride)):
        shifts = form.shifts(phase)
        if not shifts:
            continue
        plane = form.plane(b, phase)
        # After the plane, whose own temporaries are freed by then.
        lines = lines or form.lines(b)
        taps |= {offset: form.tap(b, lines, plane, shift) for offset, shift in shifts.items()}
    ordered = [taps[offset] for offset in itertools.product(*(range(k) for k in kernel))]
    stacked = ordered[0]
    if len(ordered) > 1:
        stacked = b.reshape(b.op("Concat", *ordered, axis=0), [len(ordered), out, channels])
        stacked = b.op("Transpose", stacked, perm=[1, 2, 0])
    return b.reshape(stacked, [out, channels, *kernel])


class _Form:
    """Input and output gradient laid out so that a tap of one meets the other.

    Along every axis the input falls into as many planes (phases) as the stride; within a plane every tap is a shift.
    The planes are padded to the size of the output plus the largest shift and flattened, the gradient is padded to the
    same width, so that each tap is one contiguous piece of a plane.
    """

    def __init__(
        self, x: Value, grad: Value, kernel: Sequence[int], g: Geometry, merged: bool, *, depthwise: bool
    ) -> None:
        self.x, self.grad, self.kernel, self.g = x, grad, kernel, g
        self.merged, self.depthwise = merged, depthwise
        self.sizes = x.static(*range(2, x.rank))
        self.outs = grad.static(*range(2, grad.rank))
        self.channels, self.filters = x.static(1)[0], grad.static(1)[0]
        reach = [(k - 1) * d // s for k, d, s in zip(kernel, g.dilation, g.stride, strict=True)]
        self.widths = [out + r for out, r in zip(self.outs, reach, strict=True)]
        self.length = self.outs[0] * math.prod(self.widths[1:])
        # The last taps of a flattened map run past its end when they are shifted along a later axis.
        self.spill = int(any(reach[1:]))
        self.line = (self.widths[0] + self.spill) * math.prod(self.widths[1:])

    def shifts(self, phase: tuple[int, ...]) -> dict[tuple[int, ...], int]:
        """Kernel offset -> shift along the line, of the taps that meet the plane of this phase."""
        pitches = [math.prod(self.widths[i + 1 :]) for i in range(len(self.widths))]
        found = {}
        for offset in itertools.product(*(range(k) for k in self.kernel)):
            places = [o * d for o, d in zip(offset, self.g.dilation, strict=True)]
            steps = [divmod(p, s) for p, s in zip(places, self.g.stride, strict=True)]
            if tuple(rest for _, rest in steps) == phase:
                found[offset] = sum(step * pitch for (step, _), pitch in zip(steps, pitches, strict=True))
        return found

    def plane(self, b: GraphBuilder, phase: tuple[int, ...]) -> str:
        """The input's plane: (N, G, line, C/G), (N, G, C/G, line) for depthwise, (C, N, line) if merged."""
        starts, counts, before = [], [], []
        for size, width, place, pad, stride in zip(
            self.sizes, self.widths, phase, self.g.padding, self.g.stride, strict=True
        ):
            start = (place - pad) % stride
            lead = (start - place + pad) // stride
            starts.append(start)
            before.append(lead)
            counts.append(max(0, min(-(-(size - start) // stride), width - lead)))
        axes = list(range(2, self.x.rank))
        ends = [start + (n - 1) * s + 1 for start, n, s in zip(starts, counts, self.g.stride, strict=True)]
        name = self.x.name
        if (starts, ends) != ([0] * len(axes), list(self.sizes)) or set(self.g.stride) != {1}:
            name = b.slice(name, starts, ends, axes, list(self.g.stride))
        if self.merged:
            name = b.op("Transpose", name, perm=[1, 0, *axes])
        after = [w - lead - n for w, lead, n in zip(self.widths, before, counts, strict=True)]
        after[0] += self.spill
        name = b.pad(name, [0, 0, *before], [0, 0, *after])
        if self.merged:
            return b.op("Reshape", name, b.ints([self.channels, -1, self.line]))
        groups = self.g.groups
        name = b.op("Reshape", name, b.ints([-1, groups, self.channels // groups, self.line]))
        return name if self.depthwise else b.op("Transpose", name, perm=[0, 1, 3, 2])

    def lines(self, b: GraphBuilder) -> str:
        """The output gradient on the same lines: (N, G, O/G, L), or (O, N*L) if merged."""
        name = self.grad.name
        if self.merged:
            name = b.op("Transpose", name, perm=[1, 0, *range(2, self.grad.rank)])
        wider = [w - o for w, o in zip(self.widths[1:], self.outs[1:], strict=True)]
        name = b.pad(name, [0] * self.grad.rank, [0, 0, 0, *wider])
        groups = self.g.groups
        shape = [self.filters, -1] if self.merged else [-1, groups, self.filters // groups, self.length]
        return b.op("Reshape", name, b.ints(shape))

    def tap(self, b: GraphBuilder, lines: str, plane: str, shift: int) -> str:
        """The gradient of one kernel element for all channel pairs: (O, C), or (1, G, O/G, C/G)."""
        axis = 2 if self.merged or not self.depthwise else 3
        window = plane
        if self.line != self.length:
            window = b.slice(plane, [shift], [shift + self.length], [axis])
        if self.merged:
            return b.op("Gemm", lines, b.op("Reshape", window, b.ints([self.channels, -1])), transB=1)
        if self.depthwise:
            return b.reduce("ReduceSum", b.op("Mul", lines, window), [0, 3], keepdims=True)
        return b.reduce("ReduceSum", b.op("MatMul", lines, window), [0], keepdims=True)
