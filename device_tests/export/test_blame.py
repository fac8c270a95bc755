"""What cannot be exported says which module of the user's network it is, which operator, and why."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from device_tests.export.helpers import Function
from edgelocal.bundle.spec import RuleSpec, TaskSpec
from edgelocal.errors import ExportError
from edgelocal.exporters.onnx_inference import forward_graph, head_graph
from edgelocal.exporters.onnx_step import step_graph
from edgelocal.exporters.optimizers import sgd
from edgelocal.exporters.rules import LocalBlock, build_blocks
from edgelocal.exporters.structure import structure
from edgelocal.exporters.zoo.custom import from_module

TASK = TaskSpec("cross_entropy", 4, 0.0, ())
Shaped = Callable[[Tensor], Tensor]


class Layer(nn.Module):
    """A linear layer and something `fancy` behind it."""

    def __init__(self, fancy: nn.Module) -> None:
        super().__init__()
        self.linear = nn.Linear(9, 9)
        self.fancy = fancy

    def forward(self, x: Tensor) -> Tensor:
        """(N, 9) -> (N, 9)."""
        out: Tensor = self.fancy(self.linear(x))
        return out


class Stack(nn.Module):
    """Layers under a name, and a head."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(9, 4)

    def edgelocal_units(self) -> list[tuple[str, nn.Module]]:
        """Every layer is a unit."""
        return [*((f"layers.{i}", layer) for i, layer in enumerate(self.layers)), ("head", self.head)]

    def forward(self, x: Tensor) -> Tensor:
        """(N, 9) -> (N, 4)."""
        for layer in self.layers:
            x = layer(x)
        out: Tensor = self.head(x)
        return out


def blocks(module: nn.Module, rule: str = "linear", shape: tuple[int, ...] = (9,)) -> tuple[LocalBlock, ...]:
    """The first unit as a block of its own, the rest as another."""
    network = from_module(module, "net", shape, 4)
    cut = (range(1), range(1, len(network.units))) if len(network.units) > 1 else (range(1),)
    return build_blocks(network, RuleSpec(rule, 1, 0.5, 1, "all"), cut, seed=0)


def message(block: LocalBlock) -> str:
    with pytest.raises(ExportError) as caught:
        step_graph(block, TASK, sgd(), (9,), torch.float32)
    assert caught.value.exit_code == 2
    return str(caught.value)


def sorted_rows(x: Tensor) -> Tensor:
    return x.sort(1).values


def inverse(x: Tensor) -> Tensor:
    return torch.linalg.inv(x.view(-1, 3, 3) + 9 * torch.eye(3)).flatten(1)


def spectrum(x: Tensor) -> Tensor:
    return torch.fft.fft(x).real


def halves(x: Tensor) -> Tensor:
    return x.view(2, -1, 9).flip(2).reshape(-1, 9)


def large_batches(x: Tensor) -> Tensor:
    return x * 2 if x.shape[0] > 4 else x


@pytest.mark.parametrize(
    ("function", "operator"),
    [
        (sorted_rows, "aten.sort"),
        (inverse, "aten.linalg_inv"),
        (spectrum, "aten._fft"),
        (halves, "aten.view"),
        (large_batches, "test_blame.py"),
    ],
    ids=["sort", "inverse", "fourier", "fixed batch", "branch on the batch"],
)
def test_operator_and_module_are_named(function: Shaped, operator: str) -> None:
    _, second = blocks(Stack(Layer(nn.Tanh()), Layer(nn.Tanh()), Layer(nn.Sequential(nn.Tanh(), Function(function)))))
    text = message(second)
    assert text.startswith("module layers.2.fancy.1 (Function) ")
    assert operator in text


def test_the_batch_is_said_to_be_the_trouble() -> None:
    _, second = blocks(Stack(Layer(nn.Tanh()), Layer(Function(large_batches))))
    assert "branches on the batch size (N = 2 is not N > 4)" in message(second)


def test_names_in_a_plain_sequential_are_its_own() -> None:
    """Parameter-free children join the unit before them, but keep the name the user knows."""
    network = nn.Sequential(
        nn.Linear(9, 9), nn.ReLU(), nn.Linear(9, 9), nn.ReLU(), Function(sorted_rows), nn.Linear(9, 4)
    )
    assert message(blocks(network)[1]).startswith("module 4 (Function) uses aten.sort.default")


def test_code_outside_of_any_submodule_is_that_of_its_unit() -> None:
    class Sorting(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            """(N, 9) -> (N, 9)."""
            return sorted_rows(super().forward(x))

    assert message(blocks(Stack(Layer(nn.Tanh()), Sorting(9, 9)))[1]).startswith("module layers.1 (Sorting) ")


def test_an_operator_in_the_head() -> None:
    network = Stack(Layer(nn.Tanh()), Layer(nn.Tanh()))
    network.head = nn.Sequential(Function(sorted_rows), nn.Linear(9, 4))
    assert message(blocks(network)[1]).startswith("module head.0 (Function) uses aten.sort")


def test_an_auxiliary_is_named_as_one() -> None:
    (block,) = blocks(nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 4)), "bp")
    original = from_module(Stack(Layer(nn.Tanh()), Layer(nn.Tanh())), "net", (9,), 4)
    block = LocalBlock("03", original, range(1), nn.Sequential(nn.Linear(9, 4), Function(sorted_rows)))
    assert message(block).startswith("module aux/03/1 (Function) uses aten.sort.default")
    with pytest.raises(ExportError, match=r"module aux/03/1 \(Function\) uses aten\.sort"):
        head_graph(block, (9,))


def test_an_operator_that_only_the_inference_graph_has() -> None:
    class Later(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            """Sorts when it is used, not when it is trained."""
            return x if self.training else sorted_rows(x)

    _, second = blocks(Stack(Layer(nn.Tanh()), Layer(Later())))
    step_graph(second, TASK, sgd(), (9,), torch.float32)
    with pytest.raises(ExportError, match=r"module layers\.1\.fancy \(Later\) uses aten\.sort"):
        forward_graph(second, (9,), torch.float32)


def test_data_dependent_code_is_refused_with_the_unit() -> None:
    network = Stack(Layer(nn.Tanh()), Layer(Function(lambda x: x if x.sum() > 0 else -x)))
    with pytest.raises(ExportError, match=r"piece 1 \(Layer\).*_local_scalar_dense"):
        from_module(network, "net", (9,), 4)


def test_blame_leaves_the_network_as_it_was() -> None:
    layer = nn.Sequential(nn.Linear(9, 9), nn.BatchNorm1d(9), Function(sorted_rows))
    _, second = blocks(Stack(Layer(nn.Tanh()), layer))
    before = {name: tensor.clone() for name, tensor in second.state_dict().items()}
    assert "aten.sort" in message(second)
    assert all(torch.equal(tensor, second.state_dict()[name]) for name, tensor in before.items())
    assert not any(part._forward_pre_hooks for part in second.modules())


class Shifted(nn.Module):
    """Adds a tensor kept in a plain attribute: a constant of the graph."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.linear = nn.Linear(9, 9)
        self.by = torch.full((9,), by)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 9) -> (N, 9)."""
        out: Tensor = self.linear(x) + self.by
        return out


def test_blocks_with_other_constants_do_not_share_a_trace() -> None:
    equal, other = (structure((Shifted(1.0), None)) == structure((Shifted(by), None)) for by in (1.0, 2.0))
    assert (equal, other) == (True, False)
