"""The updates against torch.optim in float64, and inside step graphs over many steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from device_tests.export import helpers
from edgelocal.bundle.spec import OptimizerSpec, RuleSpec, TaskSpec
from edgelocal.errors import ExportError
from edgelocal.exporters.onnx_step import step_graph
from edgelocal.exporters.optimizers import Optimizer, adamw, make_optimizer, sgd
from edgelocal.exporters.partition import partition
from edgelocal.exporters.rules import LocalBlock, build_blocks
from edgelocal.exporters.zoo.custom import from_module

OPTIMIZERS = {
    "plain sgd": sgd(0.0, 0.0, nesterov=False),
    "momentum": sgd(0.9, 0.0, nesterov=False),
    "momentum and decay": sgd(0.8, 1e-2, nesterov=False),
    "nesterov": sgd(0.9, 0.0, nesterov=True),
    "nesterov and decay": sgd(0.7, 1e-2, nesterov=True),
    "decay alone": sgd(0.0, 1e-2, nesterov=False),
    "adamw": adamw(),
    "adamw, other numbers": adamw((0.8, 0.95), 1e-4, 0.1),
}
NAMES = list(OPTIMIZERS)


def by_update(optimizer: Optimizer, start: Tensor, gradients: list[Tensor], rates: list[float]) -> Tensor:
    """The updates one after the other, as functions."""
    p, slots = start, {slot: torch.zeros_like(start) for slot in optimizer.slots}
    for number, (g, lr) in enumerate(zip(gradients, rates, strict=True), start=1):
        hyper = {"lr": lr, **optimizer.hyper} | ({"step": float(number)} if optimizer.counts_steps else {})
        tensors = {name: torch.tensor(value, dtype=start.dtype) for name, value in hyper.items()}
        p, slots = optimizer.update(p, g, slots, tensors)
    return p


def by_torch(optimizer: Optimizer, start: Tensor, gradients: list[Tensor], rates: list[float]) -> Tensor:
    """The same with PyTorch's optimizer."""
    parameter = nn.Parameter(start.clone())
    own = optimizer.reference([parameter])
    for g, lr in zip(gradients, rates, strict=True):
        parameter.grad = g.clone()
        own.param_groups[0]["lr"] = lr
        own.step()
    return parameter.detach()


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=30)
@given(st.integers(0, 2**32 - 1), st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_updates_are_those_of_pytorch_with_any_learning_rates(name: str, seed: int, rates: list[float]) -> None:
    generator = torch.Generator().manual_seed(seed)
    start, *gradients = (torch.randn(5, generator=generator, dtype=torch.float64) for _ in range(len(rates) + 1))
    found = by_update(OPTIMIZERS[name], start, gradients, rates)
    torch.testing.assert_close(found, by_torch(OPTIMIZERS[name], start, gradients, rates), rtol=1e-10, atol=1e-12)


TASK = TaskSpec("mse", 2, 0.0, ())


def quadratic() -> LocalBlock:
    """Smooth, so that float32 stays close to float64 for many steps."""
    torch.manual_seed(0)
    network = from_module(nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)), "quadratic", (4,), 2)
    cut = partition(network, blocks=1, rule="bp", depth=1, tail="merge")
    return build_blocks(network, RuleSpec("bp", 1, 0.5, 1, "merge"), cut, seed=0)[0]


def parameters(block: LocalBlock) -> helpers.Arrays:
    return {f"param/{block.tensor_names()[n]}": p.detach().numpy().copy() for n, p in block.named_parameters()}


@pytest.mark.parametrize("name", NAMES)
def test_twenty_steps_inside_a_graph(name: str) -> None:
    optimizer, block = OPTIMIZERS[name], quadratic()
    exported = step_graph(block, TASK, optimizer, (4,), torch.float32)
    session = helpers.session(exported.model)
    state = {t.name: np.zeros(t.resolve(1), np.float32) for t in exported.inputs if t.kind == "opt"}
    state |= parameters(block)
    block.double()
    reference = optimizer.reference(list(block.parameters()))
    rng = np.random.default_rng(0)
    for step in range(20):
        lr = 0.05 / (1 + step)
        x, y = rng.standard_normal((6, 4), dtype=np.float32), rng.standard_normal((6, 2), dtype=np.float32)
        numbers = {n: np.asarray(v, np.float32) for n, v in {"lr": lr, **optimizer.hyper}.items()}
        values = session.run(None, {"x": x, "y": y, **numbers, **state})
        found = dict(zip([t.name for t in exported.outputs], values, strict=True))
        state = {name: found[f"new/{name}"] for name in state}
        reference.zero_grad()
        ((block(torch.from_numpy(x).double())[0] - torch.from_numpy(y)) ** 2).mean().backward()
        reference.param_groups[0]["lr"] = lr
        reference.step()
    for local, parameter in block.named_parameters():
        expected = parameter.detach().numpy()
        np.testing.assert_allclose(state[f"param/{block.tensor_names()[local]}"], expected, rtol=1e-4, atol=1e-5)
    if optimizer.counts_steps:
        assert state["opt/step"] == 20


def test_hyper_parameters_are_inputs_that_can_change() -> None:
    """The defaults of the manifest are not baked in: other numbers give the update of an optimizer made with them."""
    block = quadratic()
    exported = step_graph(block, TASK, sgd(), (4,), torch.float32)
    session, other = helpers.session(exported.model), sgd(0.5, 0.1, nesterov=True)
    own = parameters(block)
    slots = {t.name: np.full(t.resolve(1), 0.3, np.float32) for t in exported.inputs if t.kind == "opt"}
    feeds = {"x": np.ones((2, 4), np.float32), "y": np.zeros((2, 2), np.float32), **own, **slots}
    feeds |= {n: np.asarray(v, np.float32) for n, v in {"lr": 0.2, **other.hyper}.items()}
    values = dict(zip([t.name for t in exported.outputs], session.run(None, feeds), strict=True))
    (block(torch.ones(2, 4))[0] ** 2).mean().backward()
    for (_, parameter), (name, p) in zip(block.named_parameters(), own.items(), strict=True):
        g = parameter.grad.numpy() + 0.1 * p
        m = 0.5 * 0.3 + g
        np.testing.assert_allclose(values[f"new/{name}"], p - 0.2 * (g + 0.5 * m), rtol=1e-5, atol=1e-6)


def test_the_manifest_says_what_the_graph_takes() -> None:
    assert sgd(0.5, 0.1).spec() == OptimizerSpec("sgd-nesterov", {"momentum": 0.5, "weight_decay": 0.1})
    assert sgd(0.5, 0.1, nesterov=False).spec().name == "sgd"
    assert adamw().spec().hyper == {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 1e-2}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("lion", None, None, True), "there is no optimizer 'lion'; choose sgd or adamw"),
        (("sgd", -0.1, None, True), "momentum is -0.1; give a finite number of at least 0"),
        (("adamw", None, float("nan"), True), "weight decay is nan"),
    ],
)
def test_bad_settings_are_refused(arguments: tuple[str, float | None, float | None, bool], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        make_optimizer(*arguments)
