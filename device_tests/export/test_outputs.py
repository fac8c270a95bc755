"""Values that are outputs of a graph carry the outer names; a copy is made only where there is no other way."""

from __future__ import annotations

import functools

import numpy as np
import onnx
import pytest
import torch

from device_tests.export.helpers import Arrays, op_types, session
from edgelocal.bundle.spec import RuleSpec, TaskSpec
from edgelocal.exporters.onnx_accumulate import apply_graph, gradient_graph
from edgelocal.exporters.onnx_graph import GraphBuilder, value_info
from edgelocal.exporters.onnx_inference import forward_graph, head_graph
from edgelocal.exporters.onnx_step import step_graph
from edgelocal.exporters.optimizers import adamw
from edgelocal.exporters.partition import partition
from edgelocal.exporters.rules import build_blocks
from edgelocal.exporters.units import load_network

X = np.asarray([1.0, -2.0, 3.0], np.float32)


def small() -> GraphBuilder:
    """-x, and |-x|, of x (3,)."""
    builder = GraphBuilder(batch_of="x")
    builder.op("Abs", builder.op("Neg", "x"))
    return builder


def model_of(builder: GraphBuilder, *outputs: str) -> onnx.ModelProto:
    infos = [value_info(name, (3,), torch.float32) for name in ("x", *outputs)]
    model = builder.model(infos[:1], infos[1:], "small")
    onnx.checker.check_model(model, full_check=True)
    return model


def run(model: onnx.ModelProto) -> Arrays:
    outputs = [o.name for o in model.graph.output]
    return dict(zip(outputs, session(model).run(None, {"x": X}), strict=True))


def test_the_node_puts_it_out_and_the_readers_read_it_by_that_name() -> None:
    builder = small()
    builder.rename("neg_1", "negative")
    builder.rename("abs_2", "size")
    model = model_of(builder, "size", "negative")
    assert [(n.op_type, *n.input, *n.output) for n in model.graph.node] == [
        ("Neg", "x", "negative"),
        ("Abs", "negative", "size"),
    ]
    found = run(model)
    np.testing.assert_array_equal(found["negative"], -X)
    np.testing.assert_array_equal(found["size"], np.abs(X))


def test_nodes_written_later_still_find_the_value() -> None:
    builder = small()
    builder.rename("neg_1", "negative")
    builder.rename(builder.op("Exp", "neg_1"), "power")
    np.testing.assert_allclose(run(model_of(builder, "negative", "power"))["power"], np.exp(-X), rtol=1e-6)


def test_a_second_name_an_input_and_a_constant_are_copies() -> None:
    builder = small()
    constant = builder.constant(np.asarray([7.0, 8.0, 9.0], np.float32))
    for inner, outer in (("neg_1", "one"), ("neg_1", "two"), ("x", "same"), (constant, "fixed")):
        builder.rename(inner, outer)
    model = model_of(builder, "two", "one", "same", "fixed")
    copies = {n.output[0]: n.input[0] for n in model.graph.node if n.op_type == "Identity"}
    assert copies == {"two": "one", "same": "x", "fixed": constant}
    found = run(model)
    for name, value in {"one": -X, "two": -X, "same": X, "fixed": [7, 8, 9]}.items():
        np.testing.assert_array_equal(found[name], value, err_msg=name)


def test_a_model_can_be_made_twice() -> None:
    builder = small()
    builder.rename("neg_1", "negative")
    assert model_of(builder, "negative") == model_of(builder, "negative")


def test_one_of_several_results_of_a_node() -> None:
    builder = GraphBuilder(batch_of="x")
    values, _ = builder.multi("TopK", ("x", builder.ints([3])), 2)
    builder.rename(values, "sorted")
    np.testing.assert_array_equal(run(model_of(builder, "sorted"))["sorted"], [3, 1, -2])


@functools.cache
def graphs(name: str) -> tuple[onnx.ModelProto, ...]:
    network, task, shape = (
        load_network(name, (3, 16, 16), 10, seed=0),
        TaskSpec("cross_entropy", 10, 0.0, ()),
        (3, 16, 16),
    )
    cut = partition(network, blocks=2, rule="auglocal", depth=1, tail="merge")
    block = build_blocks(network, RuleSpec("auglocal", 1, 0.5, 1, "merge"), cut, seed=0)[0]
    grad = gradient_graph(block, task, shape, torch.float32)
    forward = forward_graph(block, shape, torch.float32)
    head = head_graph(block, [int(d) for d in forward.output("h").shape[1:]])
    step = step_graph(block, task, adamw(), shape, torch.float32)
    return tuple(graph.model for graph in (step, grad, apply_graph(grad, adamw()), forward, head))


@pytest.mark.parametrize("name", ["resnet8", "vit", "mlp", "mobilenetv2"])
def test_no_graph_of_the_zoo_copies_an_output(name: str) -> None:
    for model in graphs(name):
        assert "Identity" not in op_types(model)
        made = [output for node in model.graph.node for output in node.output]
        assert {o.name for o in model.graph.output} <= set(made)
        assert len(made) == len(set(made))
