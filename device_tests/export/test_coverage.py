"""Every node of what is exported for CUDA has a kernel there; what has none is named, with the module it comes from."""

from __future__ import annotations

import copy
import functools
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from device_tests.export.accumulation import build
from device_tests.export.helpers import Function, check, op_types
from edgelocal.bundle.spec import TaskSpec
from edgelocal.commands.export_options import ExportOptions
from edgelocal.errors import ExportError
from edgelocal.exporters import zoo
from edgelocal.exporters.coverage import folded_bytes, strays
from edgelocal.exporters.forms import CPU, CUDA
from edgelocal.exporters.memory.optimise import optimise
from edgelocal.exporters.onnx_accumulate import apply_graph, gradient_graph
from edgelocal.exporters.onnx_block import ExportedGraph
from edgelocal.exporters.onnx_inference import forward_graph, head_graph
from edgelocal.exporters.onnx_step import step_graph
from edgelocal.exporters.optimizers import adamw, sgd
from edgelocal.exporters.request import ExportRequest, make_request
from edgelocal.exporters.rules import LocalBlock
from edgelocal.exporters.target_graphs import Guard, training_graph
from edgelocal.exporters.units import Network, load_network
from edgelocal.exporters.zoo.custom import from_module
from edgelocal.runtime import arena, provider
from edgelocal.runtime.tensor import Place

BATCH = 6
CLASSES = TaskSpec("cross_entropy", 10, 0.1, ())
LARGE = {"mobilenetv2", "resnet18", "resnet34", "resnet50", "resnet101"}
USUAL = {"mlp": 2, "resnet8": 2, "vgg11": 4, "vit": 5}  # in so many blocks; the others are slow
LEAST_FOLDED = 1 << 16  # bytes: beyond, a session would keep maps


def network_of(name: str) -> tuple[Network, tuple[int, ...]]:
    shape = (3, 64, 64) if name in LARGE else (3, 32, 32)
    return load_network(name, shape, 10, seed=0), shape


def graphs_of(block: LocalBlock, task: TaskSpec, shape: tuple[int, ...]) -> dict[str, ExportedGraph]:
    """All graphs of a block for CUDA: the step with SGD, the update apart with AdamW."""
    step = step_graph(block, task, sgd(), shape, torch.float32, CUDA)
    gradient = gradient_graph(block, task, shape, torch.float32, CUDA)
    graphs = {"step": step, "gradient": gradient, "apply": apply_graph(gradient, adamw())}
    graphs["forward"] = forward_graph(block, shape, torch.float32)
    if block.auxiliary is not None:
        graphs["head"] = head_graph(block, step.output("h").shape[1:])  # type: ignore[arg-type]  # static
    return graphs


def uncovered(blocks: tuple[LocalBlock, ...], shape: tuple[int, ...]) -> list[object]:
    """What would not run on CUDA alone, and the graphs that keep large constants there."""
    found: list[object] = []
    for block in blocks:
        graphs = graphs_of(block, CLASSES, shape)
        for kind, graph in graphs.items():
            found += strays(graph.model, BATCH)
            kept = folded_bytes(graph.model, BATCH)
            found += [(block.name, kind, kept)] if kept > LEAST_FOLDED else []
        shape = tuple(graphs["step"].output("h").shape[1:])  # type: ignore[arg-type]  # static
    return found


def shape_behind(block: LocalBlock, shape: tuple[int, ...]) -> tuple[int, ...]:
    with torch.no_grad():
        return tuple(copy.deepcopy(block.body).eval()(torch.zeros(2, *shape)).shape[1:])


@pytest.mark.parametrize(("name", "count"), USUAL.items())
def test_every_node_has_a_kernel(name: str, count: int) -> None:
    """The first block and the last."""
    network, shape = network_of(name)
    blocks = build(network, count, "auglocal")
    assert uncovered(blocks[:1], shape) == []
    for block in blocks[:-1]:
        shape = shape_behind(block, shape)
    assert uncovered(blocks[-1:], shape) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", zoo.names())
def test_every_node_of_the_zoo_has_a_kernel(name: str) -> None:
    network, shape = network_of(name)
    assert uncovered(build(network, 2, "auglocal"), shape) == []


@functools.cache
def small(task: TaskSpec) -> tuple[LocalBlock, ...]:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Dropout(0.5), nn.LayerNorm(8), nn.Linear(8, 10))
    return build(from_module(body, "small", (6,), 10), 1, "bp")


TASKS = [CLASSES, TaskSpec("bce", 10, 0.0, ()), TaskSpec("mse", 10, 0.0, ())]


