"""The gradient of a convolution's weight.

    dW[o, c, k] = sum over n and p of dY[n, o, p] * X[n, c, stride * p + dilation * k]

products
    With k fixed it is a matrix product. The map falls into as many planes as the stride; a plane is padded and
    flattened, dY is padded with zeros to its width, and both run over the same line: a tap is one contiguous slice of
    it. Products are batched over the samples and added up, or the samples are merged into the inner dimension: with
    many channels summing N products costs more than the transposition. The taps of a kernel's row, or all of them, can
    share one product: their slices are laid side by side as channels, which is an im2col of that part of the kernel.
    Workspace: the plane and a slice for each tap of a product, so 2 maps for single taps, and for T taps together at
    most 1 + 2 T while they are laid side by side. Depthwise: a product and a sum instead of 1 x 1 matrices, never side
    by side.
convolution
    dW is the convolution of X (C, N, *S) with dY (O, N, *P) as its filter, strides and dilations swapped. The filter
    is as large as the map; what a library takes for it has no bound that could be asked for.

Which of them: exporters/forms.py. Measured on the CPU in docs/decisions/0009, not measured on CUDA in 0016.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from edgelocal.exporters.lowering.registry import UnsupportedOperatorError
from edgelocal.exporters.onnx_graph import GraphBuilder, Value

Offset = tuple[int, ...]  # of a tap in the kernel, along each spatial axis


class Geometry(NamedTuple):
    """Stride, padding and dilation along each spatial axis, and the groups."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


def weight_gradient(b: GraphBuilder, x: Value, grad: Value, weight: Value, g: Geometry) -> str:
    """Gradient of a convolution's weight, shape (out, channels / groups, *kernel); x (N, C, *S), grad (N, O, *P)."""
    if x.rank < 3:
        raise UnsupportedOperatorError("aten.convolution_backward", "an input without spatial axes")
    out, channels, *kernel = weight.static(*range(weight.rank))
    if b.forms.weight == "convolution" and g.groups == 1:
        return _convolution(b, x, grad, kernel, g)
    merged = g.groups == 1 and out * channels >= b.forms.merge_from
    depthwise = channels == 1 and out == g.groups
    form = _Form(x, grad, kernel, g, merged, depthwise=depthwise)
    if b.forms.stack != "tap" and not depthwise and math.prod(kernel) > 1:
        stacked = _stacked(b, form, channels, len(kernel) - 1 if b.forms.stack == "row" else 0)
    else:
        stacked = _single(b, form, channels)
    return b.reshape(stacked, [out, channels, *kernel])


def _convolution(b: GraphBuilder, x: Value, grad: Value, kernel: Sequence[int], g: Geometry) -> str:
    """One convolution with swapped axes. Strided, it may go further than the kernel: the rest is cut off."""
    order = [1, 0, *range(2, x.rank)]
    source, filters = (b.op("Transpose", v.name, perm=order) for v in (x, grad))
    found = b.op("Conv", source, filters, strides=g.dilation, dilations=g.stride, pads=g.padding * 2)
    axes = [*range(2, x.rank)]
    return b.op("Transpose", b.slice(found, [0] * len(axes), list(kernel), axes), perm=order)


def _single(b: GraphBuilder, form: _Form, channels: int) -> str:
    """A product for every tap; (O, C / groups, taps)."""
    taps: dict[Offset, str] = {}
    lines = ""
    for phase, shifts in form.phases():
        plane = form.plane(b, phase)
        # After the plane, whose own temporaries are freed by then.
        lines = lines or form.lines(b)
        taps |= {offset: form.product(b, lines, form.window(b, plane, shift)) for offset, shift in shifts.items()}
    ordered = [taps[offset] for offset in form.offsets()]
    if len(ordered) == 1:
        return ordered[0]
    stacked = b.reshape(b.op("Concat", *ordered, axis=0), [len(ordered), form.filters, channels])
    return b.op("Transpose", stacked, perm=[1, 2, 0])


def _stacked(b: GraphBuilder, form: _Form, channels: int, split: int) -> str:
    """A product for all taps that differ only along the axes from `split` on; (O, C / groups, taps)."""
    parts: list[str] = []
    order: list[Offset] = []
    lines = ""
    for phase, shifts in form.phases():
        groups: dict[Offset, list[Offset]] = {}
        for offset in shifts:
            groups.setdefault(offset[:split], []).append(offset)
        first = next(iter(groups.values()))
        plane, line = form.beside(b, form.plane(b, phase), [shifts[offset] - shifts[first[0]] for offset in first])
        lines = lines or form.lines(b)
        for together in groups.values():
            product = form.product(b, lines, form.window(b, plane, shifts[together[0]], line), len(together))
            parts.append(b.reshape(product, [form.filters, len(together), channels]))
            order += together
    taps = b.op("Concat", *parts, axis=1) if len(parts) > 1 else parts[0]
    wanted = [order.index(offset) for offset in form.offsets()]
    if wanted != sorted(wanted):
        taps = b.op("Gather", taps, b.ints(wanted), axis=1)
    return b.op("Transpose", taps, perm=[0, 2, 1])


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

    def offsets(self) -> list[Offset]:
        """All taps, in the order of the weight."""
        return list(itertools.product(*(range(k) for k in self.kernel)))

    def shift(self, offset: Offset) -> int:
        """How far along its plane's line a tap lies."""
        pitches = [math.prod(self.widths[i + 1 :]) for i in range(len(self.widths))]
        places = zip(offset, self.g.dilation, self.g.stride, pitches, strict=True)
        return sum(o * d // s * pitch for o, d, s, pitch in places)

    def phases(self) -> list[tuple[Offset, Mapping[Offset, int]]]:
        """The planes that taps meet: place of the first element modulo the stride, and the taps with their shifts."""
        found: dict[Offset, dict[Offset, int]] = {}
        for offset in self.offsets():
            phase = tuple(o * d % s for o, d, s in zip(offset, self.g.dilation, self.g.stride, strict=True))
            found.setdefault(phase, {})[offset] = self.shift(offset)
        return sorted(found.items())

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

    def beside(self, b: GraphBuilder, plane: str, shifts: Sequence[int]) -> tuple[str, int]:
        """The plane once for every shift, side by side as channels, and the length of its line."""
        length = self.line - max(shifts)
        parts = [self.window(b, plane, shift, length=length) for shift in shifts]
        return (b.op("Concat", *parts, axis=0 if self.merged else 3) if len(parts) > 1 else plane), length

    def window(
        self, b: GraphBuilder, plane: str, shift: int, line: int | None = None, length: int | None = None
    ) -> str:
        """The piece of a plane, whose line is `line` long, that a tap at `shift` meets."""
        line, length = line or self.line, length or self.length
        if line == length:
            return plane
        return b.slice(plane, [shift], [shift + length], [2 if self.merged or not self.depthwise else 3])

    def product(self, b: GraphBuilder, lines: str, window: str, taps: int = 1) -> str:
        """The gradients of `taps` kernel elements for all channel pairs: (O, taps C), or (1, G, O/G, taps C/G)."""
        if self.merged:
            return b.op("Gemm", lines, b.op("Reshape", window, b.ints([taps * self.channels, -1])), transB=1)
        if self.depthwise:
            return b.reduce("ReduceSum", b.op("Mul", lines, window), [0, 3], keepdims=True)
        return b.reduce("ReduceSum", b.op("MatMul", lines, window), [0], keepdims=True)
