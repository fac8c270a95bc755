"""What the networks of the zoo share: small layers, initialisation, input checks."""

from __future__ import annotations

from torch import nn

from edgelocal.errors import ExportError


def conv_bn_relu(inputs: int, outputs: int, kernel: int = 3, stride: int = 1) -> nn.Sequential:
    """Convolution without bias and "same" padding, batch norm, ReLU: (N, inputs, H, W) -> (N, outputs, H', W')."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


def initialise(module: nn.Module) -> nn.Module:
    """Draw convolutions from N(0, sqrt(2 / (k k C_out))), batch norm 1 and 0; Linear keeps PyTorch's default.

    He et al., "Delving Deep into Rectifiers", 2015 (fan-out form). Returns the module itself.
    """
    for part in module.modules():
        if isinstance(part, nn.Conv2d):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")
            if part.bias is not None:
                nn.init.zeros_(part.bias)
    return module


def image_channels(name: str, input_shape: tuple[int, ...], smallest: int) -> int:
    """Channels of an image input (C, H, W) whose sides are at least `smallest` pixels.

    Raises:
        ExportError: not an image, or too small for the network's strides.
    """
    if len(input_shape) != 3:
        raise ExportError(f"{name} takes images (channels, height, width), found input shape {input_shape}")
    channels, height, width = input_shape
    if min(height, width) < smallest:
        raise ExportError(
            f"{name} halves its input down to nothing at {height}x{width}; give at least {smallest}x{smallest} pixels, "
            "or choose a network with fewer strides"
        )
    return channels
