"""Whole trainings on an NVIDIA GPU, by the real command, and the parts of them that only a GPU can show.

Skipped without one, unless EDGELOCAL_REQUIRE_GPU=1 (test_gpu.py); test_device_training.py has the same of a pretended
device.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from device_tests.device.runs import ARTIFACTS, DROPOUT, RESIDUAL, answer, write_data
from device_tests.device.test_gpu import MIB, cuda, needs_gpu
from edgelocal.bundle.folder import open_bundle
from edgelocal.machine.gpu_memory import device_memory, gpu_meter
from edgelocal.runtime.block import Block
from edgelocal.runtime.cuda_host import pinned
from edgelocal.runtime.graphs import GraphPool
from edgelocal.runtime.pages import HostPage
from edgelocal.runtime.uploads import Uploads

pytestmark = needs_gpu


def trained(bundle: Path, folder: Path, device: str, *more: object) -> dict[str, Any]:
    """The report of two epochs; the last batch of each is short."""
    data = folder / "d.npz"
    if not data.exists():
        write_data(data, DROPOUT if bundle == DROPOUT else RESIDUAL, samples=40)
    out = folder / f"run-{device}-{len(more)}"
    given = ("train", bundle, "--data", data, "--out", out, "--epochs", 2, "--batch", 16, "--runtime", "portable")
    return answer(*given, "--device", device, *more)


@pytest.mark.parametrize("bundle", [RESIDUAL, DROPOUT, ARTIFACTS], ids=lambda path: path.name)
@pytest.mark.parametrize("schedule", ["interleaved", "sequential"])
def test_a_training_ends_where_that_of_the_cpu_does(bundle: Path, schedule: str, tmp_path: Path) -> None:
    host, device = (trained(bundle, tmp_path, name, "--schedule", schedule) for name in ("cpu", "cuda"))
    assert device["validation"]["loss"] == pytest.approx(host["validation"]["loss"], rel=1e-4)
    assert device["device"]["fallback_nodes"] in (0, None)
    found = answer("eval", tmp_path / "run-cuda-2", "--data", tmp_path / "d.npz", "--device", "cuda")
    assert found["loss"] == pytest.approx(device["validation"]["loss"], rel=1e-5)


@pytest.mark.parametrize("more", [(), ("--memory-budget", "90%"), ("--micro-batch", 5)])
def test_the_report_says_what_the_device_held(more: tuple[object, ...], tmp_path: Path) -> None:
    found = trained(ARTIFACTS, tmp_path, "cuda", *more)["device"]
    planned = found["planned"]
    parts = (found["context_bytes"] or 0) + found["arena_bytes"] + found["outside_bytes"]
    assert parts == pytest.approx(found["peak_bytes"], rel=0.02, abs=4 * MIB)
    # What was reserved was given back and seen, but for the driver's own grain.
    assert found["arena_bytes"] >= planned["tensors_bytes"] - 4 * MIB
    assert found["peak_bytes"] <= planned["peak_bytes"] + 64 * MIB


def test_states_wait_in_pinned_memory() -> None:
    opened = open_bundle(RESIDUAL)
    spec = opened.manifest.blocks[0]
    page = HostPage(spec.state(), pinned)
    block = Block(opened, 0, GraphPool(opened, 1, provider=cuda()), page=page)
    for name, value in block.state().items():
        np.testing.assert_array_equal(value, page.read()[name])
    block.close()


def test_batches_go_up_in_turn() -> None:
    uploads = Uploads(cuda().place)
    for number in range(5):
        uploads.turn()
        values = np.full((7, 3), number, np.float32)
        np.testing.assert_array_equal(uploads.of(values).array(), values)
    uploads.clear()


def test_the_arena_gives_back_what_no_tensor_uses() -> None:
    provider = cuda()
    large = provider.place.zeros((64 * MIB,), "float32")
    before = device_memory().free
    assert large.nbytes == 256 * MIB
    del large
    provider.give_back()
    assert device_memory().free - before >= 255 * MIB


def test_the_meter_sees_what_is_taken() -> None:
    meter = gpu_meter()
    provider = cuda()
    provider.give_back()
    before = meter.used_bytes()
    large = provider.place.zeros((64 * MIB,), "float32")
    assert meter.used_bytes() - before == pytest.approx(large.nbytes, abs=4 * MIB)
    assert meter.source in ("nvml", "driver")
