"""Training on an NVIDIA GPU; and where that can be, the same on the CPU as a device whose memory the runtime owns.

Without a GPU those of CUDA are skipped. With EDGELOCAL_REQUIRE_GPU=1 they are not: then a missing GPU is a failure.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from device_tests.device.golden_steps import EXPECTED, losses
from device_tests.device.runs import GOLDEN
from edgelocal.bundle.folder import open_bundle
from edgelocal.errors import OverBudgetError, RuntimeMissingError
from edgelocal.machine.gpu_memory import device_memory
from edgelocal.runtime.block import Block
from edgelocal.runtime.cuda import NAME, open_cuda
from edgelocal.runtime.graphs import GraphPool
from edgelocal.runtime.library import runtime
from edgelocal.runtime.pages import PageFile
from edgelocal.runtime.provider import CPU, Provider, stray_nodes
from edgelocal.runtime.tensor import DeviceTensor, Place

BOUND = 2e-5  # of a loss's relative error against float64, TF32 off
REQUIRED = bool(os.environ.get("EDGELOCAL_REQUIRE_GPU"))
MIB = 1 << 20


def why_no_gpu() -> str:
    """Empty if there is one, or if there has to be."""
    if REQUIRED:
        return ""
    if NAME not in runtime().get_available_providers():
        return f"this ONNX Runtime has no {NAME}"
    try:
        cuda()
    except RuntimeMissingError as error:
        return f"no CUDA device: {error}"
    return ""


@cache
def cuda() -> Provider:
    """The CUDA provider; once, since its arena is that of the process."""
    return open_cuda().provider(None, None)


@cache
def on_cpu() -> Provider:
    """The CPU as a device."""
    return Provider(place=Place("cpu"), fixed_batch=True)


WHY = why_no_gpu()
needs_gpu = pytest.mark.skipif(bool(WHY), reason=WHY)
places = pytest.mark.parametrize("make", [on_cpu, pytest.param(cuda, marks=needs_gpu)])
Make = Callable[[], Provider]


def blocks_of(bundle: str, provider: Provider, page: Path | None = None) -> list[Block]:
    opened = open_bundle(GOLDEN / bundle)
    graphs = GraphPool(opened, 1, provider=provider)
    pages = [PageFile(page / block.name, block.state()) if page else None for block in opened.manifest.blocks]
    return [Block(opened, index, graphs, page=each) for index, each in enumerate(pages)]


@places
@pytest.mark.parametrize("paged", [False, True])
def test_twenty_golden_steps(make: Make, tmp_path: Path, paged: bool) -> None:
    blocks = blocks_of("residual", make(), tmp_path if paged else None)
    expected = np.asarray(json.loads(EXPECTED.read_text())["losses"])
    found = losses(blocks)
    error = float((np.abs(found - expected) / expected).max())
    print(f"\n{make().name}: largest relative error of a loss {error:.1e}")
    assert error < BOUND
    assert bool(blocks[0].paged_bytes) == paged


@places
@pytest.mark.parametrize(("bundle", "micro_batch"), [("dropout", None), ("artifacts", 4), ("artifacts", 3)])
def test_a_step_is_that_of_the_cpu(make: Make, bundle: str, micro_batch: int | None) -> None:
    """Masks, and batches in parts whose last one is smaller: sessions for three sizes of the batch."""
    states, found = [], []
    for provider in (CPU, make()):
        blocks, place = blocks_of(bundle, provider), provider.place
        manifest = blocks[0].bundle.manifest
        rng = np.random.default_rng(0)
        h = place.of(rng.normal(size=(10, *manifest.input.shape)).astype(np.float32))
        y = place.of(rng.integers(0, 4, 10))
        for block in blocks:
            result = block.step(h, y, {"lr": 0.02, **manifest.optimizer.hyper}, 0, 0, micro_batch)
            h = result.h
            found.append((result.loss, result.metric))
        states.append({f"{block.index} {name}": value for block in blocks for name, value in block.state().items()})
    half = len(found) // 2
    np.testing.assert_allclose(found[half:], found[:half], rtol=1e-4)
    for name, value in states[0].items():
        np.testing.assert_allclose(states[1][name], value, rtol=1e-3, atol=1e-4, err_msg=name)


@places
def test_tensors_of_a_device(make: Make) -> None:
    place = make().place
    values = np.arange(64 * 6, dtype=np.float32).reshape(64, 3, 2)
    tensor = place.of(values)
    assert isinstance(tensor, DeviceTensor)
    np.testing.assert_array_equal(tensor.array(), values)
    part = tensor.rows(16, 48).rows(8, 24)
    np.testing.assert_array_equal(part.array(), values[24:40])
    tensor.fill(-values)
    np.testing.assert_array_equal(part.array(), -values[24:40])
    np.testing.assert_array_equal(place.zeros((3,), "int64").array(), np.zeros(3, np.int64))


@places
def test_a_graph_reads_and_writes_parts_of_tensors(make: Make) -> None:
    """Inference of a whole batch against that of rows 4 to 12, given and taken as parts of larger tensors."""
    (first, *_), place = blocks_of("residual", make()), make().place
    x = place.of(np.random.default_rng(0).normal(size=(16, *first.bundle.manifest.input.shape)).astype(np.float32))
    whole, part = first.forward(x).array(), first.forward(x.rows(4, 12)).array()
    np.testing.assert_allclose(part, whole[4:12], rtol=1e-5, atol=1e-6)


@places
def test_memory_that_a_device_has_not_is_an_error_of_ours(make: Make) -> None:
    with pytest.raises(OverBudgetError, match="memory of the device for float32"):
        make().place.empty((1 << 40,), "float32")


@needs_gpu
def test_no_node_runs_on_the_cpu() -> None:
    """Of any graph, in any bundle. `cuda()` refuses such nodes, so this says which, should there be some."""
    if not cuda().tells:
        pytest.skip("this runtime does not say where nodes went; it refuses those that would go to the CPU")
    strays = {}
    provider = replace(cuda(), may_fall_back=True)  # the same arena
    for bundle in ("residual", "dropout"):
        opened = open_bundle(GOLDEN / bundle)
        for spec in opened.manifest.blocks:
            for graph in (spec.step, spec.forward, *([spec.head] if spec.head else [])):
                session = provider.session(opened.read(graph.file), 1, 16)
                if found := stray_nodes(session, NAME):
                    strays[graph.file] = dict(found)
    assert not strays


@needs_gpu
def test_the_device_s_memory_is_counted() -> None:
    place = cuda().place
    tensor = place.zeros((1,), "float32")  # the context, the arena
    before = device_memory()
    assert 0 < before.free < before.total
    large = place.zeros((128 * MIB,), "float32")
    assert before.free - device_memory().free >= 511 * MIB
    assert large.nbytes == 512 * MIB
    assert tensor.nbytes == 4
