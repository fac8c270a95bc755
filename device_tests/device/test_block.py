"""A block against numpy: the step of the dropout bundle is worked out by hand, with its gradients and AdamW."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from device_tests.device.runs import DROPOUT, RESIDUAL, assert_same_bits
from edgelocal.bundle.folder import open_bundle
from edgelocal.data.augment import bernoulli_mask
from edgelocal.errors import DivergedError
from edgelocal.runtime.block import Block
from edgelocal.runtime.graphs import GraphPool
from edgelocal.runtime.pages import PageFile
from edgelocal.runtime.tensor import Tensor
from edgelocal.storage.tensors import Array

HYPER = {"lr": 0.01, "beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01}
W, B, A, C = "0.weight", "0.bias", "aux/00/1.weight", "aux/00/1.bias"
KEEP, SEED = 0.75, 3


def block(folder: Any = DROPOUT, index: int = 0) -> Block:
    bundle = open_bundle(folder)
    return Block(bundle, index, GraphPool(bundle, 1))


def batch(size: int, seed: int = 0) -> tuple[Array, Array]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=(size, 12)).astype(np.float32), rng.integers(0, 4, size)


def step(trained: Block, x: Array, y: Array, number: int = 0, **changes: float) -> Any:
    return trained.step(Tensor.of(x), Tensor.of(y), {**HYPER, **changes}, SEED, number)


def copied(trained: Block) -> dict[str, Array]:
    return {name: array.copy() for name, array in trained.state().items()}


def hidden(p: dict[str, Array], x: Array) -> Array:
    return np.maximum(x @ p[W].T + p[B], 0)


def loss_and_gradients(p: dict[str, Array], x: Array, y: Array, mask: Array) -> tuple[float, dict[str, Array], Array]:
    """Mean cross-entropy of block 00 through its auxiliary, gradients by name, logits; float64, from the formulas."""
    h = hidden(p, x) * mask / KEEP
    logits = h @ p[A].T + p[C]
    e = np.exp(logits - logits.max(axis=1, keepdims=True))
    q = e / e.sum(axis=1, keepdims=True)
    loss = -np.log(q[np.arange(len(y)), y]).mean()
    d = (q - np.eye(4)[y]) / len(y)
    dz = (d @ p[A]) * mask / KEEP * (hidden(p, x) > 0)
    return float(loss), {W: dz.T @ x, B: dz.sum(0), A: d.T @ h, C: d.sum(0)}, logits


def adamw(p: Array, g: Array, m: Array, v: Array, t: int) -> tuple[Array, Array, Array]:
    """Loshchilov and Hutter's AdamW, step t from 1: decay, then the bias-corrected update."""
    m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g * g
    update = m / (1 - 0.9**t) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
    return p * (1 - 0.01 * 0.01) - 0.01 * update, m, v


def test_the_initial_state_is_the_bundles_weights_and_zeros() -> None:
    found = block()
    weights = found.bundle.weights(found.spec)
    for name, array in found.state().items():
        assert np.array_equal(array, np.zeros_like(array) if name.startswith("opt/") else weights[name])


def test_steps_equal_the_formulas() -> None:
    found = block()
    p = {n: found.state()[f"param/{n}"].astype(np.float64) for n in (W, B, A, C)}
    moments = {n: (np.zeros_like(a), np.zeros_like(a)) for n, a in p.items()}
    for number in range(5):
        x, y = batch(9, number)
        mask = bernoulli_mask((9, 24), KEEP, SEED, number, 0)
        loss, gradients, logits = loss_and_gradients(p, x.astype(np.float64), y, mask)
        inference_free = hidden(p, x) * mask / KEEP
        result = step(found, x, y, number)
        assert result.loss == pytest.approx(loss, rel=1e-5)
        assert result.metric == (logits.argmax(1) == y).sum()
        np.testing.assert_allclose(result.h.array(), inference_free, rtol=1e-4, atol=1e-5)
        for name, gradient in gradients.items():
            p[name], *new = adamw(p[name], gradient, *moments[name], number + 1)
            moments[name] = (new[0], new[1])
            for slot, expected in (("param", p[name]), ("opt/m", new[0]), ("opt/v", new[1])):
                array = found.state()[f"{slot}/{name}"]
                np.testing.assert_allclose(array, expected, rtol=1e-3, atol=2e-5 * np.abs(expected).max())
    assert found.state()["opt/step"] == 5


