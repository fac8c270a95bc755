"""Residual networks for small (CIFAR) and large (ImageNet) images.

He et al., "Deep Residual Learning for Image Recognition", 2016: post-activation blocks, projection shortcuts (1x1
convolution and batch norm) where the shape changes. Parameter names are those of torchvision, whose weights therefore
load; bottlenecks stride in their 3x3 convolution, as there.
"""

from __future__ import annotations

from functools import partial
from itertools import chain

from torch import Tensor, nn

from edgelocal.exporters.units import GlobalMean, Network, Unit, pooled_linear
from edgelocal.exporters.zoo.layers import image_channels, initialise

CIFAR_DEPTHS = (8, 14, 20, 32, 56, 110)
CIFAR_WIDTHS = (16, 32, 64)
IMAGENET_WIDTHS = (64, 128, 256, 512)
IMAGENET_STAGES = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


class BasicBlock(nn.Module):
    """conv3x3-BN-ReLU-conv3x3-BN plus shortcut, ReLU: (N, inputs, H, W) -> (N, width, H/stride, W/stride)."""

    expansion = 1

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, width, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.downsample = _shortcut(inputs, width, stride)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        out: Tensor = self.relu(y + (x if self.downsample is None else self.downsample(x)))
        return out


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions plus shortcut: (N, inputs, H, W) -> (N, 4 width, H/stride, W/stride)."""

    expansion = 4

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = width * self.expansion
        self.conv1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU()
        self.downsample = _shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        y = self.relu(self.bn1(self.conv1(x)))
        y = self.relu(self.bn2(self.conv2(y)))
        y = self.bn3(self.conv3(y))
        out: Tensor = self.relu(y + (x if self.downsample is None else self.downsample(x)))
        return out


Block = type[BasicBlock] | type[Bottleneck]


class ResNet(nn.Module):
    """Stem, stages of residual blocks, global mean, Linear: (N, channels, H, W) -> (N, classes).

    `small` chooses the CIFAR stem (3x3, stride 1, no pool) over the ImageNet one (7x7, stride 2, max-pool).
    """

    def __init__(
        self, channels: int, classes: int, block: Block, widths: tuple[int, ...], counts: tuple[int, ...], small: bool
    ) -> None:
        super().__init__()
        kernel, stride = (3, 1) if small else (7, 2)
        self.conv1 = nn.Conv2d(channels, widths[0], kernel, stride, kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.relu = nn.ReLU()
        self.maxpool = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
        self.stages: list[nn.Sequential] = []
        inputs = widths[0]
        for index, (width, count) in enumerate(zip(widths, counts, strict=True)):
            stage = _stage(block, inputs, width, count, stride=1 if index == 0 else 2)
            self.add_module(f"layer{index + 1}", stage)
            self.stages.append(stage)
            inputs = width * block.expansion
        self.avgpool = GlobalMean()
        self.fc = nn.Linear(inputs, classes)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        for stage in self.stages:
            x = stage(x)
        out: Tensor = self.fc(self.avgpool(x))
        return out


def cifar_resnet(layers: int, name: str, input_shape: tuple[int, ...], classes: int) -> Network:
    """ResNet with 6n + 2 layers for small images: stem, then 3 stages of n basic blocks of 16, 32, 64 channels."""
    channels = image_channels(name, input_shape, 1)
    count = (layers - 2) // 6
    module = ResNet(channels, classes, BasicBlock, CIFAR_WIDTHS, (count,) * 3, small=True)
    return _network(name, module, BasicBlock, CIFAR_WIDTHS, input_shape, classes)


def imagenet_resnet(layers: int, name: str, input_shape: tuple[int, ...], classes: int) -> Network:
    """ResNet-18, 34 (basic blocks), 50 or 101 (bottlenecks) with the stem for large images."""
    channels = image_channels(name, input_shape, 1)
    block: Block = Bottleneck if layers >= 50 else BasicBlock
    module = ResNet(channels, classes, block, IMAGENET_WIDTHS, IMAGENET_STAGES[layers], small=False)
    return _network(name, module, block, IMAGENET_WIDTHS, input_shape, classes)


def cifar_aux_head(channels: int, classes: int, depth: int) -> nn.Module:
    """Global mean, batch norm only behind an auxiliary of depth 1 or less, Linear."""
    norm = [nn.BatchNorm1d(channels)] if depth <= 1 else []
    return nn.Sequential(GlobalMean(), *norm, nn.Linear(channels, classes))


def _network(
    name: str, module: ResNet, block: Block, widths: tuple[int, ...], shape: tuple[int, ...], classes: int
) -> Network:
    initialise(module)
    fresh = partial(_fresh, block)
    stem = nn.Sequential(module.conv1, module.bn1, module.relu, module.maxpool)
    blocks = (
        Unit(f"layer{stage}.{index}", part, width, fresh, block.expansion)
        for stage, (width, parts) in enumerate(zip(widths, module.stages, strict=True), 1)
        for index, part in enumerate(parts)
    )
    units = tuple(chain([Unit("stem", stem, widths[0], fresh)], blocks))
    aux_head = cifar_aux_head if widths == CIFAR_WIDTHS else pooled_linear
    return Network(name, module, units, nn.Sequential(module.avgpool, module.fc), aux_head, shape, classes)


def _fresh(block: Block, inputs: int, width: int, stride: int) -> nn.Module:
    return initialise(block(inputs, width, stride))


def _stage(block: Block, inputs: int, width: int, count: int, stride: int) -> nn.Sequential:
    rest = (block(width * block.expansion, width, 1) for _ in range(count - 1))
    return nn.Sequential(block(inputs, width, stride), *rest)


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Sequential | None:
    if stride == 1 and inputs == outputs:
        return None
    return nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))
