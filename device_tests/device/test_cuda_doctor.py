"""What the doctor says of a GPU, its driver, and the runtime's CUDA."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from device_tests.device.test_doctor import INFO, machine, put
from edgelocal.commands.doctor import doctor_report, doctor_table
from edgelocal.machine.cuda_doctor import Cuda, capabilities, cuda_advice, cuda_problems
from edgelocal.machine.cuda_libraries import CudaSetup, Library
from edgelocal.machine.device import DeviceInfo
from edgelocal.machine.doctor import examine
from edgelocal.machine.elf import GpuCode
from edgelocal.machine.gpu import Gpu, read_gpu

CLOSED = "NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.216.03  Thu Apr  3 01:14:19 UTC 2025\nGCC: 12"
OPEN = "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  580.142  Release Build  (builder)\nGCC: 13"
INFORMATION = "Model: \t\t NVIDIA H200\nIRQ:   \t\t 116\nGPU UUID: \t GPU-1\nBus Location: \t 0000:{}:00.0\n"
ORIN = "nvidia,p3737-0000+p3701-0005\0nvidia,p3701-0005\0nvidia,tegra234\0"
THOR = "nvidia,p4071-0000+p3834-0008\0nvidia,tegra264\0"

FOUND = (("system", "/usr/lib/x86_64-linux-gnu/a"),)
NAMES = ("libcublas.so.13", "libcudart.so.13", "libcuda.so.1", "libcudnn.so.9")
SETUP = CudaSetup(True, 13, GpuCode((75, 80, 86, 90, 120), ()), tuple(Library(name, True, FOUND) for name in NAMES))
H200 = Gpu(("NVIDIA H200",), "580.142")
GPU_BUILD = {"onnxruntime-gpu": "1.31.1"}
MACHINE = machine("x86_64", "cuda", "3.11")


def without(*names: str) -> CudaSetup:
    left = (dataclasses.replace(x, places=() if x.name in names else x.places) for x in SETUP.libraries)
    return dataclasses.replace(SETUP, libraries=tuple(left))


def said(info: DeviceInfo, runtimes: dict[str, str], gpu: Gpu, setup: CudaSetup) -> str:
    return "\n".join(f"{p.found} -> {p.remedy}" for p in cuda_problems(info, runtimes, Cuda(gpu, setup)))


@pytest.mark.parametrize(("text", "driver"), [(CLOSED, "535.216.03"), (OPEN, "580.142"), ("nonsense 1.2.3", None)])
def test_the_driver_s_version(tmp_path: Path, text: str, driver: str | None) -> None:
    put(tmp_path, {"proc/driver/nvidia/version": text})
    gpu = read_gpu(tmp_path)
    assert gpu == Gpu((), driver)
    assert gpu.driver_release == (None if driver is None else int(driver[:3]))


def test_the_names_of_all_gpus(tmp_path: Path) -> None:
    folder = "proc/driver/nvidia/gpus/0000:{}:00.0/information"
    put(tmp_path, {folder.format(bus): INFORMATION.format(bus) for bus in ("19", "3b")})
    assert read_gpu(tmp_path) == Gpu(("NVIDIA H200", "NVIDIA H200"))


@pytest.mark.parametrize(
    ("compatible", "name", "capability"), [(ORIN, "Orin (in the chip)", 87), (THOR, "Thor (in the chip)", 110)]
)
def test_a_jetson_is_known_by_its_chip(tmp_path: Path, compatible: str, name: str, capability: int) -> None:
    put(tmp_path, {"proc/device-tree/compatible": compatible})
    assert read_gpu(tmp_path) == Gpu((name,), None, capability, shared_memory=True)
    put(tmp_path, {"proc/device-tree/compatible": "raspberrypi,5-model-b\0brcm,bcm2712\0"})
    assert read_gpu(tmp_path) == Gpu()


def test_nothing_is_said_where_all_is_there_or_nobody_asked() -> None:
    assert said(MACHINE, GPU_BUILD, H200, SETUP) == ""
    assert said(INFO, {"onnxruntime": "1.31.1"}, Gpu(), CudaSetup()) == ""
    assert said(MACHINE, {}, H200, CudaSetup()) == ""
    assert said(MACHINE, {"onnxruntime-training-cpu": "1.19.2"}, H200, CudaSetup()) == ""
    assert said(MACHINE, {"onnxruntime": "1.31.1", **GPU_BUILD}, H200, without("libcudnn.so.9")) == ""


def test_a_runtime_for_the_cpu_beside_a_gpu() -> None:
    assert said(MACHINE, {"onnxruntime": "1.31.1"}, H200, CudaSetup()) == (
        "there is an NVIDIA GPU, and onnxruntime 1.31.1 is for the CPU only -> to train with --device cuda: "
        'pip uninstall -y onnxruntime && pip install "onnxruntime-gpu[cuda,cudnn]>=1.28" (CUDA 13; for a driver of '
        'CUDA 12: "onnxruntime-gpu[cuda,cudnn]>=1.23.2,<1.27"); --device cpu works as it is'
    )
    old_jetson = machine("aarch64", "jetson", "3.10")
    assert said(old_jetson, {"onnxruntime": "1.20.0"}, Gpu(), CudaSetup()) == ""  # there is nothing to install
    assert cuda_advice(old_jetson, {}) == (
        "no onnxruntime-gpu wheel is known for this GPU and Python 3.10; use --device cpu"
    )


def test_a_runtime_for_a_gpu_without_one_or_without_its_provider() -> None:
    assert "for an NVIDIA GPU, and none is seen here -> install NVIDIA's driver" in said(INFO, GPU_BUILD, Gpu(), SETUP)
    text = said(MACHINE, GPU_BUILD, H200, CudaSetup())
    assert text.startswith("onnxruntime-gpu 1.31.1 has no CUDA provider -> pip uninstall -y onnxruntime-gpu && pip ins")


def test_missing_libraries_and_what_brings_them() -> None:
    setup = without("libcublas.so.13", "libcudnn.so.9")
    found = "onnxruntime-gpu 1.31.1 does not find these libraries of CUDA 13: libcublas.so.13, libcudnn.so.9"
    assert said(MACHINE, GPU_BUILD, H200, setup) == f'{found} -> pip install "onnxruntime-gpu[cuda,cudnn]==1.31.1"'
    jetson = machine("aarch64", "thor", "3.12")
    assert said(jetson, GPU_BUILD, Gpu(), setup).startswith(f"{found} -> JetPack brings them: sudo apt install nvidia-")
    old = said(MACHINE, {"onnxruntime-gpu": "1.20.1"}, H200, setup)
    assert '-> a newer one brings them: pip install "onnxruntime-gpu[cuda,cudnn]>=1.28"' in old
    driver = said(MACHINE, GPU_BUILD, H200, without("libcuda.so.1"))
    assert driver.startswith("NVIDIA's driver library libcuda.so.1 is not found -> install NVIDIA's driver")
    unknown = said(MACHINE, GPU_BUILD, H200, dataclasses.replace(setup, major=None))
    assert "does not find these libraries: libcublas" in unknown


@pytest.mark.parametrize(
    ("major", "driver", "wanted"),
    [(13, "575.57", 580), (13, "580.1", None), (12, "520.61.05", 525), (12, "525.1", None), (None, "300.1", None)],
)
def test_a_driver_that_is_too_old(major: int | None, driver: str, wanted: int | None) -> None:
    text = said(MACHINE, GPU_BUILD, Gpu(("GPU",), driver), dataclasses.replace(SETUP, major=major))
    if wanted is None:
        assert text == ""
    else:
        found = f"is for CUDA {major}, which wants a driver of release {wanted} or later; this is {driver} -> update"
        assert found in text
        assert ("<1.27" in text) == (major == 13)


def test_a_build_without_code_for_the_gpu() -> None:
    thor = Gpu(("Thor",), None, 110, shared_memory=True)
    text = said(machine("aarch64", "thor", "3.12"), GPU_BUILD, thor, SETUP)
    assert text.startswith(
        "onnxruntime-gpu 1.31.1 has no code for this GPU of compute capability 11.0, only for 7.5, 8.0, 8.6, 9.0, 12.0"
    )
    orin = dataclasses.replace(thor, capability=87)
    assert said(machine("aarch64", "orin", "3.10"), GPU_BUILD, orin, SETUP) == ""
    unread = dataclasses.replace(SETUP, code=None)
    assert said(machine("aarch64", "thor", "3.12"), GPU_BUILD, thor, unread) == ""
    assert capabilities(GpuCode((80, 90), (90,))) == "8.0, 9.0 and PTX 9.0"


def shown(report: dict[str, object]) -> str:
    file = io.StringIO()
    Console(file=file, width=200).print(doctor_table(report))
    return file.getvalue()


def test_the_report_has_it_as_json_and_as_a_table() -> None:
    gpu = Gpu(("Orin (in the chip)",), "540.4.0", 87, shared_memory=True)
    report = examine(MACHINE, GPU_BUILD, Cuda(gpu, without("libcudnn.so.9"))).as_dict()
    values = json.loads(json.dumps(report))
    assert values["cuda"]["gpu"]["driver"] == "540.4.0"
    assert values["cuda"]["setup"]["missing"] == ["libcudnn.so.9"]
    assert len(values["problems"]) == 2  # cuDNN, and a driver of CUDA 12
    text = shown(report)
    assert "Orin (in the chip), compute capability 8.7, driver 540.4.0, in the memory of the CPU" in text
    assert "in the installed runtime, CUDA 13, code for 7.5, 8.0, 8.6, 9.0, 12.0" in text
    assert "system: /usr/lib/x86_64-linux-gnu/a" in text
    assert text.count("│ not found ") == 1
    assert "libcuda.so.1" not in shown(examine(MACHINE, {}).as_dict())


def test_this_machine_is_looked_at() -> None:
    report = doctor_report()
    assert set(report["cuda"]) == {"gpu", "setup"}
    assert "machine" in shown(report)
