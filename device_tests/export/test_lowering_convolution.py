"""Convolutions as ONNX, output and every gradient against PyTorch's autograd in float64, all batches from one graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from device_tests.export.helpers import check, op_types

GEOMETRIES: dict[str, tuple[dict[str, Any], tuple[int, ...]]] = {
    "3x3": ({"kernel_size": 3, "padding": 1}, (4, 7, 7)),
    "no padding, bias": ({"kernel_size": 3}, (4, 6, 6)),
    "1x1": ({"kernel_size": 1}, (4, 5, 5)),
    "1x1 stride 2": ({"kernel_size": 1, "stride": 2}, (4, 7, 8)),
    "stride 2": ({"kernel_size": 3, "stride": 2, "padding": 1}, (4, 8, 8)),
    "stride 2 odd": ({"kernel_size": 3, "stride": 2, "padding": 1}, (4, 7, 9)),
    "stride 3": ({"kernel_size": 3, "stride": 3, "padding": 1}, (4, 10, 11)),
    "stride by axis": ({"kernel_size": 3, "stride": (1, 2), "padding": 1}, (4, 7, 8)),
    "even kernel": ({"kernel_size": 2}, (4, 6, 5)),
    "even kernel padded": ({"kernel_size": 4, "padding": 1, "stride": 2}, (4, 8, 9)),
    "kernel by axis": ({"kernel_size": (3, 5), "padding": (1, 2)}, (4, 7, 9)),
    "column": ({"kernel_size": (3, 1), "padding": (1, 0)}, (4, 7, 6)),
    "row": ({"kernel_size": (1, 3), "padding": (0, 1)}, (4, 7, 6)),
    "dilated": ({"kernel_size": 3, "dilation": 2, "padding": 2}, (4, 9, 8)),
    "dilated stride 2": ({"kernel_size": 3, "dilation": 2, "stride": 2}, (4, 11, 10)),
    "same": ({"kernel_size": 3, "padding": "same"}, (4, 6, 5)),
    "padded beyond the kernel": ({"kernel_size": 2, "padding": 2}, (4, 5, 4)),
    "grouped": ({"kernel_size": 3, "padding": 1, "groups": 2}, (4, 7, 6)),
    "grouped stride 2": ({"kernel_size": 3, "padding": 1, "groups": 2, "stride": 2}, (4, 7, 6)),
    "grouped 1x1": ({"kernel_size": 1, "groups": 2}, (4, 5, 5)),
    "patches": ({"kernel_size": 4, "stride": 4}, (4, 8, 12)),
    "reflected": ({"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}, (4, 6, 5)),
    "circular": ({"kernel_size": 3, "padding": 1, "padding_mode": "circular"}, (4, 6, 5)),
    "replicated": ({"kernel_size": 3, "padding": 1, "padding_mode": "replicate"}, (4, 6, 5)),
}


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(("options", "shape"), GEOMETRIES.values(), ids=list(GEOMETRIES))
def test_conv2d(options: dict[str, Any], shape: tuple[int, ...]) -> None:
    check(nn.Conv2d(4, 6, **options), shape)


@pytest.mark.filterwarnings("ignore:Using padding='same'")  # PyTorch's advice on speed in eager mode
def test_same_padding_of_an_even_kernel() -> None:
    check(nn.Conv2d(4, 6, 4, padding="same"), (4, 6, 5))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("stride", [1, 2])
def test_depthwise(stride: int, bias: bool) -> None:
    check(nn.Conv2d(6, 6, 3, stride, 1, groups=6, bias=bias), (6, 7, 8))


def test_depthwise_with_a_multiplier() -> None:
    check(nn.Conv2d(4, 12, 3, padding=1, groups=4), (4, 6, 6))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kernel", [1, 3])
def test_channels_from_which_samples_are_merged(kernel: int, stride: int) -> None:
    # 128 x 128 channel pairs switch the weight gradient to its other form: a Gemm for each tap.
    wide = check(nn.Conv2d(128, 128, kernel, stride, kernel // 2, bias=False), (128, 4, 5))
    narrow = check(nn.Conv2d(128, 127, kernel, stride, kernel // 2, bias=False), (128, 4, 5))
    assert "Gemm" in op_types(wide)
    assert "Gemm" not in op_types(narrow)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("options", [{}, {"groups": 2}, {"dilation": 2}], ids=["plain", "grouped", "dilated"])
def test_conv1d(stride: int, options: dict[str, int]) -> None:
    check(nn.Conv1d(4, 6, 3, stride, 1, **options), (4, 12))


def test_conv3d() -> None:
    check(nn.Conv3d(2, 3, 3, padding=1), (2, 4, 5, 4))


@pytest.mark.parametrize(
    "options",
    [
        {"kernel_size": 2, "stride": 2},
        {"kernel_size": 3, "stride": 2, "padding": 1, "output_padding": 1},
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 3, "stride": 2, "padding": 1, "groups": 2},
        {"kernel_size": 3, "dilation": 2, "bias": False},
    ],
    ids=str,
)
def test_transposed_conv2d(options: dict[str, Any]) -> None:
    check(nn.ConvTranspose2d(4, 6, **options), (4, 5, 4))


def test_transposed_conv1d() -> None:
    check(nn.ConvTranspose1d(4, 6, 4, 2, 1), (4, 7))


def test_two_convolutions_in_a_row() -> None:
    # The second sees the gradient of the first's output: input gradients feed weight gradients.
    body = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1))
    check(body, (3, 9, 8))


@st.composite
def geometry(draw: st.DrawFn) -> tuple[dict[str, Any], tuple[int, int, int]]:
    def pair(low: int, high: int) -> tuple[int, int]:
        return draw(st.tuples(st.integers(low, high), st.integers(low, high)))

    groups = draw(st.sampled_from([1, 1, 2, 3]))
    options = {
        "in_channels": groups * draw(st.integers(1, 3)),
        "out_channels": groups * draw(st.integers(1, 3)),
        "kernel_size": pair(1, 4),
        "stride": pair(1, 3),
        "padding": pair(0, 3),
        "dilation": pair(1, 2),
        "groups": groups,
        "bias": draw(st.booleans()),
    }
    sizes = pair(1, 9)
    for size, kernel, pad, step in zip(
        sizes, options["kernel_size"], options["padding"], options["dilation"], strict=True
    ):
        assume(size + 2 * pad >= step * (kernel - 1) + 1)
    return options, (options["in_channels"], *sizes)


@settings(max_examples=25)
@given(geometry())
def test_any_geometry(case: tuple[dict[str, Any], tuple[int, int, int]]) -> None:
    options, shape = case
    torch.manual_seed(0)
    check(nn.Conv2d(**options), shape, batches=(3, 1))
