"""grad.onnx and apply.onnx as graphs: signatures, standard operators, when a gradient is added, and in place."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from device_tests.export.accumulation import (
    APART,
    JOINED,
    OPTIMIZERS,
    SHAPE,
    TASK,
    blocks_of,
    dropping,
    forms_of,
    sample,
)
from edgelocal.exporters import onnx_block
from edgelocal.exporters.onnx_accumulate import gradient_graph
from edgelocal.exporters.onnx_step import step_graph
from edgelocal.exporters.optimizers import sgd


def names(infos: Sequence[onnx.ValueInfoProto]) -> list[str]:
    return [info.name for info in infos]


def test_inputs_and_outputs_are_in_order_and_a_frozen_parameter_has_no_sum() -> None:
    own = dropping("cross_entropy")
    parameters = ["first.weight", "first.bias", "last.weight", "last.bias"]
    params, trained = [f"param/{n}" for n in parameters], parameters[:3]
    sums = [f"acc/{n}" for n in trained]
    assert names(own.grad.graph.model.graph.input) == ["x", "y", "share", "rand/0", "rand/1", *params, *sums]
    assert names(own.grad.graph.model.graph.output) == ["h", "loss", "correct", *(f"new/{n}" for n in sums)]
    slots = [*(f"opt/{slot}/{n}" for slot in "mv" for n in trained), "opt/step"]
    hyper = ["lr", "beta1", "beta2", "eps", "weight_decay"]
    assert names(own.apply.graph.model.graph.input) == [*hyper, *params[:3], *sums, *slots]
    assert names(own.apply.graph.model.graph.output) == [f"new/{n}" for n in (*params[:3], *slots)]
    assert own.grad.graph.masks == own.step.graph.masks
    assert [m.keep for m in own.grad.graph.masks] == [0.75, 0.75]


def test_buffers_come_last_and_only_data_and_output_have_a_batch() -> None:
    for own in forms_of("resnet8", "nesterov"):
        step, grad = own.step.graph, own.grad.graph
        kept = {kind: [t for t in step.inputs if t.kind == kind] for kind in ("param", "buf")}
        sums = [t for t in grad.inputs if t.kind == "acc"]
        assert [(t.name[4:], t.shape, t.dtype) for t in sums] == [(t.name[6:], t.shape, t.dtype) for t in kept["param"]]
        assert list(grad.inputs[3:]) == [*kept["param"], *sums, *kept["buf"]]
        assert [t.name for t in grad.outputs[3:]] == [f"new/{t.name}" for t in (*sums, *kept["buf"])]
        assert [t.name for t in (*grad.inputs, *grad.outputs) if "N" in t.shape] == ["x", "y", "h"]
        assert grad.inputs[2].shape == ()
        assert not [t for t in (*own.apply.graph.inputs, *own.apply.graph.outputs) if "N" in t.shape]


@pytest.mark.parametrize("name", ["resnet8", "vit"])
def test_graphs_are_standard_onnx_with_the_declared_signature(name: str) -> None:
    for graph in (g.graph for own in forms_of(name, "adamw") for g in (own.grad, own.apply)):
        onnx.checker.check_model(graph.model, full_check=True)
        assert [(o.domain, o.version <= 18) for o in graph.model.opset_import] == [("", True)]
        assert graph.model.ir_version <= 9
        assert max(numpy_helper.to_array(c).nbytes for c in graph.model.graph.initializer) <= 4096
        for infos, specs in ((graph.model.graph.input, graph.inputs), (graph.model.graph.output, graph.outputs)):
            shapes = [tuple(d.dim_param or d.dim_value for d in i.type.tensor_type.shape.dim) for i in infos]
            assert list(zip(names(infos), shapes, strict=True)) == [(t.name, t.shape) for t in specs]


@pytest.mark.parametrize("name", [*APART, *JOINED])
def test_a_sum_is_one_addition_that_is_the_output_and_the_only_reader(name: str) -> None:
    for own in forms_of(name, "nesterov"):
        nodes = own.grad.graph.model.graph.node
        for total in (t.name for t in own.grad.graph.inputs if t.kind == "acc"):
            (reader,) = (node for node in nodes if total in node.input)
            assert (reader.op_type, reader.input[0], list(reader.output)) == ("Add", total, [f"new/{total}"])
            assert not [node for node in nodes if f"new/{total}" in node.input]


def test_a_gradient_is_added_before_earlier_ones_exist() -> None:
    nodes = forms_of("resnet8", "nesterov")[1].grad.graph.model.graph.node
    made = {output: index for index, node in enumerate(nodes) for output in node.output}
    order = ("fc.weight", "layer3.0.conv2.weight", "layer3.0.conv1.weight")
    when = [made[f"new/acc/{n}"] for n in order]
    assert when == sorted(when)
    assert when[0] < max(i for i, node in enumerate(nodes) if "param/layer3.0.conv1.weight" in node.input)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_sums_and_updates_may_be_written_in_place(optimizer: str) -> None:
    """The outputs new/acc, new/param and new/opt over the inputs they are made of: the same bits."""
    own, (x, y) = forms_of("resnet8", optimizer)[0], sample()
    state = own.initial()
    state |= {t.name: np.full(t.resolve(1), 0.5, np.float32) for t in own.grad.graph.inputs if t.kind == "acc"}
    share = np.asarray(0.25, np.float32)
    for runnable, changed in ((own.grad, ("new/acc/",)), (own.apply, ("new/param/", "new/opt/"))):
        feeds = {"x": x, "y": y, "share": share, **own.numbers(), **state}
        expected = runnable(feeds)
        binding = runnable.session.io_binding()
        values = {t.name: onnxruntime.OrtValue.ortvalue_from_numpy(feeds[t.name]) for t in runnable.graph.inputs}
        for name, value in values.items():
            binding.bind_ortvalue_input(name, value)
        for name in expected:
            if name.startswith(changed):
                binding.bind_ortvalue_output(name, values[name.removeprefix("new/")])
            else:
                binding.bind_output(name)
        runnable.session.run_with_iobinding(binding)
        results = dict(zip(expected, binding.get_outputs(), strict=True))
        for name, value in expected.items():
            np.testing.assert_array_equal(results[name].numpy(), value, err_msg=name)


def test_the_second_form_is_not_traced_again(monkeypatch: pytest.MonkeyPatch) -> None:
    block = blocks_of("mlp")[0]
    step_graph(block, TASK, sgd(), SHAPE, torch.float32)

    def refuse(*arguments: object, **settings: object) -> None:
        raise AssertionError("traced again")

    monkeypatch.setattr(onnx_block, "trace", refuse)
    assert gradient_graph(block, TASK, SHAPE, torch.float32).output("h").shape[0] == "N"
