"""A multilayer perceptron: four hidden layers of 256 units with ReLU, for samples of any shape."""

from __future__ import annotations

import math

from torch import Tensor, nn

from edgelocal.exporters.units import Network, Unit, pooled_linear

WIDTH, LAYERS = 256, 4


class MLP(nn.Module):
    """(N, ...) with `features` elements a sample -> (N, classes)."""

    def __init__(self, features: int, classes: int) -> None:
        super().__init__()
        sizes = [features] + [WIDTH] * (LAYERS - 1)
        self.layers = nn.ModuleList(nn.Linear(size, WIDTH) for size in sizes)
        self.head = nn.Linear(WIDTH, classes)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = x.flatten(1)
        for layer in self.layers:
            x = layer(x).relu()
        out: Tensor = self.head(x)
        return out


def mlp(name: str, input_shape: tuple[int, ...], classes: int) -> Network:
    """Flatten and four units Linear-ReLU; the head is one Linear."""
    module = MLP(math.prod(input_shape), classes)
    units = tuple(
        Unit(f"layers.{index}", nn.Sequential(*([nn.Flatten()] if index == 0 else []), layer, nn.ReLU()), WIDTH, _fresh)
        for index, layer in enumerate(module.layers)
    )
    return Network(name, module, units, module.head, pooled_linear, input_shape, classes)


def _fresh(inputs: int, width: int, stride: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, width), nn.ReLU())
