"""Matrix products."""

from __future__ import annotations

import torch
from torch import fx

from edgelocal.exporters.lowering.pointwise import operand
from edgelocal.exporters.lowering.registry import lowers
from edgelocal.exporters.onnx_graph import GraphBuilder, Scalar, Value

aten = torch.ops.aten


@lowers(aten.mm.default, aten.bmm.default, aten.mv.default, aten.dot.default)
def _matmul(b: GraphBuilder, node: fx.Node, x: Value, y: Value) -> str:
    return b.op("MatMul", x.name, y.name)


@lowers(aten.addmm.default)
def _addmm(
    b: GraphBuilder, node: fx.Node, bias: Value, x: Value, y: Value, *, beta: Scalar = 1, alpha: Scalar = 1
) -> str:
    return b.op("Gemm", x.name, y.name, bias.name, alpha=float(alpha), beta=float(beta))


@lowers(aten.baddbmm.default)
def _baddbmm(
    b: GraphBuilder, node: fx.Node, bias: Value, x: Value, y: Value, *, beta: Scalar = 1, alpha: Scalar = 1
) -> str:
    product = b.op("Mul", b.op("MatMul", x.name, y.name), operand(b, alpha, x.dtype))
    return b.op("Add", product, b.op("Mul", bias.name, operand(b, beta, x.dtype)))
