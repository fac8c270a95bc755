"""Element-by-element operators: arithmetic, comparisons, activations and their derivatives."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from edgelocal.exporters.lowering.registry import Result, UnsupportedOperatorError, lowers
from edgelocal.exporters.onnx_graph import GraphBuilder, Scalar, Value

aten = torch.ops.aten
Operand = Value | Scalar


def operand(b: GraphBuilder, value: Operand, dtype: torch.dtype) -> str:
    """A tensor or number as a value of dtype `dtype`."""
    if isinstance(value, Value):
        return b.cast(value.name, value.dtype, dtype)
    return b.scalar(value, dtype)


def result_dtype(node: fx.Node) -> torch.dtype:
    """The dtype PyTorch gives the node's (first) result."""
    value = node.meta["val"]
    fake = value[0] if isinstance(value, (tuple, list)) else value
    dtype: torch.dtype = fake.dtype
    return dtype


def _register_unary() -> None:
    plain = {
        "Abs": [aten.abs.default],
        "Neg": [aten.neg.default],
        "Exp": [aten.exp.default],
        "Log": [aten.log.default],
        "Sqrt": [aten.sqrt.default],
        "Reciprocal": [aten.reciprocal.default],
        "Sigmoid": [aten.sigmoid.default],
        "Tanh": [aten.tanh.default],
        "Erf": [aten.erf.default],
        "Sin": [aten.sin.default],
        "Cos": [aten.cos.default],
        "Floor": [aten.floor.default],
        "Ceil": [aten.ceil.default],
        "Round": [aten.round.default],
        "Sign": [aten.sign.default, aten.sgn.default],
        "Relu": [aten.relu.default],
    }
    for op_type, overloads in plain.items():

        @lowers(*overloads)
        def unary(b: GraphBuilder, node: fx.Node, x: Value, op_type: str = op_type) -> str:
            return b.op(op_type, operand(b, x, result_dtype(node)))


_OF_TRUTH = {"Mul": "And", "Max": "Or", "Min": "And"}  # what arithmetic on bool is, which has no kernels


def _register_binary() -> None:
    arithmetic = {
        "Mul": [aten.mul.Tensor, aten.mul.Scalar],
        "Div": [aten.div.Tensor, aten.div.Scalar],
        "Pow": [aten.pow.Tensor_Scalar, aten.pow.Tensor_Tensor, aten.pow.Scalar],
        "Max": [aten.maximum.default],
        "Min": [aten.minimum.default],
    }
    for op_type, overloads in arithmetic.items():

        @lowers(*overloads)
        def binary(b: GraphBuilder, node: fx.Node, x: Operand, y: Operand, op_type: str = op_type) -> str:
            dtype = result_dtype(node)
            kind = _OF_TRUTH.get(op_type, op_type) if dtype == torch.bool else op_type
            return b.op(kind, operand(b, x, dtype), operand(b, y, dtype))

    comparisons = {
        "Equal": [aten.eq.Tensor, aten.eq.Scalar],
        "Greater": [aten.gt.Tensor, aten.gt.Scalar],
        "GreaterOrEqual": [aten.ge.Tensor, aten.ge.Scalar],
        "Less": [aten.lt.Tensor, aten.lt.Scalar],
        "LessOrEqual": [aten.le.Tensor, aten.le.Scalar],
    }
    for op_type, overloads in comparisons.items():

        @lowers(*overloads)
        def compare(b: GraphBuilder, node: fx.Node, x: Value, y: Operand, op_type: str = op_type) -> str:
            other = y.dtype if isinstance(y, Value) else torch.float32 if isinstance(y, float) else x.dtype
            dtype = torch.promote_types(x.dtype, other)
            return b.op(op_type, operand(b, x, dtype), operand(b, y, dtype))

    logical = {
        "And": [aten.logical_and.default, aten.bitwise_and.Tensor],
        "Or": [aten.logical_or.default, aten.bitwise_or.Tensor],
        "Xor": [aten.logical_xor.default, aten.bitwise_xor.Tensor],
    }
    for op_type, overloads in logical.items():

        @lowers(*overloads)
        def logic(b: GraphBuilder, node: fx.Node, x: Value, y: Value, op_type: str = op_type) -> str:
            if result_dtype(node) != torch.bool:
                raise UnsupportedOperatorError(str(node.target), "bit operations on integers")
            return b.op(op_type, operand(b, x, torch.bool), operand(b, y, torch.bool))


_register_unary()
_register_binary()


@lowers(aten.add.Tensor, aten.add.Scalar)
def _add(b: GraphBuilder, node: fx.Node, x: Operand, y: Operand, alpha: Scalar = 1) -> str:
    dtype = result_dtype(node)
    return b.op("Add", operand(b, x, dtype), _scaled(b, operand(b, y, dtype), alpha, dtype))


