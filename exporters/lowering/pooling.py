"""Pooling and its gradients."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import fx

from edgelocal.exporters.lowering.registry import UnsupportedOperatorError, lowers
from edgelocal.exporters.onnx_graph import Dim, GraphBuilder, Value, fixed

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
    _only_for_backward(node)
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
def _max_pool_backward(b: GraphBuilder, node: fx.Node, grad: Value, x: Value, *geometry: Any, **rest: Any) -> str:
    return _to_maxima(b, grad, geometry[-1], x.shape)


@lowers(aten.adaptive_max_pool2d.default)
def adaptive_max_pool(b: GraphBuilder, node: fx.Node, x: Value, sizes: Sequence[int]) -> tuple[str, str]:
    """Plain pooling of a map in which windows of unequal size, or that overlap, are laid out side by side."""
    _only_for_backward(node)
    source, windows = x.name, []
    for axis, out in zip((2, 3), sizes, strict=True):
        places = _adaptive_windows(fixed(x.shape[axis]), int(out))
        windows.append(places.shape[1])
        if places.size != x.shape[axis]:
            source = b.op("Gather", source, b.ints(places.reshape(-1).tolist()), axis=axis)
    return b.multi("MaxPool", [source], 2, kernel_shape=windows, strides=windows)  # type: ignore[return-value]  # two names


@lowers(aten.adaptive_max_pool2d_backward.default)
def _adaptive_max_pool_backward(b: GraphBuilder, node: fx.Node, grad: Value, x: Value, indices: Value) -> str:
    sizes = x.static(2, 3)
    rows, columns = (_adaptive_windows(size, fixed(grad.shape[2 + i])).reshape(-1) for i, size in enumerate(sizes))
    laid = _to_maxima(b, grad, indices, (*x.shape[:2], len(rows), len(columns)))
    if (len(rows), len(columns)) == sizes:
        return laid
    back = [np.equal.outer(np.arange(size), places) for size, places in zip(sizes, (rows, columns), strict=True)]
    return _sandwich(b, laid, back[0], back[1].T)


def _adaptive_windows(size: int, out: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """(out, widest window): the places each output looks at; shorter windows repeat their last."""
    spans = [range(i * size // out, -(-(i + 1) * size // out)) for i in range(out)]
    widest = max(len(span) for span in spans)
    return np.asarray([[*span, *[span[-1]] * (widest - len(span))] for span in spans], dtype=np.int64)


def _to_maxima(b: GraphBuilder, grad: Value, indices: Value, shape: Sequence[Dim]) -> str:
    """Add each gradient to the place its maximum came from, on the flat batch."""
    flat = b.ints([-1])
    zeros = b.filled(0.0, [math.prod(shape)], grad.dtype)
    places = b.op("Reshape", indices.name, flat)
    total = b.op("ScatterElements", zeros, places, b.op("Reshape", grad.name, flat), axis=0, reduction="add")
    return b.reshape(total, shape)


_MAX_BACKWARD = (aten.max_pool2d_with_indices_backward.default, aten.adaptive_max_pool2d_backward.default)


def _only_for_backward(node: fx.Node) -> None:
    """Refuse a network that uses the places of the maxima itself, as unpooling does: ONNX counts them otherwise."""
    readers = [u for u in node.users if u.target is operator.getitem and u.args[1] == 1]
    while readers:
        for user in readers.pop().users:
            if user.target in (aten.detach.default, aten.squeeze.dim, aten.alias.default):
                readers.append(user)
            elif user.target not in _MAX_BACKWARD:
                raise UnsupportedOperatorError(str(node.target), "its indices are used by the network")


@lowers(aten.avg_pool2d.default)
def _avg_pool(
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
    # ONNX has no divisor, older runtimes divide a cut window wrongly, and the training build dies of AveragePoolGrad.
    if divisor is not None or ceil_mode or b.derived:
        out = node.meta["val"].shape[2:]
        rows, columns = _windows(x.shape[2:], out, sizes, stride, padding, count_include_pad, divisor)
        return _sandwich(b, x, rows, columns.T)
    return b.op(
        "AveragePool",
        x.name,
        kernel_shape=sizes,
        strides=_pair(stride, sizes),
        pads=_pair(padding) * 2,
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
    rows, columns = _windows(x.shape[2:], grad.shape[2:], _pair(kernel), stride, padding, count_include_pad, divisor)
    return _sandwich(b, grad, rows.T, columns)


@lowers(aten._adaptive_avg_pool2d.default)
def _adaptive_avg_pool(b: GraphBuilder, node: fx.Node, x: Value, sizes: Sequence[int]) -> str:
    if list(sizes) == [1, 1]:
        return b.op("GlobalAveragePool", x.name)
    rows, columns = (_adaptive_matrix(fixed(x.shape[2 + i]), int(sizes[i])) for i in (0, 1))
    return _sandwich(b, x, rows, columns.T)


@lowers(aten._adaptive_avg_pool2d_backward.default)
def _adaptive_avg_pool_backward(b: GraphBuilder, node: fx.Node, grad: Value, x: Value) -> str:
    rows, columns = (_adaptive_matrix(fixed(x.shape[2 + i]), fixed(grad.shape[2 + i])) for i in (0, 1))
    return _sandwich(b, grad, rows.T, columns)


def _sandwich(b: GraphBuilder, x: Value | str, left: np.ndarray[Any, Any] | None, right: np.ndarray[Any, Any]) -> str:
    """left @ x @ right on the last two axes; None is the identity."""
    source = x if isinstance(x, str) else x.name
    if left is not None:
        source = b.op("MatMul", b.constant(left.astype(np.float32)), source)
    return b.op("MatMul", source, b.constant(right.astype(np.float32)))


@lowers(aten.replication_pad1d_backward.default, aten.replication_pad2d_backward.default)
def replication_pad_backward(b: GraphBuilder, node: fx.Node, grad: Value, x: Value, amounts: Sequence[int]) -> str:
    """Padding by repetition is linear as well: every place adds up the gradients of its copies."""
    copies = []
    for i, axis in enumerate(range(x.rank - 1, x.rank - 1 - len(amounts) // 2, -1)):
        before, after = amounts[2 * i : 2 * i + 2]
        size = fixed(x.shape[axis])
        places = np.clip(np.arange(-before, size + after), 0, size - 1)
        copies.append(np.equal.outer(places, np.arange(size)))
    left = copies[1].T if len(copies) == 2 else None
    return _sandwich(b, grad, left, copies[0])


def _adaptive_matrix(size: int, out: int) -> np.ndarray[Any, Any]:
    """(out, size): output i averages the inputs floor(i size / out) ... ceil((i + 1) size / out) - 1."""
    matrix = np.zeros((out, size))
    for i in range(out):
        first, last = i * size // out, -(-(i + 1) * size // out)
        matrix[i, first:last] = 1 / (last - first)
    return matrix


def _windows(
    sizes: Sequence[Dim],
    outs: Sequence[Dim],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    count_pad: bool,
    divisor: int | None,
) -> list[np.ndarray[Any, Any]]:
    """The matrices A_h and A_w of average pooling. With a divisor of its own the rows only add, and A_w divides."""
    strides, pads = _pair(stride, kernel), _pair(padding)
    matrices = [
        _window_matrix(fixed(sizes[i]), fixed(outs[i]), kernel[i], strides[i], pads[i], count_pad, divisor is None)
        for i in (0, 1)
    ]
    return matrices if divisor is None else [matrices[0], matrices[1] / divisor]


def _window_matrix(
    size: int, out: int, kernel: int, stride: int, pad: int, count_pad: bool, average: bool
) -> np.ndarray[Any, Any]:
    """(out, size): output i takes the `kernel` inputs from i * stride - pad on, as far as there are any.

    The divisor counts padding (zeros) if `count_pad`, but never what a last window of ceil_mode has beyond it.
    """
    matrix = np.zeros((out, size))
    for i in range(out):
        first = i * stride - pad
        start, stop = max(first, 0), min(first + kernel, size)
        counted = min(first + kernel, size + pad) - first if count_pad else stop - start
        matrix[i, start:stop] = 1 / counted if average else 1
    return matrix
