"""Every form of the gradients of a convolution computes the same: each against PyTorch's autograd in float64."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import onnx
import pytest
import torch
from hypothesis import given, settings
from torch import nn

from device_tests.export.helpers import check, op_types
from device_tests.export.test_lowering_convolution import GEOMETRIES, geometry
from edgelocal.exporters.forms import CPU, CUDA, Forms, Stack

BATCHED, MERGED = 1 << 30, 0
CANDIDATES = {
    f"{stack}, {name}": Forms("products", stack, pairs, kind, "computed")
    for stack, kind in (("tap", "flipped"), ("row", "transposed"), ("kernel", "transposed"))
    for name, pairs in (("batched", BATCHED), ("merged", MERGED))
}
CANDIDATES["convolution"] = replace(CUDA, weight="convolution")
HARD = (
    *("3x3", "1x1 stride 2", "stride 2 odd", "stride by axis", "even kernel padded", "kernel by axis"),
    *("dilated stride 2", "padded beyond the kernel", "grouped stride 2", "patches"),
)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("geometry", HARD)
@pytest.mark.parametrize("forms", CANDIDATES.values(), ids=list(CANDIDATES))
def test_every_form_of_every_geometry(forms: Forms, geometry: str) -> None:
    options, shape = GEOMETRIES[geometry]
    check(nn.Conv2d(4, 6, **options), shape, batches=(3, 1), forms=forms)


@pytest.mark.parametrize("forms", CANDIDATES.values(), ids=list(CANDIDATES))
def test_one_axis_and_three(forms: Forms) -> None:
    check(nn.Conv1d(4, 6, 3, 2, 1), (4, 12), batches=(2,), forms=forms)
    check(nn.Conv3d(2, 3, 3, padding=1), (2, 4, 5, 4), batches=(2,), forms=forms)
    check(nn.Conv2d(6, 6, 3, 2, 1, groups=6), (6, 7, 8), batches=(2,), forms=forms)


@settings(max_examples=8)
@given(geometry())
def test_rows_and_kernels_side_by_side_of_any_geometry(case: tuple[dict[str, Any], tuple[int, int, int]]) -> None:
    options, shape = case
    for name in ("row, batched", "row, merged", "kernel, merged", "convolution"):
        check(nn.Conv2d(**options), shape, batches=(2,), forms=CANDIDATES[name])


def count(model: onnx.ModelProto, *kinds: str) -> int:
    return sum(node.op_type in kinds for node in model.graph.node)


@pytest.mark.parametrize(("stack", "products"), [("tap", 9), ("row", 3), ("kernel", 1)])
def test_taps_that_share_a_product(stack: Stack, products: int) -> None:
    body = nn.Conv2d(4, 6, 3, padding=1, bias=False)
    for pairs in (BATCHED, MERGED):
        model = check(body, (4, 7, 7), batches=(2,), forms=replace(CUDA, stack=stack, merge_from=pairs))
        assert count(model, "MatMul", "Gemm") == products


def test_an_input_gradient_of_stride_one_is_what_the_forms_say() -> None:
    body = nn.Conv2d(4, 6, 3, padding=1)
    assert "ConvTranspose" not in op_types(check(body, (4, 7, 7), forms=CPU))
    assert "ConvTranspose" in op_types(check(body, (4, 7, 7), forms=CUDA))


def test_pads_are_symmetric_whatever_is_left_over() -> None:
    # ONNX Runtime's CUDA provider takes no others: sizes that a stride of 3 does not divide need output_padding.
    model = check(nn.Conv2d(4, 6, 3, 3, 1), (4, 9, 11), forms=CUDA)
    nodes = [node for node in model.graph.node if node.op_type == "ConvTranspose"]
    assert len(nodes) == 1
    found = {a.name: list(onnx.helper.get_attribute_value(a)) for a in nodes[0].attribute if a.name != "group"}
    assert found["pads"] == [1, 1, 1, 1]
    assert found["output_padding"] == [2, 1]
