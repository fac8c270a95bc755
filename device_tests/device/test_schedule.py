"""Learning rates against values worked out by hand or by another formula."""

from __future__ import annotations

import cmath
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelocal.errors import UsageError
from edgelocal.training.schedule import SCHEDULES, learning_rate


def rates(schedule: str, epochs: int, warmup: int = 0, base: float = 0.8) -> list[float]:
    return [learning_rate(schedule, base, e, epochs, warmup) for e in range(1, epochs + 1)]


def test_constant() -> None:
    assert rates("constant", 5) == [0.8] * 5


@pytest.mark.parametrize(
    ("epochs", "expected"),
    [
        (8, [0.8, 0.8, 0.8, 0.8, 0.08, 0.08, 0.008, 0.008]),
        (5, [0.8, 0.8, 0.08, 0.008, 0.008]),
        (4, [0.8, 0.8, 0.08, 0.008]),
        (3, [0.8, 0.08, 0.008]),
        (1, [0.008]),
    ],
)
def test_step_drops_after_half_and_three_quarters(epochs: int, expected: list[float]) -> None:
    assert rates("step", epochs) == pytest.approx(expected, rel=1e-12)


def test_cosine_at_angles_known_in_closed_form() -> None:
    root = math.sqrt(0.5)
    assert rates("cosine", 4) == pytest.approx([0.4 * (1 + root), 0.4, 0.4 * (1 - root), 0.0], abs=1e-15)
    assert rates("cosine", 6)[1:5:2] == pytest.approx([0.6, 0.2], rel=1e-12)


@given(st.integers(1, 400), st.floats(1e-6, 10))
def test_cosine_is_half_the_rate_times_one_plus_the_real_part_of_a_rotation(epochs: int, base: float) -> None:
    for e in (1, (epochs + 1) // 2, epochs):
        rotation = cmath.exp(1j * math.pi * e / epochs)
        assert learning_rate("cosine", base, e, epochs, 0) == pytest.approx(base * (1 + rotation.real) / 2, abs=1e-12)


def test_warm_up_starts_at_a_hundredth_and_then_follows_the_schedule() -> None:
    assert rates("constant", 5, warmup=4, base=0.41) == pytest.approx([0.01, 0.11, 0.21, 0.31, 0.41], rel=1e-12)
    # Epoch 3 of 4 with 2 of warm-up is behind it; epoch 2 is half 0.01 and half the cosine's middle.
    assert rates("cosine", 4, warmup=2)[:3] == pytest.approx([0.01, 0.205, 0.4 * (1 - math.sqrt(0.5))], rel=1e-12)


@given(st.sampled_from(SCHEDULES), st.integers(1, 50), st.integers(1, 60))
def test_the_first_epoch_of_any_warm_up_has_the_start_rate(schedule: str, epochs: int, warmup: int) -> None:
    assert learning_rate(schedule, 0.5, 1, epochs, warmup) == pytest.approx(0.01, rel=1e-12)


def test_a_warm_up_never_starts_above_the_rate() -> None:
    rates = [learning_rate("constant", 1e-3, e, 10, 3) for e in range(1, 11)]
    assert max(rates) == pytest.approx(1e-3)


def test_an_unknown_schedule_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match="no learning-rate schedule 'linear'; choose one of constant, step, cosine"):
        learning_rate("linear", 0.1, 1, 2, 0)
