"""Sums, means, maxima, variances, softmax."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from edgelocal.exporters.lowering.pointwise import operand, result_dtype
from edgelocal.exporters.lowering.registry import lowers
from edgelocal.exporters.onnx_graph import GraphBuilder, Value

aten = torch.ops.aten


def _axes(x: Value, dims: Any) -> list[int]:
    if dims is None or (isinstance(dims, Sequence) and not dims):
        return list(range(x.rank))
    return [d % x.rank for d in (dims if isinstance(dims, Sequence) else [dims])]


def _reduce(kind: str, b: GraphBuilder, node: fx.Node, x: Value, dims: Any, keepdim: bool) -> str:
    value = operand(b, x, result_dtype(node))
    return value if x.rank == 0 else b.reduce(kind, value, _axes(x, dims), keepdim)


@lowers(aten.sum.default, aten.sum.dim_IntList)
def _sum_(
    b: GraphBuilder, node: fx.Node, x: Value, dims: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> str:
    return _reduce("ReduceSum", b, node, x, dims, keepdim)


@lowers(aten.mean.default, aten.mean.dim)
def _mean(
    b: GraphBuilder, node: fx.Node, x: Value, dims: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> str:
    return _reduce("ReduceMean", b, node, x, dims, keepdim)


@lowers(aten.amax.default)
def _amax(b: GraphBuilder, node: fx.Node, x: Value, dims: Any = (), keepdim: bool = False) -> str:
    return _reduce("ReduceMax", b, node, x, dims, keepdim)


@lowers(aten.amin.default)
def _amin(b: GraphBuilder, node: fx.Node, x: Value, dims: Any = (), keepdim: bool = False) -> str:
    return _reduce("ReduceMin", b, node, x, dims, keepdim)


@lowers(aten.prod.default, aten.prod.dim_int)
def _prod(
    b: GraphBuilder, node: fx.Node, x: Value, dims: Any = None, keepdim: bool = False, *, dtype: Any = None
) -> str:
    return _reduce("ReduceProd", b, node, x, dims, keepdim)


@lowers(aten.any.default, aten.any.dim)
def _any_(b: GraphBuilder, node: fx.Node, x: Value, dims: Any = None, keepdim: bool = False) -> str:
    counted = b.cast(x.name, x.dtype, torch.int64)
    return b.cast(b.reduce("ReduceMax", counted, _axes(x, dims), keepdim), torch.int64, torch.bool)


@lowers(aten.argmax.default)
def _argmax(b: GraphBuilder, node: fx.Node, x: Value, dim: int | None = None, keepdim: bool = False) -> str:
    flat = x.name if dim is not None else b.op("Reshape", x.name, b.ints([-1]))
    return b.op("ArgMax", flat, axis=0 if dim is None else dim % x.rank, keepdims=int(keepdim))


@lowers(aten.max.dim)
def _max_dim(b: GraphBuilder, node: fx.Node, x: Value, dim: int, keepdim: bool = False) -> tuple[str, str]:
    axis = dim % x.rank
    return b.reduce("ReduceMax", x.name, [axis], keepdim), b.op("ArgMax", x.name, axis=axis, keepdims=int(keepdim))


def _moments(b: GraphBuilder, x: Value, dims: Any, correction: Any, keepdim: bool) -> tuple[str, str]:
    """(variance, mean). Two passes, sum (x - mean)^2: one pass (E x^2 - mean^2) loses the variance far from zero."""
    axes = _axes(x, dims)
    average = b.reduce("ReduceMean", x.name, axes, keepdims=True)
    centred = b.op("Sub", x.name, average)
    count = math.prod(x.shape[a] for a in axes)
    total = b.reduce("ReduceSum", b.op("Mul", centred, centred), axes, keepdim)
    variance = b.op("Div", total, b.scalar(count - (1 if correction is None else correction), x.dtype))
    return variance, average if keepdim else b.op("Squeeze", average, b.ints(axes))


@lowers(aten.var_mean.correction)
def _var_mean(
    b: GraphBuilder, node: fx.Node, x: Value, dims: Any = None, *, correction: Any = None, keepdim: bool = False
) -> tuple[str, str]:
    return _moments(b, x, dims, correction, keepdim)


@lowers(aten.var.correction)
def _var(
    b: GraphBuilder, node: fx.Node, x: Value, dims: Any = None, *, correction: Any = None, keepdim: bool = False
) -> str:
    return _moments(b, x, dims, correction, keepdim)[0]


@lowers(aten._softmax.default)
def _softmax(b: GraphBuilder, node: fx.Node, x: Value, dim: int, half_to_float: bool) -> str:
    return b.op("Softmax", x.name, axis=dim % x.rank)


@lowers(aten._log_softmax.default)
def _log_softmax(b: GraphBuilder, node: fx.Node, x: Value, dim: int, half_to_float: bool) -> str:
    return b.op("LogSoftmax", x.name, axis=dim % x.rank)


@lowers(aten._softmax_backward_data.default)
def softmax_backward(b: GraphBuilder, node: fx.Node, grad: Value, y: Value, dim: int, dtype: Any) -> str:
    """y (g - sum(g y))."""
    weighted = b.op("Mul", grad.name, y.name)
    total = b.reduce("ReduceSum", weighted, [dim % y.rank], keepdims=True)
    return b.op("Sub", weighted, b.op("Mul", y.name, total))


@lowers(aten._log_softmax_backward_data.default)
def log_softmax_backward(b: GraphBuilder, node: fx.Node, grad: Value, y: Value, dim: int, dtype: Any) -> str:
    """g - exp(y) sum(g)."""
    total = b.reduce("ReduceSum", grad.name, [dim % y.rank], keepdims=True)
    return b.op("Sub", grad.name, b.op("Mul", b.op("Exp", y.name), total))


@lowers(aten.cumsum.default)
def _cumsum(b: GraphBuilder, node: fx.Node, x: Value, dim: int, *, dtype: Any = None) -> str:
    axis = b.ints([dim % x.rank])
    return b.op("CumSum", operand(b, x, result_dtype(node)), b.op("Squeeze", axis, b.ints([0])))
