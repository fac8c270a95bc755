"""Every traced PyTorch operator as standard ONNX operators, and why in this form.

A lowering is a function `(builder, node, *args, **kwargs)` registered for one or more ATen overloads. Tensor
arguments arrive as `Value`, numbers as Python or symbolic numbers. It returns the name of its result, or a tuple of
names for an operator with several results. Operators without a lowering are first decomposed by PyTorch
(`decompositions`); what is left over is an `UnsupportedOperatorError`.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx
from torch._decomp import core_aten_decompositions, decomposition_table

from edgelocal.exporters.lowering import (
    convolution,
    indexing,
    linear,
    normalization,
    pointwise,
    pooling,
    reductions,
    shapes,
)
from edgelocal.exporters.lowering.registry import REGISTRY, UnsupportedOperatorError
from edgelocal.exporters.onnx_graph import GraphBuilder, Value

__all__ = ["UnsupportedOperatorError", "decompositions", "lower"]

FAMILIES = (convolution, indexing, linear, normalization, pointwise, pooling, reductions, shapes)

aten = torch.ops.aten

# Part of PyTorch's core set and so not decomposed by default; their decompositions use only operators lowered here.
EXTRA_DECOMPOSITIONS = (
    aten.elu.default,
    aten.linalg_vector_norm.default,
    aten.native_layer_norm.default,
    aten.native_layer_norm_backward.default,
    aten.native_group_norm.default,
    aten.native_group_norm_backward.default,
    aten.upsample_nearest2d.vec,
    aten.upsample_bilinear2d.vec,
    aten.reflection_pad2d.default,
    aten.replication_pad2d.default,
)


# Checks that tracing leaves behind; they compute nothing.
ASSERTIONS = (aten._assert_tensor_metadata.default, aten._assert_scalar.default)


def decompositions() -> dict[Any, Callable[..., Any]]:
    """PyTorch's own decompositions, without the operators that are lowered directly."""
    table: dict[Any, Callable[..., Any]] = dict(core_aten_decompositions())
    table.update({overload: decomposition_table[overload] for overload in EXTRA_DECOMPOSITIONS})
    table[aten.constant_pad_nd.default] = shapes.padded
    return {overload: function for overload, function in table.items() if overload not in REGISTRY}


LARGEST_CONSTANT_BYTES = 4096

Ready = Callable[[fx.Node, Value], None]


def lower(
    graph: fx.Graph, builder: GraphBuilder, inputs: Mapping[str, str], ready: Ready | None = None
) -> dict[fx.Node, Any]:
    """Emit a traced graph into `builder`; `inputs` maps placeholder names to value names.

    `ready(node, value)` is called as soon as a tensor exists and may emit what depends on it. Returns what each node
    became: a `Value`, a tuple of them, or a number.

    Raises:
        UnsupportedOperatorError: an operator without a lowering.
    """
    done: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node.op == "placeholder":
            done[node] = _wrap(inputs[node.name], node.meta["val"])
        elif node.target in ASSERTIONS:
            continue
        elif node.op == "call_function":
            first = len(builder.nodes)
            done[node] = _lower_node(node, builder, done)
            builder.origins |= {made.name: str(node.target) for made in builder.nodes[first:]}
            if ready is not None and isinstance(done[node], Value):
                ready(node, done[node])
        elif node.op == "get_attr":
            done[node] = _constant(builder, node, graph)
        elif node.op != "output":
            raise UnsupportedOperatorError(f"{node.op} {node.target}")
    return done


def _constant(builder: GraphBuilder, node: fx.Node, graph: fx.Graph) -> Value:
    """A tensor written in the network's code, or kept there as a plain attribute."""
    tensor: torch.Tensor = getattr(graph.owning_module, str(node.target)).detach()
    if tensor.numel() * tensor.element_size() > LARGEST_CONSTANT_BYTES:
        raise UnsupportedOperatorError(
            f"a constant of shape {tuple(tensor.shape)}", "keep it with register_buffer(), not in a plain attribute"
        )
    return _wrap(builder.constant(tensor.numpy()), tensor)


def _lower_node(node: fx.Node, builder: GraphBuilder, done: Mapping[fx.Node, Any]) -> Any:
    value = node.meta.get("val")
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool, int, float, bool)):
        return value  # a size: the builder knows its formula, it needs no node
    args: Any = fx.map_arg(node.args, lambda n: done[n])
    kwargs: Any = fx.map_arg(node.kwargs, lambda n: done[n])
    if node.target is operator.getitem:
        return args[0][args[1]]
    if node.target not in REGISTRY:
        raise UnsupportedOperatorError(str(node.target))
    result = REGISTRY[node.target](builder, node, *args, **kwargs)
    if isinstance(result, tuple):
        values = value if isinstance(value, (tuple, list)) else (value,)
        return tuple(None if name is None else _wrap(name, v) for name, v in zip(result, values, strict=True))
    return _wrap(result, value)


def _wrap(name: str, fake: Any) -> Value:
    return Value(name, tuple(fake.shape), fake.dtype)
