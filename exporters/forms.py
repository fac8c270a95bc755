"""How graphs of training are written, by what they will run on: one value of `Forms` for each target.

The same gradient of a convolution can be several ONNX graphs (exporters/lowering/convolution.py, weight_gradient.py).
For the CPU the choice was measured (docs/decisions/0009), for CUDA it was only reasoned (docs/decisions/0016): `CUDA`
below is what to change once `benchmarks/cuda_gradients.py` has run on a GPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

Stack = Literal["tap", "row", "kernel"]


@dataclass(frozen=True)
class Forms:
    """The forms of both gradients of a convolution, and of large values that are one number everywhere.

    weight: "products", matrix products over the samples and places; or "convolution", one with input and output
        gradient as its map and its filter (of grouped convolutions: products).
    stack: the taps of the kernel that share a product: none, those of a row, all. Their pieces of the input lie side by
        side, so that the workspace grows with their number.
    merge_from: the channel pairs (input times output channels) from which on the samples are merged into the inner
        dimension of the products; below, products are batched over samples and then added up.
    input: with stride 1 "flipped", a convolution with the mirrored kernel, or "transposed", ConvTranspose, as it is for
        every other stride.
    fills: "folded", one number expanded; or "computed", so that a runtime that folds constants does not: where sessions
        are made for one size of the batch it would, and keep a map of zeros for every max-pooling.
    """

    weight: Literal["products", "convolution"]
    stack: Stack
    merge_from: int
    input: Literal["flipped", "transposed"]
    fills: Literal["folded", "computed"]


CPU = Forms("products", "tap", 128 * 128, "flipped", "folded")
CUDA = Forms("products", "tap", 64 * 64, "transposed", "computed")
FORMS: Mapping[str, Forms] = MappingProxyType({"cpu": CPU, "cuda": CUDA})
