"""Meters of device memory, with libraries that are invented."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from device_tests.device.fake_gpu import CONTEXT, MIB, FakeGpu
from edgelocal.errors import RuntimeMissingError
from edgelocal.machine import gpu_libraries
from edgelocal.machine.gpu_libraries import NVML, CudaRuntime, LibraryError, Nvml
from edgelocal.machine.gpu_memory import DeviceMemory, Meter, device_memory, gpu_meter

GIB = 1 << 30


def meter_of(gpu: FakeGpu, root: Path, pid: int = 4242) -> Meter:
    return gpu_meter(gpu.load, root, pid)


def meminfo(root: Path, available_kib: int, mapped_kib: int | None = None) -> None:
    (root / "proc").mkdir(exist_ok=True)
    mapped = "" if mapped_kib is None else f"NvMapMemFree:  100 kB\nNvMapMemUsed:  {mapped_kib} kB\n"
    (root / "proc/meminfo").write_text(f"MemTotal:  8000000 kB\nMemAvailable:  {available_kib} kB\n{mapped}")


def test_the_layout_of_nvml_s_structures_is_that_of_its_header() -> None:
    process = gpu_libraries._Process
    assert ctypes.sizeof(process) == 24
    assert [getattr(process, name).offset for name, _ in process._fields_] == [0, 8, 16, 20]
    assert ctypes.sizeof(gpu_libraries._Memory) == 24


def test_nvml_counts_this_process_with_its_context_and_no_other(tmp_path: Path) -> None:
    gpu = FakeGpu(others={1: GIB, 2: 2 * GIB})
    meter = meter_of(gpu, tmp_path)
    assert (meter.source, meter.shared, meter.counts_context) == ("nvml", False, True)
    assert meter.used_bytes() == CONTEXT
    gpu.own += 100 * MIB
    gpu.others[1] += GIB
    assert meter.used_bytes() == CONTEXT + 100 * MIB
    assert meter.free_bytes() == gpu.total - gpu.used


def test_in_a_container_the_process_is_known_by_what_it_takes(tmp_path: Path) -> None:
    gpu = FakeGpu(others={17: GIB}, listed_as=90210)
    meter = meter_of(gpu, tmp_path, pid=17)
    assert meter.source == "nvml"
    gpu.own += 5 * MIB
    assert meter.used_bytes() == CONTEXT + 5 * MIB
    assert gpu.own == CONTEXT + 5 * MIB  # what was taken to know it is given back


@pytest.mark.parametrize(
    "change",
    [
        {"listed_as": None},
        {"known": False},
        {"codes": {"nvmlDeviceGetComputeRunningProcesses_v3": 3}},
        {"without": ("nvmlDeviceGetComputeRunningProcesses_v3", "nvmlDeviceGetComputeRunningProcesses_v2")},
    ],
)
def test_a_hidden_process_is_told_by_what_the_device_became_fuller(tmp_path: Path, change: dict[str, object]) -> None:
    gpu = FakeGpu(others={1: GIB}, **change)  # type: ignore[arg-type]
    meter = meter_of(gpu, tmp_path)
    assert (meter.source, meter.counts_context) == ("driver", True)
    assert meter.used_bytes() == CONTEXT
    gpu.own += MIB
    assert meter.used_bytes() == CONTEXT + MIB
    gpu.others.clear()
    assert meter.used_bytes() == 0  # it never is less than nothing


@pytest.mark.parametrize(
    "change",
    [
        {"without": (NVML,)},
        {"codes": {"nvmlInit_v2": 9}},
        {"codes": {"nvmlDeviceGetHandleByPciBusId_v2": 6}},
        {"listed_as": None, "codes": {"nvmlDeviceGetMemoryInfo": 3}},
        {"listed_as": None, "without": ("nvmlDeviceGetMemoryInfo",)},
    ],
)
def test_without_nvml_the_context_is_not_counted(tmp_path: Path, change: dict[str, object]) -> None:
    gpu = FakeGpu(**change)  # type: ignore[arg-type]
    meter = meter_of(gpu, tmp_path)
    assert (meter.source, meter.counts_context) == ("driver", False)
    assert meter.used_bytes() == 0
    gpu.own += 7 * MIB
    assert meter.used_bytes() == 7 * MIB


def test_an_orin_by_what_its_driver_has_mapped(tmp_path: Path) -> None:
    gpu = FakeGpu(total=8 * GIB, integrated=True, without=(NVML,))
    meminfo(tmp_path, available_kib=5_000_000, mapped_kib=200_000)
    meter = meter_of(gpu, tmp_path)
    assert (meter.source, meter.shared, meter.counts_context) == ("driver", True, True)
    meminfo(tmp_path, available_kib=4_000_000, mapped_kib=260_000)
    assert meter.used_bytes() == 60_000 * 1024
    assert meter.free_bytes() == 4_000_000 * 1024


def test_a_thor_by_nvml_s_processes_though_it_knows_no_memory_of_the_device(tmp_path: Path) -> None:
    gpu = FakeGpu(total=128 * GIB, integrated=True, codes={"nvmlDeviceGetMemoryInfo": 3})
    meminfo(tmp_path, available_kib=100_000_000)
    meter = meter_of(gpu, tmp_path)
    assert (meter.source, meter.shared) == ("nvml", True)
    assert meter.used_bytes() == CONTEXT
    assert meter.free_bytes() == 100_000_000 * 1024


def test_a_shared_device_that_nobody_knows_is_asked_itself(tmp_path: Path) -> None:
    gpu = FakeGpu(integrated=True, without=(NVML,))
    meter = meter_of(gpu, tmp_path)
    gpu.own += MIB
    assert (meter.used_bytes(), meter.free_bytes()) == (MIB, gpu.total - gpu.used)


def test_the_runtime_library_that_is_loaded_is_taken_before_a_newer_one() -> None:
    twelve = FakeGpu()
    assert CudaRuntime(twelve.load).capability() == 87  # the last of those that are tried
    nowhere = "libnowhere.so.99"
    assert gpu_libraries.loaded_first((nowhere, "libc.so.6")) == ("libc.so.6", nowhere)
    assert gpu_libraries.loaded_first((nowhere, "libnot.so.1")) == (nowhere, "libnot.so.1")


def test_many_processes_take_a_second_question() -> None:
    gpu = FakeGpu(others=dict.fromkeys(range(100), MIB), own=CONTEXT)
    assert len(Nvml("0000:19:00.0", gpu.load).processes()) == 101
    assert gpu.listings == 2


def test_an_older_driver_has_an_older_list(tmp_path: Path) -> None:
    gpu = FakeGpu(without=("nvmlDeviceGetComputeRunningProcesses_v3",))
    assert meter_of(gpu, tmp_path).source == "nvml"


def test_a_device_too_full_to_know_the_process(tmp_path: Path) -> None:
    gpu = FakeGpu(codes={"cudaMalloc": 2})
    assert meter_of(gpu, tmp_path).source == "driver"


def test_capability_and_memory_of_the_device() -> None:
    gpu = FakeGpu(total=10 * GIB, others={1: GIB})
    assert CudaRuntime(gpu.load).capability() == 87
    assert device_memory(gpu.load) == DeviceMemory(9 * GIB - CONTEXT, 10 * GIB)


def test_no_library_or_no_device_is_said() -> None:
    with pytest.raises(LibraryError, match=r"none of .*libcudart.so.12, libcudart.so.11.0 can be loaded; see"):
        device_memory(FakeGpu(without=("libcudart.so.11.0",)).load)
    with pytest.raises(RuntimeMissingError, match=r"CUDA does not answer \(cudaMemGetInfo gave error 100\)"):
        device_memory(FakeGpu(codes={"cudaMemGetInfo": 100}).load)


def test_the_real_libraries_answer_or_are_said_to_be_missing() -> None:
    try:
        free = gpu_meter().free_bytes()
    except LibraryError as error:
        free = None
        said = str(error)
    assert free or "see `edgelocal doctor`" in said
