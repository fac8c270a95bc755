"""Convolutions of ResNet-32, -110 and -50, whose gradients `cuda_gradients.py` measures."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """A convolution: samples, input channels, height and width (equal), output channels, kernel, stride."""

    n: int
    channels: int
    size: int
    out: int
    kernel: int
    stride: int = 1

    @property
    def out_size(self) -> int:
        """Height and width of the result; the padding keeps the size with stride 1."""
        return (self.size + 2 * (self.kernel // 2) - self.kernel) // self.stride + 1

    def __str__(self) -> str:
        text = f"{self.n} x {self.channels} x {self.size} x {self.size} -> {self.out}, kernel {self.kernel}"
        return text + (f", stride {self.stride}" if self.stride > 1 else "")


SHAPES = (
    Shape(128, 16, 32, 16, 3),  # ResNet-32 and -110
    Shape(128, 16, 32, 32, 3, 2),
    Shape(128, 32, 16, 32, 3),
    Shape(128, 64, 8, 64, 3),
    Shape(32, 3, 224, 64, 7, 2),  # ResNet-50
    Shape(32, 64, 56, 64, 3),
    Shape(32, 256, 56, 64, 1),
    Shape(32, 128, 56, 128, 3, 2),
    Shape(32, 256, 14, 256, 3),
    Shape(32, 512, 7, 512, 3),
)


def used(gradient: str) -> tuple[str, str]:
    """What the gradient is computed from."""
    return ("x", "dy") if gradient == "weight" else ("w", "dy")


def operands(shape: Shape) -> dict[str, tuple[int, ...]]:
    """Sizes of input, weight and output gradient."""
    return {
        "x": (shape.n, shape.channels, shape.size, shape.size),
        "w": (shape.out, shape.channels, shape.kernel, shape.kernel),
        "dy": (shape.n, shape.out, shape.out_size, shape.out_size),
    }