@pytest.mark.parametrize("optimizer", [sgd, adamw, lambda: sgd(0.0, 0.0, nesterov=False)])
@pytest.mark.parametrize("task", TASKS, ids=[t.loss for t in TASKS])
def test_every_loss_and_optimizer_has_kernels(task: TaskSpec, optimizer: Callable[[], Any]) -> None:
    step = step_graph(small(task)[0], task, optimizer(), (6,), torch.float32, CUDA)
    gradient = gradient_graph(small(task)[0], task, (6,), torch.float32, CUDA)
    for graph in (step, gradient, apply_graph(gradient, optimizer())):
        assert strays(graph.model, BATCH) == ()
        assert strays(optimise(graph, BATCH).model, BATCH) == ()


def test_tokens_have_kernels() -> None:
    body = nn.Sequential(nn.Embedding(11, 8), nn.Flatten(), nn.Linear(32, 10))
    block = build(from_module(body, "tokens", (4,), 10, torch.int64), 1, "bp")[0]
    step = step_graph(block, CLASSES, sgd(), (4,), torch.int64, CUDA)
    assert strays(step.model, BATCH) == ()


def left_by_the_runtime(model: onnx.ModelProto, path: Path, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """The operators that a session for a fixed batch, made as on a device, really has."""

    def options(threads: int) -> Any:
        found = arena.session_options(threads)
        found.optimized_model_filepath = str(path)
        return found

    monkeypatch.setattr(provider, "session_options", options)
    device = provider.Provider(place=Place("cpu"), fixed_batch=True)
    device.session(model.SerializeToString(), 1, BATCH)
    return Counter(node.op_type for node in onnx.load(path).graph.node)


@pytest.mark.parametrize("name", ["vgg11", "resnet8"])
def test_the_runtime_leaves_the_nodes_that_are_checked(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgelocal.exporters.coverage import _unfolded  # what `strays` looks at
    from edgelocal.exporters.memory.shapes import at_batch

    network, shape = network_of(name)
    block = build(network, 2, "auglocal")[0]
    for number, forms in enumerate((CPU, CUDA)):
        step = step_graph(block, CLASSES, sgd(), shape, torch.float32, forms)
        sized, _ = at_batch(step.model, BATCH)
        mine = Counter(n.op_type for n in _unfolded(sized, {i.name for i in sized.graph.initializer}))
        assert mine == left_by_the_runtime(step.model, tmp_path / f"{number}.onnx", monkeypatch)
        assert not {"Shape", "Size"}.intersection(mine)


def test_zeros_for_max_pooling_are_no_constants_of_a_session() -> None:
    network, shape = network_of("vgg11")
    block = build(network, 2, "auglocal")[0]
    folded = {
        forms: folded_bytes(step_graph(block, CLASSES, sgd(), shape, torch.float32, forms).model, BATCH)
        for forms in (CPU, CUDA)
    }
    assert folded[CPU] > 1 << 20, "a map of zeros for every pooling"
    assert folded[CUDA] < LEAST_FOLDED


def test_fills_that_are_computed_are_the_same_numbers() -> None:
    class Mixed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            ones, halves = torch.ones_like(x), torch.full_like(x, 0.5)
            return torch.where(torch.full_like(x, True, dtype=torch.bool), x * ones + halves, -x)

    model = check(Mixed(), (3, 5), forms=CUDA)
    assert "Less" in op_types(model)
    check(nn.Sequential(nn.MaxPool2d(3, 2, 1), nn.Flatten()), (2, 9, 7), forms=CUDA)


def test_choices_among_truths_are_logic() -> None:
    def body(x: Tensor) -> Tensor:
        low, high = x < 0.5, x > -0.5
        chosen = torch.where(x > 0, low, high)
        return x * torch.maximum(chosen, low) + torch.minimum(low, high) * (low * high)

    model = check(Function(body), (3, 4))
    assert {"And", "Or", "Not"} <= op_types(model)
    assert strays(model, BATCH) == ()


def request(**options: Any) -> ExportRequest:
    return make_request("mlp", ExportOptions(input_shape="6", batch=BATCH, **options))


class Ranks(nn.Module):
    """Uses the largest of whole numbers, which the CUDA provider cannot find."""

    def forward(self, x: Tensor) -> Tensor:
        return x * (1 + (8 * x).long().argmax(1, keepdim=True))


def test_an_operator_without_kernel_is_named_with_its_module() -> None:
    body = nn.Sequential(nn.Linear(6, 8), nn.Sequential(nn.ReLU(), Ranks()), nn.Linear(8, 10))
    block = build(from_module(body, "ranks", (6,), 10), 1, "bp")[0]
    given = request(target="cuda")
    graph = training_graph("step", block, given, (6,), torch.float32, "cuda")
    guard = Guard(block, given, (6,), torch.float32)
    with pytest.raises(ExportError) as caught:
        guard.check("step", optimise(graph, BATCH).model, graph.origins)
    said = str(caught.value)
    assert "(Ranks) uses aten.argmax.default: in step.onnx the ONNX operator ArgMax has no kernel for int64" in said
    assert "would run on the CPU; replace it in the network, or export with --target cpu" in said


class WholeProduct(nn.Module):
    """A matrix product of whole numbers, behind a linear layer that is one of floats."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        self.product = Product()

    def forward(self, x: Tensor) -> Tensor:
        return self.product(self.linear(x))


class Product(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + ((8 * x).long() @ torch.eye(8, dtype=torch.long))


def test_the_module_is_the_one_whose_operand_has_no_kernel() -> None:
    block = build(from_module(nn.Sequential(WholeProduct(), nn.Linear(8, 10)), "products", (8,), 10), 1, "bp")[0]
    given = request(target="cuda")
    graph = training_graph("step", block, given, (8,), torch.float32, "cuda")
    with pytest.raises(ExportError, match=r"\(Product\) uses aten.mm.default: .* MatMul has no kernel for int64"):
        Guard(block, given, (8,), torch.float32).check("step", optimise(graph, BATCH).model, graph.origins)


@pytest.mark.parametrize("dtype", [torch.int8, torch.float16])
def test_a_type_that_no_graph_has_is_refused(dtype: torch.dtype) -> None:
    class Narrow(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * (4 * x).to(dtype).float()

    block = build(from_module(nn.Sequential(Narrow(), nn.Linear(6, 10)), "narrow", (6,), 10), 1, "bp")[0]
    with pytest.raises(ExportError, match=rf"\(Narrow\) uses aten._to_copy.default: to {dtype}"):
        training_graph("step", block, request(), (6,), torch.float32, "cpu")


def model_of(node: onnx.NodeProto, dtype: int, *constants: np.ndarray[Any, Any]) -> onnx.ModelProto:
    """A graph of one node on x (N, 2, 3, 4), with constants behind it."""
    names = [f"c{i}" for i in range(len(constants))]
    node.input[:] = ["x", *names]
    values = [numpy_helper.from_array(value, name) for value, name in zip(constants, names, strict=True)]
    x = helper.make_tensor_value_info("x", dtype, ["N", 2, 3, 4])
    y = helper.make_empty_tensor_value_info("y")
    graph = helper.make_graph([node], "one", [x], [y], values)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    return onnx.shape_inference.infer_shapes(model)


WEIGHT = np.zeros((2, 2, 3, 3), np.float32)
PADS = np.array([0, 0, 0, 0, 0, 0, 1, 1], np.int64)
TRAPS: list[tuple[str, onnx.ModelProto, str]] = [
    (
        "pads that differ",
        model_of(helper.make_node("ConvTranspose", ["x"], ["y"], pads=[0, 0, 1, 1]), TensorProto.FLOAT, WEIGHT),
        "pads that are not symmetric",
    ),
    (
        "pads from the runtime",
        model_of(helper.make_node("ConvTranspose", ["x"], ["y"], auto_pad="SAME_UPPER"), TensorProto.FLOAT, WEIGHT),
        "pads that are not symmetric",
    ),
    ("int64 Pad", model_of(helper.make_node("Pad", ["x"], ["y"]), TensorProto.INT64, PADS), "no kernel for int64"),
    ("bool Max", model_of(helper.make_node("Max", ["x"], ["y"]), TensorProto.BOOL), "no kernel for bool"),
    ("no kernel", model_of(helper.make_node("Mish", ["x"], ["y"]), TensorProto.FLOAT), "has no kernel"),
    (
        "the last maximum",
        model_of(helper.make_node("ArgMax", ["x"], ["y"], select_last_index=1), TensorProto.FLOAT),
        "the last of equal values",
    ),
    ("text", model_of(helper.make_node("Cast", ["x"], ["y"], to=TensorProto.STRING), TensorProto.FLOAT), "casts to"),
]


@pytest.mark.parametrize(("model", "reason"), [row[1:] for row in TRAPS], ids=[row[0] for row in TRAPS])
def test_traps(model: onnx.ModelProto, reason: str) -> None:
    found = strays(model, 4)
    assert len(found) == 1
    assert reason in found[0].reason


def test_a_size_that_depends_on_values_is_found() -> None:
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 2])
    k = helper.make_tensor_value_info("k", TensorProto.INT64, [1])
    nodes = [
        helper.make_node("Add", ["k", "one"], ["size"]),
        helper.make_node("Tile", ["x", "both"], ["y"]),
        helper.make_node("Concat", ["size", "one"], ["both"], axis=0),
    ]
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 2])
    one = numpy_helper.from_array(np.array([1], np.int64), "one")
    graph = helper.make_graph([nodes[0], nodes[2], nodes[1]], "sizes", [x, k], [y], [one])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    assert [(s.operator, s.reason) for s in strays(model, 4)] == [
        ("Tile", "waits for a size that depends on the values of a tensor")
    ]
