"""grad.onnx and apply.onnx: a batch in micro-batches is the step of the whole batch.

Compared with the step graph and with eager PyTorch in float64. Errors are those of the largest element of a tensor
(see `helpers.relative_errors`); gradients, the optimizer's slots and the changes of the parameters are all measured so.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from device_tests.export.accumulation import (
    APART,
    BATCH,
    JOINED,
    OPTIMIZERS,
    TASKS,
    blocks_of,
    dropping,
    eager,
    forms_of,
    sample,
    worst,
)
from device_tests.export.helpers import Arrays

SPLITS = ((12,), (6, 6), (5, 5, 2))


def same(found: Arrays, expected: Arrays, names: Sequence[str], tolerance: float) -> None:
    for name in names:
        np.testing.assert_allclose(found[name], expected[name], rtol=tolerance, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", APART)
def test_micro_batches_are_the_step_of_the_whole_batch(name: str, optimizer: str, split: tuple[int, ...]) -> None:
    assert not any("BatchNorm" in type(m).__name__ for block in blocks_of(name) for m in block.modules())
    x, y = sample()
    for own in forms_of(name, optimizer):
        data, state = {"x": x, "y": y}, own.initial()
        step, found = own.whole(data, state), own.parts(data, state, split)
        truth = eager(own, data, (BATCH,), torch.float64)
        assert worst(found, truth, state) <= 3e-5
        assert worst(found, step, state) <= 3e-5
        same(found, step, ["h", "loss"], 1e-5)
        assert found["correct"] == step["correct"]
        if "opt/step" in state:
            assert found["new/opt/step"] == 5
        x = step["h"]


@pytest.mark.parametrize("split", SPLITS, ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", JOINED)
def test_batch_norm_takes_each_micro_batch_for_itself(name: str, optimizer: str, split: tuple[int, ...]) -> None:
    """As eager PyTorch which accumulates: no error above 3e-5, or 10 times that of float32 where it has a larger one.

    ReLU's kinks and the variance of two samples magnify rounding; a wrong sum or statistic is an error of about 1.
    """
    x, y = sample()
    for own in forms_of(name, optimizer):
        data, state = {"x": x, "y": y}, own.initial()
        found, truth = own.parts(data, state, split), eager(own, data, split, torch.float64)
        usual = worst(eager(own, data, split, torch.float32), truth, state)
        assert worst(found, truth, state) <= min(max(3e-5, 10 * usual), 1e-2)
        running = [n for n in truth if n.startswith("new/buf/")]
        assert any("running_var" in n for n in running)
        same(found, truth, running, 1e-5)
        x = found["h"]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", [*APART, *JOINED])
def test_one_micro_batch_is_the_step_graph(name: str, optimizer: str) -> None:
    """Adding to zero and a share of one change nothing, to the last bit.

    Only where the runtime fuses a step graph's matrix product with the update, the update may be rounded otherwise.
    """
    x, y = sample()
    for own in forms_of(name, optimizer):
        data, state = {"x": x, "y": y}, own.initial()
        step, found = own.whole(data, state), own.parts(data, state, (BATCH,))
        for key in (k for k in step if not k.startswith(("new/param/", "new/opt/"))):
            np.testing.assert_array_equal(found[key], step[key], err_msg=key)
        assert worst(found, step, state) <= 2e-6
        x = step["h"]


splits = st.lists(st.integers(1, 9), min_size=1, max_size=6)


@settings(max_examples=40)
@given(split=splits, kind=st.sampled_from(sorted(TASKS)), seed=st.integers(0, 99))
def test_every_split_with_the_same_rows_of_the_masks(split: list[int], kind: str, seed: int) -> None:
    """Every loss is a mean over the samples, and every mask has a row for each."""
    own, rng, batch = dropping(kind), np.random.default_rng(seed), sum(split)
    y = rng.integers(0, 4, batch) if kind == "cross_entropy" else rng.integers(0, 2, (batch, 4)).astype(np.float32)
    data = {"x": rng.standard_normal((batch, 6), dtype=np.float32), "y": y}
    data |= {name: rng.random((batch, 6)) < 0.75 for name in ("rand/0", "rand/1")}
    state = own.initial()
    step, found = own.whole(data, state), own.parts(data, state, split)
    assert worst(found, step, state) <= 3e-5
    same(found, step, ["h", "loss", own.step.graph.outputs[2].name], 1e-5)


def test_other_rows_of_the_masks_are_another_gradient() -> None:
    own, rng = dropping("mse"), np.random.default_rng(0)
    data = {"x": rng.standard_normal((6, 6), dtype=np.float32), "y": rng.random((6, 4), dtype=np.float32)}
    masks = {name: rng.random((6, 6)) < 0.75 for name in ("rand/0", "rand/1")}
    state = own.initial()
    one = own.parts(data | masks, state, (3, 3))
    two = own.parts(data | {name: mask[::-1] for name, mask in masks.items()}, state, (3, 3))
    assert worst(one, two, state) > 0.01
