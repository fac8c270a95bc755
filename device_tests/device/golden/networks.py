"""The networks of the golden bundles. Only the export that made them needs this file, and torch."""

from __future__ import annotations

from torch import Tensor, nn


class Residual(nn.Module):
    """conv-BN-ReLU-conv-BN with a shortcut, which is a strided 1x1 conv-BN where the width changes."""

    def __init__(self, inputs: int, width: int) -> None:
        super().__init__()
        stride = 1 if inputs == width else 2
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.shortcut = nn.Sequential()
        if stride > 1:
            self.shortcut = nn.Sequential(nn.Conv2d(inputs, width, 1, stride, bias=False), nn.BatchNorm2d(width))

    def forward(self, x: Tensor) -> Tensor:
        """(N, inputs, H, W) -> (N, width, H, W), or half as high and wide."""
        h = self.bn1(self.conv1(x)).relu()
        out: Tensor = (self.bn2(self.conv2(h)) + self.shortcut(x)).relu()
        return out


def residual(classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    """Three residual units of 4, 8 and 8 channels, and a linear head."""
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, classes))
    return Declared([("a", Residual(input_shape[0], 4)), ("b", Residual(4, 8)), ("c", Residual(8, 8)), ("head", head)])


def dropout(classes: int, input_shape: tuple[int, ...]) -> nn.Module:
    """Two fully connected units with dropout, and a linear head."""
    return nn.Sequential(
        nn.Linear(input_shape[0], 24),
        nn.ReLU(),
        nn.Dropout(0.25),
        nn.Linear(24, 16),
        nn.ReLU(),
        nn.Dropout(0.5),
        nn.Linear(16, classes),
    )


class Declared(nn.Module):
    """A sequence of named parts that says itself what its units are."""

    def __init__(self, parts: list[tuple[str, nn.Module]]) -> None:
        super().__init__()
        self.parts = nn.ModuleDict(dict(parts))

    def forward(self, x: Tensor) -> Tensor:
        """All parts in a row."""
        for part in self.parts.values():
            x = part(x)
        return x

    def edgelocal_units(self) -> list[tuple[str, nn.Module]]:
        """The parts, the head last."""
        return list(self.parts.items())
