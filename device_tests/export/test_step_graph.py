"""Step graphs: the contract of their inputs and outputs, any batch from one graph, isolation, the forward graphs."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from parity_training import Graphs, eager_step, initial
from torch import Tensor, nn

from device_tests.export.helpers import Array, Arrays, op_types, session
from edgelocal.bundle.spec import RuleSpec, TaskSpec
from edgelocal.errors import ExportError
from edgelocal.exporters import losses
from edgelocal.exporters.onnx_inference import forward_graph, head_graph
from edgelocal.exporters.onnx_step import ExportedGraph, step_graph
from edgelocal.exporters.optimizers import adamw, sgd
from edgelocal.exporters.oracle import Oracle
from edgelocal.exporters.partition import partition
from edgelocal.exporters.rules import LocalBlock, build_blocks
from edgelocal.exporters.units import Network, load_network
from edgelocal.exporters.zoo.custom import from_module

SHAPE = (3, 16, 16)
LARGEST_INITIALIZER_BYTES = 4096
TASK = TaskSpec("cross_entropy", 10, 0.0, ())


def blocks_of(network: Network, blocks: int, rule: str = "auglocal") -> tuple[LocalBlock, ...]:
    spec = RuleSpec(rule, 1, 0.5, 1, "merge")
    return build_blocks(network, spec, partition(network, blocks=blocks, rule=rule, depth=1, tail="merge"), seed=0)


@pytest.fixture(scope="module")
def network() -> Network:
    return load_network("resnet8", SHAPE, 10, seed=0)


@pytest.fixture(scope="module")
def blocks(network: Network) -> tuple[LocalBlock, ...]:
    return blocks_of(network, 3)


@pytest.fixture(scope="module")
def exported(blocks: tuple[LocalBlock, ...]) -> Graphs:
    return Graphs(blocks, sgd(), SHAPE)


@pytest.fixture
def graphs(exported: Graphs, blocks: tuple[LocalBlock, ...]) -> Graphs:
    """Untrained."""
    exported.state = [initial(b, g) for b, g in zip(blocks, exported.graphs, strict=True)]
    return exported


def sample(batch: int, seed: int = 0) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((batch, *SHAPE), dtype=np.float32), rng.integers(0, 10, batch)


def names(infos: Sequence[onnx.ValueInfoProto]) -> list[str]:
    return [info.name for info in infos]


def test_inputs_and_outputs_are_in_the_order_of_the_contract(graphs: Graphs, blocks: tuple[LocalBlock, ...]) -> None:
    for block, exported in zip(blocks, graphs.graphs, strict=True):
        own = block.tensor_names()
        trained = [own[n] for n, _ in block.named_parameters()]
        state = [f"param/{n}" for n in trained] + [f"opt/momentum/{n}" for n in trained]
        state += [f"buf/{own[n]}" for n, _ in block.named_buffers()]
        graph = exported.model.graph
        assert names(graph.input) == ["x", "y", "lr", "momentum", "weight_decay", *state]
        assert names(graph.output) == ["h", "loss", "correct", *(f"new/{name}" for name in state)]
        assert names(graph.input) == [t.name for t in exported.inputs]
        assert names(graph.output) == [t.name for t in exported.outputs]


def test_names_are_those_of_the_original_module(graphs: Graphs, network: Network) -> None:
    found = [t.name for g in graphs.graphs for t in g.inputs if t.kind in ("param", "buf")]
    own = {n.partition("/")[2] for n in found if "/aux/" not in n}
    assert own == set(network.module.state_dict())
    assert {n.split("/")[2] for n in found if "/aux/" in n} == {"00", "01"}
    assert len(found) == len(set(found))


def test_shapes_are_declared_with_a_free_batch(graphs: Graphs) -> None:
    for exported in graphs.graphs:
        for info, spec in zip(exported.model.graph.input, exported.inputs, strict=True):
            found = tuple(d.dim_param or d.dim_value for d in info.type.tensor_type.shape.dim)
            assert found == spec.shape
        free = [t.name for t in (*exported.inputs, *exported.outputs) if "N" in t.shape]
        assert free == ["x", "y", "h"]


def test_graphs_are_standard_onnx(graphs: Graphs) -> None:
    for exported in graphs.graphs:
        model = exported.model
        onnx.checker.check_model(model, full_check=True)
        assert [(o.domain, o.version <= 18) for o in model.opset_import] == [("", True)]
        assert model.ir_version <= 9
        assert {node.domain for node in model.graph.node} == {""}
        assert "BatchNormalization" not in op_types(model)
        assert not model.functions
        assert not any(node.op_type in ("If", "Loop", "Scan", "Dropout", "RandomNormal") for node in model.graph.node)


def test_weights_are_inputs_and_constants_are_small(graphs: Graphs) -> None:
    for exported in graphs.graphs:
        constants = exported.model.graph.initializer
        assert not {c.name for c in constants} & set(names(exported.model.graph.input))
        assert max(numpy_helper.to_array(c).nbytes for c in constants) <= LARGEST_INITIALIZER_BYTES
        assert all(not c.external_data for c in constants)


def test_exporting_again_gives_the_same_bytes(graphs: Graphs) -> None:
    again = blocks_of(load_network("resnet8", SHAPE, 10, seed=1), 3)
    second = step_graph(again[0], TASK, sgd(), SHAPE, torch.float32)
    first = graphs.graphs[0].model
    assert second.model.SerializeToString(deterministic=True) == first.SerializeToString(deterministic=True)


def test_a_parameter_is_updated_before_earlier_gradients_exist(graphs: Graphs) -> None:
    """So that no graph holds all gradients: the last layer's update does not wait for the first layer's gradient."""
    nodes = graphs.graphs[2].model.graph.node
    made = {output: index for index, node in enumerate(nodes) for output in node.output}
    order = ("fc.weight", "layer3.0.conv2.weight", "layer3.0.conv1.weight")
    when = [made[f"new/opt/momentum/{n}"] for n in order]
    assert when == sorted(when)
    readers = [i for i, node in enumerate(nodes) if "param/layer3.0.conv1.weight" in node.input]
    assert when[0] < readers[-2]  # of the weight's readers the last is its own update


@functools.cache
def untrained(name: str, rule: str) -> tuple[tuple[LocalBlock, ...], Graphs]:
    blocks = blocks_of(load_network(name, SHAPE, 10, seed=0), 3, rule)
    return blocks, Graphs(blocks, sgd(), SHAPE)


@pytest.mark.parametrize("batch", [1, 7, 32])
@pytest.mark.parametrize(
    ("name", "rule"), [("resnet8", "linear"), ("resnet8", "auglocal"), ("mlp", "auglocal"), ("vit", "auglocal")]
)
def test_any_batch_from_one_graph(name: str, rule: str, batch: int) -> None:
    blocks, graphs = untrained(name, rule)
    graphs.state = [initial(b, g) for b, g in zip(blocks, graphs.graphs, strict=True)]
    x, y = sample(batch)
    found = graphs.step(x, y, 0.01)
    assert [outputs["h"].shape[0] for outputs in found] == [batch] * 3
    if (name, rule, batch) == ("resnet8", "auglocal", 1):
        return  # the auxiliary heads have a batch norm of features, for which PyTorch refuses a batch of one
    oracle = Oracle(copy.deepcopy(list(blocks)), TASK, graphs.optimizer.reference, torch.float64)
    expected = eager_step(oracle, x, y, 0.01)
    for block, outputs, loss in zip(oracle.blocks, found, expected, strict=True):
        assert outputs["loss"] == pytest.approx(loss, rel=1e-5)
        for key, value in block.state_dict().items():
            if "running" in key:
                new = outputs[f"new/buf/{block.tensor_names()[key]}"]
                np.testing.assert_allclose(new, value.numpy(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["resnet8", "mlp", "vit"])
def test_a_block_does_not_depend_on_later_ones_bit_for_bit(name: str) -> None:
    blocks, graphs = untrained(name, "auglocal")
    start = [initial(b, g) for b, g in zip(blocks, graphs.graphs, strict=True)]
    graphs.state = [dict(state) for state in start]
    x, y = sample(8)
    before = graphs.step(x, y, 0.01)
    rng = np.random.default_rng(1)
    for changed in (1, 2):
        graphs.state = [dict(state) for state in start]
        graphs.state[changed] = {
            name: array + rng.standard_normal(array.shape).astype(np.float32) if name.startswith("param/") else array
            for name, array in start[changed].items()
        }
        after = graphs.step(x, y, 0.01)
        same = [all(a.tobytes() == after[k][n].tobytes() for n, a in before[k].items()) for k in range(3)]
        assert same == [k < changed for k in range(3)]


def test_a_step_repeats_bit_for_bit(graphs: Graphs) -> None:
    x, y = sample(8)
    first, second = (graphs.run(1, graphs.run(0, x, y, 0.1)["h"], y, 0.1) for _ in range(2))
    assert all(first[name].tobytes() == second[name].tobytes() for name in first)


def run_inference(graph: ExportedGraph, x: Array, state: Arrays) -> Array:
    feeds = {graph.inputs[0].name: x, **{t.name: state[t.name] for t in graph.inputs[1:]}}
    result: Array = session(graph.model).run(None, feeds)[0]
    return result


def test_forward_and_head_graphs_are_the_modules_in_inference_mode(graphs: Graphs) -> None:
    # Fresh blocks after one step, so that the running statistics are not 0 and 1.
    own = blocks_of(load_network("resnet8", SHAPE, 10, seed=0), 3)
    x, y = sample(5)
    graphs.step(x, y, 0.01)
    h, expected = x, torch.from_numpy(x)
    for block, state in zip(own, graphs.state, strict=True):
        local = {name: key for key, name in block.tensor_names().items()}
        tensors = {n.partition("/")[2]: torch.from_numpy(a) for n, a in state.items() if not n.startswith("opt/")}
        block.load_state_dict({local[name]: tensor for name, tensor in tensors.items()})
        with torch.no_grad():
            expected, logits = block.eval()(expected)
        shape = h.shape[1:]
        h = run_inference(forward_graph(block, shape, torch.float32), h, state)
        np.testing.assert_allclose(h, expected.numpy(), rtol=1e-4, atol=1e-5)
        if block.auxiliary is not None:
            found = run_inference(head_graph(block, h.shape[1:]), h, state)
            np.testing.assert_allclose(found, logits.numpy(), rtol=1e-4, atol=1e-5)


class Dropping(nn.Module):
    """Linear, dropout, linear, with a name for each."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 5)
        self.drop = nn.Dropout(0.25)
        self.last = nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 6) -> (N, 4)."""
        out: Tensor = self.last(self.drop(self.first(x)))
        return out


def dropping() -> LocalBlock:
    torch.manual_seed(0)
    return blocks_of(from_module(Dropping(), "dropping", (6,), 4), 1, "bp")[0]


def test_masks_come_after_the_numbers_and_before_the_state() -> None:
    exported = step_graph(dropping(), TaskSpec("cross_entropy", 4, 0.0, ()), adamw(), (6,), torch.float32)
    kinds = [t.name.partition("/")[0] for t in exported.inputs]
    assert kinds[:8] == ["x", "y", "lr", "beta1", "beta2", "eps", "weight_decay", "rand"]
    assert [(m.name, m.keep) for m in exported.masks] == [("rand/0", 0.75)]
    assert (exported.inputs[7].shape, exported.inputs[7].dtype) == (("N", 5), "bool")
    slots = [t.name for t in exported.inputs if t.kind == "opt"]
    trained = ["first.weight", "first.bias", "last.weight", "last.bias"]
    assert slots == [*(f"opt/m/{n}" for n in trained), *(f"opt/v/{n}" for n in trained), "opt/step"]


def test_inference_has_no_masks() -> None:
    assert forward_graph(dropping(), (6,), torch.float32).masks == ()
    assert [t.kind for t in forward_graph(dropping(), (6,), torch.float32).inputs] == ["", *["param"] * 4]


@pytest.mark.parametrize(
    "task",
    [TaskSpec("bce", 4, 0.0, ()), TaskSpec("mse", 4, 0.0, ()), TaskSpec("cross_entropy", 4, 0.1, ())],
    ids=["bce", "mse", "smoothed"],
)
def test_every_loss_and_its_metric(task: TaskSpec) -> None:
    torch.manual_seed(0)
    block = blocks_of(from_module(nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)), "net", (6,), 4), 1, "bp")[
        0
    ]
    exported = step_graph(block, task, sgd(0.0, 0.0, nesterov=False), (6,), torch.float32)
    x = torch.randn(7, 6)
    y = torch.randint(0, 4, (7,)) if task.loss == "cross_entropy" else torch.randint(0, 2, (7, 4)).float()
    feeds = {"x": x.numpy(), "y": y.numpy(), **initial(block, exported)}
    feeds |= {name: np.asarray(v, np.float32) for name, v in {"lr": 0.5, "momentum": 0.0, "weight_decay": 0.0}.items()}
    values = session(exported.model).run(None, feeds)
    found = dict(zip([t.name for t in exported.outputs], values, strict=True))
    _, logits = block(x)
    loss = losses.loss(logits, y, task)
    loss.backward()
    assert found["loss"] == pytest.approx(loss.item(), rel=1e-5)
    ((metric, value),) = losses.metrics(logits.detach(), y, task).items()
    assert found[metric] == pytest.approx(value.item(), rel=1e-5)
    for local, parameter in block.named_parameters():
        new = (parameter - 0.5 * parameter.grad).detach().numpy()
        np.testing.assert_allclose(found[f"new/param/{block.tensor_names()[local]}"], new, rtol=1e-5, atol=1e-6)


def test_a_frozen_parameter_is_returned_as_it_was() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))
    module[0].weight.requires_grad_(False)
    block = blocks_of(from_module(module, "net", (6,), 4), 1, "bp")[0]
    exported = step_graph(block, TaskSpec("cross_entropy", 4, 0.0, ()), sgd(), (6,), torch.float32)
    assert "opt/momentum/0.weight" not in [t.name for t in exported.inputs]
    feeds = {"x": np.ones((2, 6), np.float32), "y": np.asarray([0, 3]), **initial(block, exported)}
    feeds |= {name: np.asarray(v, np.float32) for name, v in {"lr": 0.5, **sgd().hyper}.items()}
    values = session(exported.model).run(["new/param/0.weight", "new/param/0.bias"], feeds)
    np.testing.assert_array_equal(values[0], feeds["param/0.weight"])
    assert np.abs(values[1] - feeds["param/0.bias"]).max() > 1e-3


def test_a_dtype_no_bundle_holds_is_refused() -> None:
    module = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 4))
    network = from_module(module, "net", (6,), 4)
    module[0].register_buffer("table", torch.zeros(3, dtype=torch.float64))  # from_module refuses it with its own words
    block = blocks_of(network, 1, "bp")[0]
    with pytest.raises(ExportError, match=r"buf/0\.table has dtype float64; a bundle holds float32, int64 and bool"):
        step_graph(block, TaskSpec("cross_entropy", 4, 0.0, ()), sgd(), (6,), torch.float32)