@lowers(aten.sub.Tensor, aten.sub.Scalar)
def _sub(b: GraphBuilder, node: fx.Node, x: Operand, y: Operand, alpha: Scalar = 1) -> str:
    dtype = result_dtype(node)
    return b.op("Sub", operand(b, x, dtype), _scaled(b, operand(b, y, dtype), alpha, dtype))


@lowers(aten.rsub.Scalar, aten.rsub.Tensor)
def _rsub(b: GraphBuilder, node: fx.Node, x: Operand, y: Operand, alpha: Scalar = 1) -> Result:
    return _sub(b, node, y, x, alpha)


def _scaled(b: GraphBuilder, value: str, alpha: Scalar, dtype: torch.dtype) -> str:
    return value if alpha == 1 else b.op("Mul", value, b.scalar(alpha, dtype))


@lowers(aten.fmod.Tensor, aten.fmod.Scalar)
def _fmod(b: GraphBuilder, node: fx.Node, x: Operand, y: Operand) -> str:
    dtype = result_dtype(node)
    return b.op("Mod", operand(b, x, dtype), operand(b, y, dtype), fmod=1)


@lowers(aten.rsqrt.default)
def _rsqrt(b: GraphBuilder, node: fx.Node, x: Value) -> str:
    return b.op("Reciprocal", b.op("Sqrt", operand(b, x, result_dtype(node))))


@lowers(aten.log1p.default)
def _log1p(b: GraphBuilder, node: fx.Node, x: Value) -> str:
    dtype = result_dtype(node)
    return b.op("Log", b.op("Add", operand(b, x, dtype), b.scalar(1.0, dtype)))


@lowers(aten.expm1.default)
def _expm1(b: GraphBuilder, node: fx.Node, x: Value) -> str:
    dtype = result_dtype(node)
    return b.op("Sub", b.op("Exp", operand(b, x, dtype)), b.scalar(1.0, dtype))


@lowers(aten.ne.Tensor, aten.ne.Scalar)
def _not_equal(b: GraphBuilder, node: fx.Node, x: Value, y: Operand) -> str:
    other = y.dtype if isinstance(y, Value) else x.dtype
    dtype = torch.promote_types(x.dtype, other)
    return b.op("Not", b.op("Equal", operand(b, x, dtype), operand(b, y, dtype)))


@lowers(aten.logical_not.default, aten.bitwise_not.default)
def _logical_not(b: GraphBuilder, node: fx.Node, x: Value) -> str:
    if result_dtype(node) != torch.bool:
        raise UnsupportedOperatorError(str(node.target), "bit operations on integers")
    return b.op("Not", operand(b, x, torch.bool))


@lowers(aten.clamp.default, aten.clamp.Tensor, aten.hardtanh.default)
def _clamp(b: GraphBuilder, node: fx.Node, x: Value, low: Operand | None = None, high: Operand | None = None) -> str:
    # Clip wants bounds that are numbers; Max and Min also take tensors and broadcast.
    dtype = result_dtype(node)
    if node.target is aten.hardtanh.default:
        low, high = (-1.0 if low is None else low), (1.0 if high is None else high)
    result = operand(b, x, dtype)
    if low is not None:
        result = b.op("Max", result, operand(b, low, dtype))
    return result if high is None else b.op("Min", result, operand(b, high, dtype))


@lowers(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar)
def _where(b: GraphBuilder, node: fx.Node, condition: Value, x: Operand, y: Operand) -> str:
    dtype = result_dtype(node)
    chosen, first, second = (operand(b, v, t) for v, t in ((condition, torch.bool), (x, dtype), (y, dtype)))
    if dtype == torch.bool:  # ONNX Runtime's CUDA provider has no Where for it
        return b.op("Or", b.op("And", chosen, first), b.op("And", b.op("Not", chosen), second))
    return b.op("Where", chosen, first, second)


@lowers(aten.masked_fill.Scalar, aten.masked_fill.Tensor)
def _masked_fill(b: GraphBuilder, node: fx.Node, x: Value, mask: Value, value: Operand) -> str:
    dtype = result_dtype(node)
    return b.op("Where", operand(b, mask, torch.bool), operand(b, value, dtype), operand(b, x, dtype))


def masked(b: GraphBuilder, grad: str, condition: str, dtype: torch.dtype) -> str:
    """grad where the condition holds, else 0: a cast and a product, faster than Where on ONNX Runtime's CPU."""
    return b.op("Mul", grad, b.cast(condition, torch.bool, dtype))


@lowers(aten.threshold_backward.default)
def _threshold_backward(b: GraphBuilder, node: fx.Node, grad: Value, x: Value, threshold: Scalar) -> str:
    return masked(b, grad.name, b.op("Greater", x.name, b.scalar(threshold, x.dtype)), grad.dtype)


