"""Networks by name, each as a sequence of units. A further network is one file and one line here."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial

from edgelocal.errors import ExportError
from edgelocal.exporters.guest import network_errors
from edgelocal.exporters.units import Network
from edgelocal.exporters.zoo.mlp import mlp
from edgelocal.exporters.zoo.mobilenet import mobilenetv2
from edgelocal.exporters.zoo.resnet import CIFAR_DEPTHS, IMAGENET_STAGES, cifar_resnet, imagenet_resnet
from edgelocal.exporters.zoo.vgg import STAGES as VGG_STAGES
from edgelocal.exporters.zoo.vgg import vgg
from edgelocal.exporters.zoo.vit import vit

Builder = Callable[[str, tuple[int, ...], int], Network]

_BUILDERS: dict[str, Builder] = {
    "mlp": mlp,
    "mobilenetv2": mobilenetv2,
    "vit": vit,
    **{f"resnet{layers}": partial(cifar_resnet, layers) for layers in CIFAR_DEPTHS},
    **{f"resnet{layers}": partial(imagenet_resnet, layers) for layers in IMAGENET_STAGES},
    **{f"vgg{layers}": partial(vgg, layers) for layers in VGG_STAGES},
}


def names() -> tuple[str, ...]:
    """Every name `build` knows."""
    return tuple(_BUILDERS)


def build(name: str, input_shape: tuple[int, ...], classes: int) -> Network:
    """The network `name` for samples of `input_shape`, initialised from PyTorch's generator.

    Raises:
        ExportError: unknown name, an input the network cannot take, or no memory for it.
    """
    if name not in _BUILDERS:
        close = difflib.get_close_matches(name, _BUILDERS, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise ExportError(
            f"no network is called {name!r}{hint}; the zoo has {', '.join(_BUILDERS)}; your own network is given as "
            "package.module:callable or file.py:callable"
        )
    with network_errors(f"{name}: building it for input {input_shape} and {classes} classes"):
        return _BUILDERS[name](name, input_shape, classes)
