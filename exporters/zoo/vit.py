"""A small vision transformer: patch embedding with class token, 6 pre-norm layers of width 192.

Dosovitskiy et al., "An Image is Worth 16x16 Words", 2021. Attention is written out in matrix products, so that its
backward consists of standard operators.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from edgelocal.errors import ExportError
from edgelocal.exporters.units import Network, Unit
from edgelocal.exporters.zoo.layers import image_channels

WIDTH, HEADS, LAYERS, MLP_FACTOR = 192, 3, 6, 4
PATCHES = 64
_FEWEST, _MOST = 16, 256


class PatchEmbedding(nn.Module):
    """(N, C, H, W) -> (N, 1 + patches, WIDTH): the class token, then one token per patch, positions added.

    An image that patches do not cover evenly is continued with zeros to the right and below.
    """

    def __init__(self, channels: int, size: tuple[int, int], patch: int) -> None:
        super().__init__()
        patches = _patches(*size, patch)
        self.border = (-size[1] % patch, -size[0] % patch)
        self.proj = nn.Conv2d(channels, WIDTH, patch, patch)
        self.class_token = nn.Parameter(torch.zeros(1, 1, WIDTH))
        self.position = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1 + patches, WIDTH), std=0.02))

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        if any(self.border):
            x = nn.functional.pad(x, (0, self.border[0], 0, self.border[1]))
        tokens = self.proj(x).flatten(2).transpose(1, 2)
        first = self.class_token.expand(x.shape[0], -1, -1)
        return torch.cat([first, tokens], 1) + self.position


class Attention(nn.Module):
    """Multi-head self-attention softmax(q k' / sqrt(d)) v: (N, T, D) -> (N, T, D)."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.scale = 1 / math.sqrt(width // heads)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        _, tokens, width = x.shape
        split = self.qkv(x).reshape(-1, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = split[0] * self.scale, split[1], split[2]
        weights = (query @ key.transpose(-2, -1)).softmax(-1)
        out: Tensor = self.proj((weights @ value).transpose(1, 2).reshape(-1, tokens, width))
        return out


class TransformerLayer(nn.Module):
    """Pre-norm layer x + attention(norm x), then x + mlp(norm x): (N, T, width) -> (N, T, width)."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        hidden = width * MLP_FACTOR
        self.mlp = nn.Sequential(nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.dropout = nn.Dropout(dropout) if dropout else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        x = x + self.dropout(self.attention(self.norm1(x)))
        out: Tensor = x + self.dropout(self.mlp(self.norm2(x)))
        return out


class ClassTokenHead(nn.Module):
    """LayerNorm and Linear on the class token: (N, T, width) -> (N, classes)."""

    def __init__(self, width: int, classes: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        out: Tensor = self.fc(self.norm(x[:, 0]))
        return out


class ViT(nn.Module):
    """(N, channels, H, W) -> (N, classes), with H, W = `size`."""

    def __init__(self, channels: int, size: tuple[int, int], patch: int, classes: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = PatchEmbedding(channels, size, patch)
        self.layers = nn.Sequential(*(TransformerLayer(WIDTH, HEADS, dropout) for _ in range(LAYERS)))
        self.head = ClassTokenHead(WIDTH, classes)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        out: Tensor = self.head(self.layers(self.embedding(x)))
        return out


def vit(name: str, input_shape: tuple[int, ...], classes: int) -> Network:
    """The small vision transformer with about 64 patches; 7 units: the embedding and 6 layers."""
    channels = image_channels(name, input_shape, 1)
    _, height, width = input_shape
    module = ViT(channels, (height, width), patch_size(height, width), classes)
    units = [Unit("embedding", module.embedding, WIDTH, _fresh)]
    units += [Unit(f"layers.{index}", layer, WIDTH, _fresh) for index, layer in enumerate(module.layers)]
    return Network(name, module, tuple(units), module.head, _aux_head, input_shape, classes)


def patch_size(height: int, width: int) -> int:
    """The side in pixels of square patches: one that divides both sides, if one gives 16 to 256 patches, else any.

    Of these the one whose number of patches is nearest to 64, as a ratio.
    """
    every = range(1, max(height, width) + 1)
    even = [p for p in every if height % p == width % p == 0 and _FEWEST <= _patches(height, width, p) <= _MOST]
    return min(even or every, key=lambda patch: abs(math.log(_patches(height, width, patch) / PATCHES)))


def _patches(height: int, width: int, patch: int) -> int:
    """Patches that cover the image; those at its right and lower border may reach beyond it."""
    return -(-height // patch) * -(-width // patch)


def _fresh(inputs: int, width: int, stride: int) -> nn.Module:
    if inputs != width or stride != 1:
        raise ExportError(f"a transformer layer keeps its width, asked for {inputs} -> {width} with stride {stride}")
    return TransformerLayer(width, HEADS)


def _aux_head(channels: int, classes: int, depth: int) -> nn.Module:
    return ClassTokenHead(channels, classes)
