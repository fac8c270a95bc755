"""Losses and metrics against values worked out by hand and against plain loops in exact order."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_tests.device.runs import task
from edgelocal.training.scores import Score, score

LOG2, LOG3 = math.log(2), math.log(3)


def test_cross_entropy_by_hand() -> None:
    logits = np.array([[0, LOG3], [LOG3, 0], [0, 0]], np.float32)
    loss, right = score(logits, np.array([1, 1, 0]), task(classes=2))
    # p of the right class: 3/4, 1/4, 1/2; a tie goes to the first class
    assert loss == pytest.approx((math.log(4 / 3) + math.log(4) + LOG2) / 3, rel=1e-7)
    assert right == 2


def test_label_smoothing_by_hand() -> None:
    logits = np.array([[0, LOG3]], np.float32)
    loss, _ = score(logits, np.array([1]), task(classes=2, smoothing=0.2))
    # the target is (0.1, 0.9), the prediction (1/4, 3/4)
    assert loss == pytest.approx(0.1 * math.log(4) + 0.9 * math.log(4 / 3), rel=1e-7)


def test_bce_by_hand() -> None:
    logits = np.array([[0, LOG3], [-LOG3, 0]], np.float32)
    targets = np.array([[1, 1], [1, 0.25]], np.float32)
    loss, right = score(logits, targets, task("bce", 2))
    # sigmoids: 1/2, 3/4; 1/4, 1/2. A logit of 0 decides for 0.
    assert loss == pytest.approx((LOG2 + math.log(4 / 3) + math.log(4) + LOG2) / 4, rel=1e-7)
    assert right == 2


def test_mse_by_hand() -> None:
    loss, error = score(np.array([[1, -2], [0, 4]], np.float32), np.array([[0, 0], [0, 1]], np.float32), task("mse", 2))
    assert (loss, error) == ((1 + 4 + 0 + 9) / 4, 1 + 2 + 0 + 3)


@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 7), st.sampled_from([0.0, 0.1, 1.0]))
def test_cross_entropy_equals_plain_loops(seed: int, n: int, classes: int, smoothing: float) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 4, (n, classes)).astype(np.float32)
    y = rng.integers(0, classes, n)
    total = 0.0
    for row, target in zip(logits.tolist(), y.tolist(), strict=True):
        normaliser = math.log(math.fsum(math.exp(v) for v in row))
        weights = [smoothing / classes + (1 - smoothing) * (k == target) for k in range(classes)]
        total += math.fsum(w * (normaliser - v) for w, v in zip(weights, row, strict=True))
    loss, _ = score(logits, y, task(classes=classes, smoothing=smoothing))
    assert loss == pytest.approx(total / n, rel=1e-12, abs=1e-12)


@given(st.integers(0, 2**32 - 1), st.integers(1, 9), st.integers(1, 7))
def test_bce_equals_plain_loops(seed: int, n: int, classes: int) -> None:
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, 4, (n, classes)).astype(np.float32)
    y = rng.integers(0, 2, (n, classes)).astype(np.float32)
    p = [1 / (1 + math.exp(-v)) for v in logits.ravel().tolist()]
    terms = [-math.log(q if t else 1 - q) for q, t in zip(p, y.ravel().tolist(), strict=True)]
    assert score(logits, y, task("bce", classes))[0] == pytest.approx(math.fsum(terms) / len(terms), rel=1e-9)


@pytest.mark.parametrize("scale", [1e3, 1e30])
@pytest.mark.parametrize(("loss", "y"), [("cross_entropy", np.array([0])), ("bce", np.array([[1.0, 0.0]]))])
def test_large_logits_do_not_overflow(scale: float, loss: str, y: np.ndarray) -> None:
    wrong = score(np.array([[-scale, scale]], np.float32), y, task(loss, 2))
    assert wrong[0] == pytest.approx(float(np.float32(scale)) * (2 if loss == "cross_entropy" else 1), rel=1e-12)
    assert score(np.array([[scale, -scale]], np.float32), y, task(loss, 2)) == (0.0, 1.0 if loss != "bce" else 2.0)


def test_sums_over_unequal_batches_are_means_over_samples() -> None:
    total = Score()
    total.add(3, 2.0, 2)
    total.add(1, 6.0, 1)
    assert total.result(task()) == {"loss": 3.0, "accuracy": 0.75}
    assert total.result(task("bce", 3)) == {"loss": 3.0, "accuracy": 0.25}
    assert total.result(task("mse", 3)) == {"loss": 3.0, "mean_absolute_error": 0.25}
    assert Score().result(task()) == {"loss": 0.0, "accuracy": 0.0}
