"""The side-by-side benchmark on a device, told without one: programs, meters, the reader of reports."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import pytest
import torch

from edgelocal.bundle.spec import RuleSpec, TaskSpec
from edgelocal.errors import UsageError
from edgelocal.exporters.bench import meters, own_side
from edgelocal.exporters.bench.meters import CudaMeter, Peak
from edgelocal.exporters.bench.own_side import device_options, export_request
from edgelocal.exporters.bench.result import Setting
from edgelocal.exporters.bench.torch_steps import LR, Mode, local_step
from edgelocal.exporters.optimizers import sgd
from edgelocal.exporters.oracle import Oracle
from edgelocal.exporters.partition import partition
from edgelocal.exporters.rules import build_blocks
from edgelocal.exporters.units import load_network

GPU = Setting("resnet8", device="cuda")


def test_the_local_program_is_the_training_that_graphs_are_compared_with() -> None:
    network = load_network("resnet8", (3, 16, 16), 10, 0)
    cut = partition(network, blocks=2, rule="auglocal", depth=1, tail="merge")
    blocks = build_blocks(network, RuleSpec("auglocal", 1, 0.5, 1, "merge"), cut, seed=0)
    task, optimizer = TaskSpec("cross_entropy", 10, 0.0, ()), sgd(0.9, 1e-4, nesterov=True)
    oracle = Oracle(copy.deepcopy(list(blocks)), task, optimizer.reference, torch.float32)
    step = local_step(blocks, Setting("resnet8"))
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        x, y = torch.randn(4, 3, 16, 16, generator=generator), torch.randint(10, (4,), generator=generator)
        assert step(x, y) == pytest.approx(float(oracle.step(x, y, LR)[-1][0]), rel=1e-5)
    assert all(p.grad is None for block in blocks for p in block.parameters())  # freed with the block's update
    for block, other in zip(blocks, oracle.blocks, strict=True):
        torch.testing.assert_close(block.state_dict(), other.state_dict(), rtol=1e-5, atol=1e-5)


class Device:
    """A GPU on which this process holds `used` bytes; the first tensor brings the context."""

    def __init__(self) -> None:
        self.used, self.allocated, self.emptied = 0, 0, 0

    def used_bytes(self) -> int:
        return self.used


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    found = Device()

    def ones(*size: int, device: str) -> torch.Tensor:
        found.used += 500
        return torch.zeros(1)

    def forget() -> None:
        found.allocated = 0

    def empty() -> None:
        found.emptied += 1

    for name, fake in {
        "is_available": lambda: True,
        "synchronize": lambda: None,
        "empty_cache": empty,
        "reset_peak_memory_stats": forget,
        "max_memory_allocated": lambda: found.allocated,
        "max_memory_reserved": lambda: 70,
    }.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(torch, "ones", ones)
    monkeypatch.setattr(meters, "gpu_meter", lambda: found)
    return found


def test_context_allocator_and_process_are_told_apart(device: Device) -> None:
    meter = CudaMeter()
    device.used, device.allocated = 500 + 90, 80
    meter.warmed()
    assert meter.read() == Peak(500, 0, 590, 70)
    device.allocated = 60
    assert meter.read() == Peak(500, 60, 590, 70)
    assert not device.emptied  # what the allocator keeps belongs to the peak
    meter.restart()
    assert (meter.read().working_set_bytes, device.emptied) == (0, 1)


def test_no_device_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UsageError, match="sees no CUDA device"):
        CudaMeter()


def report(**device: Any) -> dict[str, Any]:
    known = {"name": "cuda", "context_bytes": 300, "arena_bytes": 50, "peak_bytes": 400, "fallback_nodes": 0}
    return {"idle_bytes": 1, "process_peak_bytes": 3, "device": {**known, **device}}


def test_memory_is_that_of_the_device_the_training_was_on() -> None:
    assert own_side._memory(Setting("resnet8"), {"idle_bytes": 1, "process_peak_bytes": 3}) == (1, 3, None)
    assert own_side._memory(GPU, report()) == (300, 400, 50)
    with pytest.raises(UsageError, match="reported None as its device"):
        own_side._memory(GPU, {"device": None})
    with pytest.raises(UsageError, match=r"4 nodes .* ran on the CPU"):
        own_side._memory(GPU, report(fallback_nodes=4))


def test_what_the_command_is_told() -> None:
    assert device_options(Setting("resnet8")) == []
    assert device_options(GPU) == ["--device", "cuda"]
    assert device_options(Setting("resnet8", device="cuda", precision="tf32")) == ["--device", "cuda", "--tf32"]
    assert device_options(Setting("resnet8", device="cuda", precision="bf16")) == ["--device", "cuda"]


def test_bundles_are_exported_for_the_device() -> None:
    assert export_request(Setting("resnet8"), rule="bp").targets == ("cpu",)
    assert export_request(GPU, rule="bp").targets == ("cuda",)
    assert export_request(replace(GPU, precision="tf32"), rule="bp").precision == "float32"
    assert export_request(replace(GPU, precision="bf16"), rule="bp").precision == "bfloat16"


def test_a_mode_is_checked() -> None:
    Mode("local").check()
    with pytest.raises(UsageError, match="--mode is 'no', expected one of bp, compile"):
        Mode("no").check()
