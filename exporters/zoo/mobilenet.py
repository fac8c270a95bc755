"""MobileNetV2: inverted residuals with linear bottlenecks.

Sandler et al., 2018. Parameter names are those of torchvision, whose weights therefore load. 19 units: the stem, 17
inverted residuals, the last 1x1 convolution.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from edgelocal.exporters.units import Fresh, GlobalMean, Network, Unit, pooled_linear
from edgelocal.exporters.zoo.layers import image_channels, initialise

STEM, LAST = 32, 1280
# Expansion factor, channels, repetitions, stride of the first: table 2 of the paper.
STAGES = (
    (1, 16, 1, 1),
    (6, 24, 2, 2),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


class InvertedResidual(nn.Module):
    """1x1 widening by `factor`, depthwise 3x3, linear 1x1: (N, inputs, H, W) -> (N, outputs, H/stride, W/stride).

    The input is added where the shape allows it.
    """

    def __init__(self, factor: int, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        hidden = inputs * factor
        widen = [_conv(inputs, hidden, 1)] if factor != 1 else []
        depthwise = _conv(hidden, hidden, 3, stride, groups=hidden)
        self.conv = nn.Sequential(*widen, depthwise, nn.Conv2d(hidden, outputs, 1, bias=False), nn.BatchNorm2d(outputs))
        self.residual = stride == 1 and inputs == outputs

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        y = self.conv(x)
        out: Tensor = x + y if self.residual else y
        return out


class MobileNetV2(nn.Module):
    """Stem, inverted residuals, 1x1 convolution to 1280, global mean, Linear: (N, channels, H, W) -> (N, classes)."""

    def __init__(self, channels: int, classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.features = nn.Sequential(_conv(channels, STEM, 3, 2))
        inputs = STEM
        for factor, outputs, count, stride in STAGES:
            for index in range(count):
                self.features.append(InvertedResidual(factor, inputs, outputs, stride if index == 0 else 1))
                inputs = outputs
        self.features.append(_conv(inputs, LAST, 1))
        self.avgpool = GlobalMean()
        self.classifier = nn.Sequential(nn.Dropout(dropout) if dropout else nn.Identity(), nn.Linear(LAST, classes))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        out: Tensor = self.classifier(self.avgpool(self.features(x)))
        return out


def mobilenetv2(name: str, input_shape: tuple[int, ...], classes: int) -> Network:
    """MobileNetV2 of width 1; total stride 32."""
    module = MobileNetV2(image_channels(name, input_shape, 1), classes)
    initialise(module)
    blocks = [(partial(_fresh_residual, factor), width) for factor, width, count, _ in STAGES for _ in range(count)]
    kinds: list[tuple[Fresh, int]] = [(blocks[-1][0], STEM), *blocks, (_fresh_last, LAST)]
    units = tuple(
        Unit(f"features.{index}", part, width, fresh)
        for index, (part, (fresh, width)) in enumerate(zip(module.features, kinds, strict=True))
    )
    head = nn.Sequential(module.avgpool, module.classifier)
    return Network(name, module, units, head, pooled_linear, input_shape, classes)


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(outputs), nn.ReLU6())


def _fresh_residual(factor: int, inputs: int, width: int, stride: int) -> nn.Module:
    return initialise(InvertedResidual(factor, inputs, width, stride))


def _fresh_last(inputs: int, width: int, stride: int) -> nn.Module:
    return initialise(_conv(inputs, width, 1, stride))
