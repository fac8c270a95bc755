"""Linear probes: behind every block a global mean and one Linear, the cheapest auxiliary there is.

Cheap in memory and compute, but a block that must be linearly separable on its own throws away what later ones need:
accuracy falls as the number of blocks grows (Belilovsky et al., "Greedy Layerwise Learning", 2019).
"""

from __future__ import annotations

from torch import nn

from edgelocal.bundle.spec import RuleSpec
from edgelocal.exporters.rules.base import Place, Rule
from edgelocal.exporters.units import Network, pooled_linear


def auxiliary(network: Network, place: Place, rule: RuleSpec) -> nn.Module:
    """(N, C, H, W), (N, T, C) or (N, C) -> mean over all but channels -> Linear -> (N, classes)."""
    return pooled_linear(network.units[place.unit].channels, network.classes)


RULE = Rule("linear", auxiliary)
