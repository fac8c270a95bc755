"""VGG with batch norm.

Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", 2015. `features.N` is
named as in torchvision, whose convolution weights therefore load. The classifier is the small one of AugLocal: global
mean and two hidden layers of 512 units with batch norm.
"""

from __future__ import annotations

from torch import Tensor, nn

from edgelocal.exporters.units import GlobalMean, Network, Unit
from edgelocal.exporters.zoo.layers import conv_bn_relu, image_channels, initialise

WIDTHS = (64, 128, 256, 512, 512)
STAGES = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}
HIDDEN = 512


class VGG(nn.Module):
    """Stages of conv3x3-BN-ReLU, each ending in a 2x2 max-pool: (N, channels, H, W) -> (N, classes)."""

    def __init__(self, channels: int, classes: int, counts: tuple[int, ...]) -> None:
        super().__init__()
        self.features = nn.Sequential()
        for width, count in zip(WIDTHS, counts, strict=True):
            for _ in range(count):
                self.features.extend([nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()])
                channels = width
            self.features.append(nn.MaxPool2d(2))
        self.avgpool = GlobalMean()
        self.classifier = _classifier(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        out: Tensor = self.classifier(self.avgpool(self.features(x)))
        return out


def vgg(layers: int, name: str, input_shape: tuple[int, ...], classes: int) -> Network:
    """VGG-11, 13, 16 or 19, a unit for every conv-BN-ReLU; max-pools run with what follows them, a unit or the head."""
    module = VGG(image_channels(name, input_shape, 32), classes, STAGES[layers])
    initialise(module)
    units: list[Unit] = []
    group: list[nn.Module] = []
    width = 0
    for index, layer in enumerate(module.features):
        group.append(layer)
        if isinstance(layer, nn.Conv2d):
            width = layer.out_channels
        elif isinstance(layer, nn.ReLU):
            units.append(Unit(f"features.{index - 2}", nn.Sequential(*group), width, _fresh))
            group = []
    head = nn.Sequential(*group, module.avgpool, module.classifier)
    return Network(name, module, tuple(units), head, _aux_head, input_shape, classes, downsampling="change")


def _aux_head(channels: int, classes: int, depth: int) -> nn.Module:
    return nn.Sequential(GlobalMean(), _classifier(channels, classes))


def _classifier(features: int, classes: int) -> nn.Sequential:
    hidden = [nn.Linear(features, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU()]
    hidden += [nn.Linear(HIDDEN, HIDDEN), nn.BatchNorm1d(HIDDEN), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(HIDDEN, classes))


def _fresh(inputs: int, width: int, stride: int) -> nn.Module:
    """As the network itself does, a VGG unit shrinks by a max-pool before it, not by a strided convolution."""
    pool = [nn.MaxPool2d(stride)] if stride > 1 else []
    return initialise(nn.Sequential(*pool, *conv_bn_relu(inputs, width)))
