"""Training through step graphs against eager PyTorch in float64, beside eager float32 (see benchmarks/parity.py).

A fast choice covers every kind of network and optimizer; the whole zoo is marked slow.
"""

from __future__ import annotations

import pytest
from parity import OPTIMIZERS, Case, Row, cases, measure
from torch import nn

from edgelocal.exporters import zoo
from edgelocal.exporters.units import GlobalMean
from edgelocal.exporters.zoo.resnet import Bottleneck

# Networks without ReLU kinks close to zero, or with few: their gradients are smooth functions of rounding.
SMOOTH = ("mlp", "vit")
FAST = [
    (Case("mlp", "sgd", 1), 20),
    (Case("mlp", "sgd momentum", 3), 20),
    (Case("mlp", "adamw", 3), 20),
    (Case("resnet8", "sgd nesterov", 3), 20),
    (Case("resnet20", "adamw", 1), 4),
    (Case("vit", "sgd nesterov", 1), 4),
    (Case("vgg11", "sgd momentum", 1), 3),
    (Case("resnet18", "sgd", 1), 3),
    (Case("mobilenetv2", "sgd nesterov", 1), 3),
    (Case(f"{__name__}:bottlenecks", "adamw", 2), 4),
]


def bottlenecks() -> nn.Module:
    """The residual block of resnet50 in a network that exports in seconds."""
    units = [Bottleneck(3, 8, 2), Bottleneck(32, 8, 1), Bottleneck(32, 16, 2), nn.Linear(64, 10)]
    return nn.Sequential(*units[:3], GlobalMean(), units[3])


def check(row: Row) -> None:
    """Every step as good as eager float32's, or nearly exact.

    A wrong formula, a swapped tensor or a missing update is an error of the order of 1.
    """
    limit = 2e-5 if row.case.network in SMOOTH else 5e-3
    assert row.graph.gradients <= max(limit, 20 * row.eager.gradients), row
    assert row.graph.gradients <= 0.05, row
    assert row.graph.worst_gradients <= max(0.05, 20 * row.eager.worst_gradients), row
    assert row.graph.loss <= max(1e-5, 20 * row.eager.loss), row
    assert row.graph.state <= max(1e-5 if row.case.network in SMOOTH else 0.05, 20 * row.eager.state), row
    assert row.graph.free_loss <= max(1e-4, 20 * row.eager.free_loss), row


@pytest.mark.parametrize(("case", "steps"), FAST, ids=[f"{c.network}, {c.optimizer}, {c.blocks}" for c, _ in FAST])
def test_training_is_that_of_pytorch(case: Case, steps: int) -> None:
    check(measure(case, steps))


def test_the_fast_choice_has_every_optimizer() -> None:
    assert {case.optimizer for case, _ in FAST} == set(OPTIMIZERS)


ALL = cases(zoo.names(), list(OPTIMIZERS))


@pytest.mark.slow
@pytest.mark.parametrize("case", ALL, ids=[f"{c.network}, {c.optimizer}, {c.blocks}" for c in ALL])
def test_every_network_trains_as_in_pytorch(case: Case) -> None:
    check(measure(case, 20))
