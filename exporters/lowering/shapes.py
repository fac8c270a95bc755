"""Operators that move or repeat elements, and constants with a shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from edgelocal.exporters.lowering.pointwise import operand, result_dtype
from edgelocal.exporters.lowering.registry import Result, UnsupportedOperatorError, lowers
from edgelocal.exporters.onnx_graph import Dim, GraphBuilder, Scalar, Value, expression, fixed

aten = torch.ops.aten
END = np.iinfo(np.int64).max


def _shape(node: fx.Node) -> tuple[Dim, ...]:
    return tuple(node.meta["val"].shape)


@lowers(
    aten.view.default,
    aten._unsafe_view.default,
    aten.reshape.default,
    aten.unsqueeze.default,
    aten.squeeze.dim,
    aten.squeeze.dims,
    aten.squeeze.default,
)
def _reshape(b: GraphBuilder, node: fx.Node, x: Value, *args: Any) -> str:
    return b.reshape(x.name, _shape(node))


@lowers(aten.as_strided.default)
def as_strided(
    b: GraphBuilder, node: fx.Node, x: Value, sizes: Sequence[Dim], strides: Sequence[Dim], offset: Dim | None = None
) -> str:
    """Where all of a contiguous tensor is read in order, a reshape."""
    source, result = node.args[0].meta["val"], node.meta["val"]  # type: ignore[union-attr]  # the first argument is x
    same_size = expression(math.prod(source.shape)) == expression(math.prod(result.shape))
    if not (same_size and not offset and _contiguous(source) and _contiguous(result)):
        raise UnsupportedOperatorError(str(node.target), "strides that are more than another shape")
    return b.reshape(x.name, _shape(node))


def _contiguous(fake: torch.Tensor) -> bool:
    strides = [expression(math.prod(fake.shape[axis + 1 :])) for axis in range(fake.dim())]
    return [expression(s) for s in fake.stride()] == strides


@lowers(aten.copy.default)
def _copy(b: GraphBuilder, node: fx.Node, x: Value, source: Value, non_blocking: bool = False) -> str:
    value = b.cast(source.name, source.dtype, x.dtype)
    same = [expression(s) for s in source.shape] == [expression(s) for s in x.shape]
    return value if same else b.op("Expand", value, b.shape(x.shape))


@lowers(aten.permute.default)
def _permute(b: GraphBuilder, node: fx.Node, x: Value, order: Sequence[int]) -> str:
    return b.op("Transpose", x.name, perm=[d % x.rank for d in order])


@lowers(aten.transpose.int)
def _transpose(b: GraphBuilder, node: fx.Node, x: Value, first: int, second: int) -> str:
    order = list(range(x.rank))
    order[first], order[second] = order[second], order[first]
    return b.op("Transpose", x.name, perm=order)


@lowers(aten.t.default)
def _t(b: GraphBuilder, node: fx.Node, x: Value) -> str:
    return x.name if x.rank < 2 else b.op("Transpose", x.name, perm=[1, 0])


@lowers(aten.expand.default)
def _expand(b: GraphBuilder, node: fx.Node, x: Value, sizes: Sequence[Dim], *, implicit: bool = False) -> str:
    target = _shape(node)
    if len(target) == x.rank and all(expression(a) == expression(c) for a, c in zip(target, x.shape, strict=True)):
        return x.name
    return b.op("Expand", x.name, b.shape(target))


@lowers(aten.repeat.default)
def _repeat(b: GraphBuilder, node: fx.Node, x: Value, times: Sequence[Dim]) -> str:
    shape = (1,) * (len(times) - x.rank) + x.shape
    return b.op("Tile", b.reshape(x.name, shape), b.shape(times))


@lowers(aten.cat.default)
def _cat(b: GraphBuilder, node: fx.Node, tensors: Sequence[Value], dim: int = 0) -> str:
    # PyTorch skips 1-D empty tensors in cat, whatever the shape of the others.
    kept = [x for x in tensors if not (x.rank == 1 and x.shape[0] == 0)]
    return b.op("Concat", *(operand(b, x, result_dtype(node)) for x in kept), axis=dim % kept[0].rank)


@lowers(aten.stack.default)
def _stack(b: GraphBuilder, node: fx.Node, tensors: Sequence[Value], dim: int = 0) -> str:
    axis = dim % (tensors[0].rank + 1)
    return b.op("Concat", *(b.op("Unsqueeze", x.name, b.ints([axis])) for x in tensors), axis=axis)


@lowers(aten.slice.Tensor)
def _slice_(
    b: GraphBuilder, node: fx.Node, x: Value, dim: int = 0, start: Any = None, end: Any = None, step: int = 1
) -> str:
    axis = dim % x.rank
    if start in (None, 0) and step == 1 and expression(_shape(node)[axis]) == expression(x.shape[axis]):
        return x.name
    bounds = [b.shape([start or 0]), b.shape([END if end is None else end])]
    return b.op("Slice", x.name, *bounds, b.ints([axis]), b.ints([step]))


@lowers(aten.slice_backward.default)
def _slice_backward(
    b: GraphBuilder, node: fx.Node, grad: Value, sizes: Any, dim: int, start: int, end: int, step: int
) -> Result:
    return slice_scatter(b, node, None, grad, dim, start, end, step)


@lowers(aten.slice_scatter.default)
def slice_scatter(
    b: GraphBuilder,
    node: fx.Node,
    x: Value | None,
    source: Value,
    dim: int = 0,
    start: Any = None,
    end: Any = None,
    step: int = 1,
) -> str:
    """Write `source` into a slice; into zeros (the gradient of a slice) this is a Pad."""
    shape = _shape(node)
    axis = dim % len(shape)
    if expression(shape[axis]) == expression(source.shape[axis]):
        return source.name
    size, width = fixed(shape[axis]), fixed(source.shape[axis])
    first = 0 if start is None else fixed(start) + (size if fixed(start) < 0 else 0)
    if x is None or step != 1:
        spread = _spread(b, source, axis, step)
        padded = _pad_axis(b, spread, len(shape), axis, first, size - first - width * step)
        return (
            padded
            if x is None
            else _chosen(b, x.name, padded, [len(shape), axis, size], range(first, first + width * step, step))
        )
    parts = [source.name]
    if first:
        parts.insert(0, b.slice(x.name, [0], [first], [axis]))
    if size - first - width:
        parts.append(b.slice(x.name, [first + width], [size], [axis]))
    return b.op("Concat", *parts, axis=axis)


def _spread(b: GraphBuilder, x: Value, axis: int, step: int) -> str:
    """Every element along `axis` followed by step - 1 zeros."""
    if step == 1:
        return x.name
    apart = b.op("Unsqueeze", x.name, b.ints([axis + 1]))
    padded = _pad_axis(b, apart, x.rank + 1, axis + 1, 0, step - 1)
    return b.reshape(padded, [*x.shape[:axis], x.shape[axis] * step, *x.shape[axis + 1 :]])


def _chosen(b: GraphBuilder, x: str, other: str, place: Sequence[int], written: range) -> str:
    """`other` at the positions `written` of an axis, `x` elsewhere; place is (rank, axis, size)."""
    rank, axis, size = place
    mask = np.zeros([size if a == axis else 1 for a in range(rank)], dtype=np.bool_)
    mask.reshape(-1)[list(written)] = True
    return b.op("Where", b.constant(mask), other, x)


def _pad_axis(b: GraphBuilder, value: str, rank: int, axis: int, before: int, after: int) -> str:
    return b.pad(value, [before * (a == axis) for a in range(rank)], [after * (a == axis) for a in range(rank)])


@lowers(aten.select.int)
def _select(b: GraphBuilder, node: fx.Node, x: Value, dim: int, index: int) -> str:
    return b.op("Gather", x.name, b.constant(np.asarray(fixed(index), dtype=np.int64)), axis=dim % x.rank)


@lowers(aten.select_backward.default)
def _select_backward(b: GraphBuilder, node: fx.Node, grad: Value, sizes: Any, dim: int, index: int) -> str:
    shape = _shape(node)
    axis = dim % len(shape)
    size = fixed(shape[axis])
    position = fixed(index) % size
    return _pad_axis(b, b.op("Unsqueeze", grad.name, b.ints([axis])), len(shape), axis, position, size - position - 1)


@lowers(aten.split_with_sizes.default, aten.split.Tensor)
def _split(b: GraphBuilder, node: fx.Node, x: Value, sizes: Any, dim: int = 0) -> tuple[str, ...]:
    axis = dim % x.rank
    widths = [fixed(part.shape[axis]) for part in node.meta["val"]]
    return b.multi("Split", [x.name, b.ints(widths)], len(widths), axis=axis)


@lowers(aten.unbind.int)
def _unbind(b: GraphBuilder, node: fx.Node, x: Value, dim: int = 0) -> tuple[str, ...]:
    axis = dim % x.rank
    return tuple(
        b.op("Gather", x.name, b.constant(np.asarray(i, dtype=np.int64)), axis=axis)
        for i in range(fixed(x.shape[axis]))
    )


@lowers(aten.flip.default)
def _flip(b: GraphBuilder, node: fx.Node, x: Value, dims: Sequence[int]) -> str:
    axes = [d % x.rank for d in dims]
    return b.slice(x.name, [-1] * len(axes), [-END] * len(axes), axes, [-1] * len(axes))


def padded(x: torch.Tensor, amounts: Sequence[int], value: float = 0) -> torch.Tensor:
    """constant_pad_nd as slices and concatenations: PyTorch's own would fix the batch size of the trace."""
    for i in range(len(amounts) // 2):  # PyTorch lists the last axis first
        axis = x.dim() - 1 - i
        before, after = amounts[2 * i], amounts[2 * i + 1]
        x = x.narrow(axis, max(-before, 0), x.shape[axis] - max(-before, 0) - max(-after, 0))
        shape = list(x.shape)
        filled = [x.new_full([*shape[:axis], n, *shape[axis + 1 :]], value) if n > 0 else None for n in (before, after)]
        parts = [part for part in (filled[0], x, filled[1]) if part is not None]
        x = torch.cat(parts, axis) if len(parts) > 1 else x
    return x


@lowers(aten.full.default, aten.full_like.default, aten.new_full.default)
def _full(b: GraphBuilder, node: fx.Node, like: Any, *args: Any, **kwargs: Any) -> str:
    return _filled(b, node, args[-1])


@lowers(aten.zeros.default, aten.zeros_like.default, aten.new_zeros.default)
def _zeros(b: GraphBuilder, node: fx.Node, *args: Any, **kwargs: Any) -> str:
    return _filled(b, node, 0)


@lowers(aten.ones.default, aten.ones_like.default, aten.new_ones.default)
def _ones(b: GraphBuilder, node: fx.Node, *args: Any, **kwargs: Any) -> str:
    return _filled(b, node, 1)


@lowers(aten.scalar_tensor.default)
def _scalar_tensor(b: GraphBuilder, node: fx.Node, value: Scalar, **kwargs: Any) -> str:
    return b.scalar(value, result_dtype(node))


def _filled(b: GraphBuilder, node: fx.Node, value: Scalar) -> str:
    dtype = result_dtype(node)
    return b.filled(value, _shape(node), dtype) if _shape(node) else b.scalar(value, dtype)


@lowers(aten.arange.default, aten.arange.start, aten.arange.start_step, torch.ops.prims.iota.default)
def _arange(b: GraphBuilder, node: fx.Node, *args: Any, **kwargs: Any) -> str:
    dtype = result_dtype(node)
    if node.target is torch.ops.prims.iota.default:
        start, step = kwargs["start"], kwargs["step"]
        end = start + args[0] * step
    else:
        start, end, step = (0, args[0], 1) if len(args) == 1 else (*args, 1)[:3]
    return b.op("Range", b.scalar(start, dtype), b.scalar(end, dtype), b.scalar(step, dtype))
