"""Embeddings, gathers, the losses that pick by label, and dropout."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import fx

from edgelocal.exporters.lowering.registry import UnsupportedOperatorError, lowers
from edgelocal.exporters.onnx_graph import Dim, GraphBuilder, Scalar, Value, fixed

aten = torch.ops.aten


@lowers(aten.embedding.default)
def _embedding(b: GraphBuilder, node: fx.Node, weight: Value, indices: Value, *args: Any, **kwargs: Any) -> str:
    return b.op("Gather", weight.name, indices.name, axis=0)


@lowers(aten.embedding_dense_backward.default)
def embedding_backward(
    b: GraphBuilder, node: fx.Node, grad: Value, indices: Value, count: int, padding: int, scale_by_freq: bool
) -> str:
    """Rows of the gradient added up by index; the padding row gets none."""
    if scale_by_freq:
        raise UnsupportedOperatorError(str(node.target), "scale_grad_by_freq")
    width = fixed(grad.shape[-1])
    columns = b.op("Transpose", b.op("Reshape", grad.name, b.ints([-1, width])), perm=[1, 0])
    places = b.op("Reshape", indices.name, b.ints([-1]))
    zeros = b.filled(0.0, [width, count], grad.dtype)
    if padding >= 0:
        real = b.op("Not", b.op("Equal", places, b.scalar(padding, torch.int64)))
        columns = b.op("Mul", columns, b.cast(real, torch.bool, grad.dtype))
    return b.op("Transpose", _write_columns(b, zeros, places, columns, accumulate=True), perm=[1, 0])


def _write_columns(b: GraphBuilder, x: str, places: str, values: str, accumulate: bool) -> str:
    """x (M, K) with values (M, P) written or added at places (P,) of the second axis.

    Never ScatterND: ONNX Runtime adds in several threads without a lock, and gradients of an index that occurs twice
    get lost. ScatterElements is sequential.
    """
    wide = b.op("Expand", b.op("Unsqueeze", places, b.ints([0])), b.op("Shape", values))
    return b.op("ScatterElements", x, wide, values, axis=1, reduction="add" if accumulate else None)


@lowers(aten.gather.default)
def _gather(b: GraphBuilder, node: fx.Node, x: Value, dim: int, index: Value, **kwargs: Any) -> str:
    return b.op("GatherElements", x.name, index.name, axis=dim % x.rank)


@lowers(aten.scatter_add.default)
def _scatter_add(b: GraphBuilder, node: fx.Node, x: Value, dim: int, index: Value, source: Value) -> str:
    return b.op("ScatterElements", x.name, index.name, source.name, axis=dim % x.rank, reduction="add")


@lowers(aten.scatter.src, aten.scatter.value)
def _scatter(b: GraphBuilder, node: fx.Node, x: Value, dim: int, index: Value, source: Value | Scalar) -> str:
    if not isinstance(source, Value):
        values = b.filled(source, index.shape, x.dtype)
    else:
        values = source.name
        if source.shape != index.shape:  # only the part that the index covers is written
            raise UnsupportedOperatorError(str(node.target), "a source of another shape than the index")
    return b.op("ScatterElements", x.name, index.name, values, axis=dim % x.rank)


@lowers(aten.index_select.default)
def _index_select(b: GraphBuilder, node: fx.Node, x: Value, dim: int, index: Value) -> str:
    return b.op("Gather", x.name, index.name, axis=dim % x.rank)


@lowers(aten.index.Tensor)
def index(b: GraphBuilder, node: fx.Node, x: Value, indices: Sequence[Value | None]) -> str:
    """x[..., i, j, ...] with one index tensor or several on adjacent axes."""
    place = _place(b, node, x, indices)
    merged = b.reshape(x.name, place.merged) if place.several else x.name
    return b.op("Gather", merged, place.places, axis=place.axis)


@lowers(aten.index_put.default)
def index_put(
    b: GraphBuilder, node: fx.Node, x: Value, indices: Sequence[Value | None], values: Value, accumulate: bool = False
) -> str:
    """Write or add `values` at the given places: with the indexed axes merged and moved to the end."""
    place = _place(b, node, x, indices)
    before, after = place.merged[: place.axis], place.merged[place.axis + 1 :]
    rows, size = math.prod((*before, *after)), place.merged[place.axis]
    count, inner = len(before), len(place.shape)
    wide = b.op("Expand", values.name, b.shape((*before, *place.shape, *after)))
    last = [*range(count), *range(count + inner, count + inner + len(after)), *range(count, count + inner)]
    source = b.reshape(b.op("Transpose", wide, perm=last), [rows, math.prod(place.shape)])
    order = [*range(count), *range(count + 1, count + 1 + len(after)), count]
    moved = b.op("Transpose", b.reshape(x.name, place.merged), perm=order)
    result = _write_columns(
        b, b.reshape(moved, [rows, size]), b.op("Reshape", place.places, b.ints([-1])), source, accumulate
    )
    split = b.reshape(result, [*before, *after, size])
    return b.reshape(b.op("Transpose", split, perm=[order.index(i) for i in range(len(order))]), x.shape)


class _Place(NamedTuple):
    """Index tensors on adjacent axes as one index into those axes merged."""

    places: str
    shape: tuple[Dim, ...]  # of `places`
    axis: int
    merged: tuple[Dim, ...]  # shape of x with the indexed axes merged
    several: bool


def _place(b: GraphBuilder, node: fx.Node, x: Value, indices: Sequence[Value | None]) -> _Place:
    given = [(axis, i) for axis, i in enumerate(indices) if i is not None]
    if any(i.dtype == torch.bool for _, i in given):
        raise UnsupportedOperatorError(str(node.target), "a mask as an index gives a size that depends on the data")
    axes = [axis for axis, _ in given]
    first, last = axes[0], axes[-1] + 1
    if axes != list(range(first, last)):
        raise UnsupportedOperatorError(str(node.target), "several indices that are not on adjacent axes")
    shape: tuple[Dim, ...] = tuple(torch.broadcast_shapes(*(i.shape for _, i in given)))  # type: ignore[no-untyped-call]
    merged = (*x.shape[:first], math.prod(x.shape[first:last]), *x.shape[last:])
    return _Place(_merged_index(b, x, given), shape, first, merged, len(given) > 1)


def _merged_index(b: GraphBuilder, x: Value, given: Sequence[tuple[int, Value]]) -> str:
    """((i0 n1 + i1) n2 + i2) ..., each counted from the front."""
    total = ""
    for axis, i in given:
        size = b.scalar(x.shape[axis], torch.int64)
        counted = b.op("Mod", b.cast(i.name, i.dtype, torch.int64), size)
        total = b.op("Add", b.op("Mul", total, size), counted) if total else counted
    return total


@lowers(aten.nll_loss_forward.default)
def nll_loss(
    b: GraphBuilder, node: fx.Node, logp: Value, target: Value, weight: Value | None, reduction: int, ignore: int
) -> tuple[str, str]:
    """Mean (1) or sum (2) of -logp[target]; targets equal to `ignore` do not count."""
    if weight is not None or reduction not in (1, 2) or logp.rank != 2:
        raise UnsupportedOperatorError(str(node.target), "class weights, no reduction, or targets of rank above 1")
    picked, valid = _picked(b, logp, target, ignore)
    chosen = b.op("Mul", b.reduce("ReduceSum", b.op("Mul", logp.name, picked), [1]), valid)
    total = b.op("Neg", b.reduce("ReduceSum", chosen, [0]))
    count = b.reduce("ReduceSum", valid, [0])
    return (b.op("Div", total, count) if reduction == 1 else total), count


@lowers(aten.nll_loss_backward.default)
def _nll_loss_backward(
    b: GraphBuilder,
    node: fx.Node,
    grad: Value,
    logp: Value,
    target: Value,
    weight: Value | None,
    reduction: int,
    ignore: int,
    total_weight: Value,
) -> str:
    picked, valid = _picked(b, logp, target, ignore)
    share = b.op("Div", grad.name, total_weight.name) if reduction == 1 else grad.name
    rows = b.op("Mul", b.op("Neg", share), valid)
    return b.op("Mul", picked, b.op("Unsqueeze", rows, b.ints([1])))


def _picked(b: GraphBuilder, logp: Value, target: Value, ignore: int) -> tuple[str, str]:
    """One-hot rows (N, C) of the targets, and which samples count (N,), both as floats."""
    classes = b.op("Range", *(b.scalar(v, torch.int64) for v in (0, fixed(logp.shape[1]), 1)))
    column = b.op("Unsqueeze", target.name, b.ints([1]))
    one_hot = b.cast(b.op("Equal", column, classes), torch.bool, logp.dtype)
    valid = b.op("Not", b.op("Equal", target.name, b.scalar(ignore, torch.int64)))
    return one_hot, b.cast(valid, torch.bool, logp.dtype)


@lowers(aten.native_dropout_backward.default)
def _dropout_backward(b: GraphBuilder, node: fx.Node, grad: Value, mask: Value, scale: Scalar) -> str:
    kept = b.op("Mul", grad.name, b.cast(mask.name, mask.dtype, grad.dtype))
    return b.op("Mul", kept, b.scalar(scale, grad.dtype))


@lowers(aten.native_dropout.default)
def dropout(b: GraphBuilder, node: fx.Node, x: Value, p: float, train: bool | None) -> tuple[str, str]:
    """The mask is an input that the runner draws, so that a resumed run repeats it bit for bit."""
    mask = b.mask(x.shape, keep=1.0 - p)
    kept = b.op("Mul", x.name, b.cast(mask, torch.bool, x.dtype))
    return b.op("Mul", kept, b.scalar(0.0 if p == 1 else 1 / (1 - p), x.dtype)), mask


@lowers(aten.bernoulli.p)
def _bernoulli(b: GraphBuilder, node: fx.Node, x: Value, p: float = 0.5, *, generator: Any = None) -> str:
    return b.cast(b.mask(x.shape, keep=float(p)), torch.bool, x.dtype)


@lowers(
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.new_empty.default,
    aten.empty_strided.default,
    aten.new_empty_strided.default,
)
def _empty(b: GraphBuilder, node: fx.Node, *args: Any, **kwargs: Any) -> str:
    # What is in an empty tensor is never read; the random fill that follows only takes its shape.
    fake = node.meta["val"]
    return b.filled(0, tuple(fake.shape), fake.dtype)
