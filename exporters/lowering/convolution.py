"""Convolution and its gradients.

The input's gradient with stride 1 is a convolution with the flipped kernel, or ConvTranspose, by the target's forms
(exporters/forms.py); otherwise ConvTranspose (on the CPU 4 times faster than inserting zeros and convolving). Its pads
are always symmetric and what is missing is `output_padding`: ONNX Runtime's CUDA provider leaves other ones to the CPU.
The weight's gradient has a file of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from edgelocal.exporters.lowering.registry import lowers
from edgelocal.exporters.lowering.weight_gradient import Geometry, weight_gradient
from edgelocal.exporters.onnx_graph import GraphBuilder, Value

aten = torch.ops.aten


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
        dx = _transposed_input_gradient(b, grad, weight, g) if transposed else input_gradient(b, grad, x, weight, g)
    if wanted[2]:
        db = b.reduce("ReduceSum", grad.name, [0, *range(2, grad.rank)])
    return dx, dw, db


def _transposed_input_gradient(b: GraphBuilder, grad: Value, weight: Value, g: Geometry) -> str:
    return b.op(
        "Conv", grad.name, weight.name, strides=g.stride, pads=g.padding * 2, dilations=g.dilation, group=g.groups
    )


def input_gradient(b: GraphBuilder, grad: Value, x: Value, weight: Value, g: Geometry) -> str:
    """Gradient of a convolution's input, of the shape of x (N, C, *S); grad (N, O, *P), weight (O, C / groups, *K)."""
    kernel = weight.static(*range(2, weight.rank))
    reach = [d * (k - 1) for d, k in zip(g.dilation, kernel, strict=True)]
    flipped_pads = [r - p for r, p in zip(reach, g.padding, strict=True)]
    if b.forms.input == "flipped" and set(g.stride) == {1} and min(flipped_pads) >= 0:
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