@lowers(aten.hardtanh_backward.default)
def _hardtanh_backward(b: GraphBuilder, node: fx.Node, grad: Value, x: Value, low: Scalar, high: Scalar) -> str:
    above = b.op("Greater", x.name, b.scalar(low, x.dtype))
    below = b.op("Less", x.name, b.scalar(high, x.dtype))
    return masked(b, grad.name, b.op("And", above, below), grad.dtype)


@lowers(aten.leaky_relu.default)
def _leaky_relu(b: GraphBuilder, node: fx.Node, x: Value, slope: float = 0.01) -> str:
    return b.op("LeakyRelu", x.name, alpha=float(slope))


@lowers(aten.gelu.default)
def gelu(b: GraphBuilder, node: fx.Node, x: Value, *, approximate: str = "none") -> str:
    """x * Phi(x); with approximate="tanh" the usual cubic in a tanh (Hendrycks and Gimpel, 2016)."""
    if approximate == "tanh":
        return b.op("Mul", x.name, _half_one_plus(b, b.op("Tanh", _gelu_inner(b, x)), x.dtype))
    return b.op("Mul", x.name, _normal_cdf(b, x))


@lowers(aten.gelu_backward.default)
def gelu_backward(b: GraphBuilder, node: fx.Node, grad: Value, x: Value, *, approximate: str = "none") -> str:
    """d/dx x Phi(x) = Phi(x) + x phi(x); for tanh: (1 + t)/2 + x (1 - t^2) u' / 2 with t = tanh(u(x))."""
    dtype = x.dtype
    square = b.op("Mul", x.name, x.name)
    if approximate == "tanh":
        t = b.op("Tanh", _gelu_inner(b, x))
        slope = b.op("Mul", square, b.scalar(3 * 0.044715 * math.sqrt(2 / math.pi), dtype))
        slope = b.op("Add", slope, b.scalar(math.sqrt(2 / math.pi), dtype))
        sech2 = b.op("Sub", b.scalar(1.0, dtype), b.op("Mul", t, t))
        tail = b.op("Mul", b.op("Mul", x.name, sech2), b.op("Mul", slope, b.scalar(0.5, dtype)))
        return b.op("Mul", grad.name, b.op("Add", _half_one_plus(b, t, dtype), tail))
    density = b.op("Exp", b.op("Mul", square, b.scalar(-0.5, dtype)))
    density = b.op("Mul", density, b.scalar(1 / math.sqrt(2 * math.pi), dtype))
    return b.op("Mul", grad.name, b.op("Add", _normal_cdf(b, x), b.op("Mul", x.name, density)))


def _normal_cdf(b: GraphBuilder, x: Value) -> str:
    return _half_one_plus(b, b.op("Erf", b.op("Mul", x.name, b.scalar(math.sqrt(0.5), x.dtype))), x.dtype)


def _gelu_inner(b: GraphBuilder, x: Value) -> str:
    cubic = b.op("Mul", b.op("Mul", x.name, x.name), b.op("Mul", x.name, b.scalar(0.044715, x.dtype)))
    return b.op("Mul", b.op("Add", x.name, cubic), b.scalar(math.sqrt(2 / math.pi), x.dtype))


def _half_one_plus(b: GraphBuilder, value: str, dtype: torch.dtype) -> str:
    return b.op("Mul", b.op("Add", value, b.scalar(1.0, dtype)), b.scalar(0.5, dtype))


@lowers(aten.silu.default)
def _silu(b: GraphBuilder, node: fx.Node, x: Value) -> str:
    return b.op("Mul", x.name, b.op("Sigmoid", x.name))


@lowers(aten.softplus.default)
def _softplus(b: GraphBuilder, node: fx.Node, x: Value, beta: Any = 1, threshold: Any = 20) -> str:
    # ONNX's Softplus does not overflow, so PyTorch's switch to the identity above the threshold is not needed.
    if beta == 1:
        return b.op("Softplus", x.name)
    scaled = b.op("Softplus", b.op("Mul", x.name, b.scalar(beta, x.dtype)))
    return b.op("Div", scaled, b.scalar(beta, x.dtype))


@lowers(aten.clone.default, aten.detach.default, aten.alias.default, aten.lift_fresh_copy.default)
def _same(b: GraphBuilder, node: fx.Node, x: Value, **kwargs: Any) -> str:
    return x.name


@lowers(aten._to_copy.default, aten.to.dtype, torch.ops.prims.convert_element_type.default)
def _to_copy(b: GraphBuilder, node: fx.Node, x: Value, *args: Any, **kwargs: Any) -> str:
    return b.cast(x.name, x.dtype, result_dtype(node))