@pytest.mark.parametrize("size", [1, 7, 32])
def test_forward_and_head_equal_the_formulas_at_any_batch(size: int) -> None:
    found = block()
    x, _ = batch(size)
    p = {n: found.state()[f"param/{n}"] for n in (W, B, A, C)}
    h = found.forward(Tensor.of(x))
    np.testing.assert_allclose(h.array(), hidden(p, x), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(found.head(h).array(), hidden(p, x) @ p[A].T + p[C], rtol=1e-5, atol=1e-6)


def test_the_last_block_puts_out_logits_itself() -> None:
    last = block(index=1)
    h = Tensor.of(np.ones((2, 4), np.float32))
    assert last.spec.head is None
    assert last.head(h) is h


@pytest.mark.parametrize("number", [0, 1])
def test_inference_changes_no_state(number: int) -> None:
    found = block(RESIDUAL, number)
    before = copied(found)
    shape = found.spec.forward.inputs[0].resolve(3)
    found.head(found.forward(Tensor.of(np.ones(shape, np.float32))))
    assert_same_bits(before, found.state())


def test_masks_depend_on_seed_step_and_block_alone() -> None:
    x, y = batch(16)
    first, again, later = (step(block(), x, y, number).h.array() for number in (4, 4, 5))
    assert first.tobytes() == again.tobytes()
    assert (first != later).any()


def test_a_loss_that_is_not_finite_leaves_the_state_as_it_was() -> None:
    found = block()
    x, y = batch(8)
    step(found, x, y)
    before = copied(found)
    x[0, 0] = np.inf
    with pytest.raises(DivergedError, match=r"block 00: the loss became nan at step 2; the last checkpoint is kept"):
        step(found, x, y, 1)
    assert_same_bits(before, found.state())


def test_a_released_block_goes_on_with_its_state() -> None:
    kept, released = block(RESIDUAL), block(RESIDUAL)
    x = np.random.default_rng(0).normal(size=(8, 1, 8, 8)).astype(np.float32)
    hyper = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-4}
    for number in range(3):
        for trained in (kept, released):
            trained.step(Tensor.of(x), Tensor.of(np.arange(8) % 4), hyper, SEED, number)
        released.release()
    assert_same_bits(kept.state(), released.state())
    assert kept.state()["buf/parts.a.bn1.num_batches_tracked"] == 3


def test_a_paged_state_is_read_when_the_graph_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """To load a graph may mean to drop others: until then the state is not in memory beside them."""
    bundle = open_bundle(DROPOUT)
    found, said = (
        Block(
            bundle,
            0,
            GraphPool(bundle, 1),
            page=PageFile(tmp_path / "cache" / "state-00", bundle.manifest.blocks[0].state()),
        ),
        [],
    )
    for kind, name in ((GraphPool, "get"), (PageFile, "read")):
        plain = getattr(kind, name)

        def noted(*given: Any, plain: Any = plain, name: str = name) -> Any:
            said.append(name)
            return plain(*given)

        monkeypatch.setattr(kind, name, noted)
    x, y = batch(8)
    step(found, x, y)
    found.forward(Tensor.of(x))
    assert said == ["get", "read", "get", "get", "read"]


def test_a_rate_of_zero_changes_moments_but_no_parameter() -> None:
    found = block()
    before = copied(found)
    step(found, *batch(8), lr=0.0)
    after = found.state()
    assert_same_bits(*({n: a for n, a in s.items() if n.startswith("param/")} for s in (before, after)))
    assert np.abs(after[f"opt/m/{A}"]).max() > 0
