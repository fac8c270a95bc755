"""Loading the CUDA libraries, and what is said where CUDA does not work, for reasons as the real runtime gave them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest

from device_tests.device.fake_gpu import FakeGpu
from device_tests.device.test_cuda_doctor import H200, MACHINE, SETUP, without
from edgelocal.errors import OverBudgetError, RuntimeMissingError
from edgelocal.machine.cuda_doctor import Cuda
from edgelocal.machine.cuda_libraries import CudaSetup
from edgelocal.machine.device import DeviceInfo
from edgelocal.machine.elf import GpuCode
from edgelocal.machine.packages import accelerator
from edgelocal.runtime import cuda_setup
from edgelocal.runtime.cuda import open_cuda
from edgelocal.runtime.cuda_setup import LEFT_OUT, PROVIDER, explained, load_libraries, preload
from edgelocal.runtime.library import CPU_PROVIDER, runtime, translated

NO_DEVICE = (
    "/src/core/providers/cuda/cuda_call.cc:154 CudaCall(ERRTYPE, const char*) [with ERRTYPE = cudaError] CUDA failure "
    "100: no CUDA-capable device is detected ; GPU=-1 ; hostname=vm ; expr=cudaSetDevice(info_.device_id);\n"
)
NO_KERNEL = (
    "Non-zero status code returned while running Add node. Name:'' Status Message: CUDA error "
    "cudaErrorNoKernelImageForDevice:no kernel image is available for execution on the device"
)


@dataclasses.dataclass
class Gpu:
    """A runtime with the CUDA provider."""

    printed: str = ""
    providers: tuple[str, ...] = (PROVIDER, CPU_PROVIDER)
    preloaded: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def get_available_providers(self) -> list[str]:
        return list(self.providers)

    def preload_dlls(self, **wanted: Any) -> None:
        print(self.printed)
        self.preloaded.append(wanted)


class OldGpu(Gpu):
    """One that cannot load libraries ahead, as those before 1.21."""

    preload_dlls = property()  # type: ignore[assignment]


def machine_with(setup: CudaSetup) -> Callable[[], tuple[DeviceInfo, Cuda]]:
    return lambda: (MACHINE, Cuda(H200, setup))


def said(reason: str, setup: CudaSetup = SETUP, gpu: Gpu | None = None) -> str:
    error = explained(reason, gpu or Gpu(), machine_with(setup), FakeGpu().load)
    assert isinstance(error, RuntimeMissingError)
    return str(error)


@pytest.fixture(autouse=True)
def gpu_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_setup, "installed_runtimes", lambda: {"onnxruntime-gpu": "1.31.1"})


def test_what_the_runtime_prints_is_kept_from_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    gpu = Gpu(printed="Failed to load libcufft.so.12")
    load_libraries(gpu, machine_with(SETUP))
    assert gpu.preloaded == [
        {"cuda": True, "cudnn": False, "directory": ""},
        {"cuda": False, "cudnn": True, "directory": ""},
    ]
    assert capfd.readouterr() == ("", "")


def test_libraries_are_loaded_from_where_they_were_found() -> None:
    libraries = tuple(
        dataclasses.replace(library, places=(("torch", f"/site/torch/lib/{library.name}"),))
        for library in SETUP.libraries
    )
    gpu = Gpu(printed="Failed to load nothing")
    assert preload(gpu, dataclasses.replace(SETUP, libraries=libraries)) == "Failed to load nothing\n" * 2
    assert [wanted["directory"] for wanted in gpu.preloaded] == ["/site/torch/lib"] * 2


def test_a_runtime_that_would_train_on_the_cpu_unseen_is_refused_with_what_is_missing() -> None:
    assert said(LEFT_OUT, without("libcublas.so.13", "libcudnn.so.9")) == (
        "CUDA cannot be used (the runtime could not load its CUDA provider and would go on with the CPU): "
        "onnxruntime-gpu 1.31.1 does not find these libraries of CUDA 13: libcublas.so.13, libcudnn.so.9 -> pip "
        'install "onnxruntime-gpu[cuda,cudnn]==1.31.1"; or train with --device cpu'
    )


def test_what_the_runtime_raises_is_said_shortly() -> None:
    text = said(NO_DEVICE)
    assert text.startswith("CUDA cannot be used (CUDA failure 100: no CUDA-capable device is detected): see `edgelocal")
    assert "no kernel image is available for execution on the device" in said(NO_KERNEL)
    assert "(something else entirely)" in said("something else\nentirely")


def test_a_gpu_that_the_build_has_no_code_for_is_said_by_what_cuda_tells_of_it() -> None:
    setup = dataclasses.replace(SETUP, code=GpuCode((90, 120), ()))
    assert "no code for this GPU of compute capability 8.7, only for 9.0, 12.0" in said(NO_KERNEL, setup)
    broken = FakeGpu(codes={"cudaDeviceGetAttribute": 35})
    assert "compute capability" not in str(explained(NO_KERNEL, Gpu(), machine_with(setup), broken.load))


def test_a_device_without_memory_is_over_the_budget() -> None:
    error = explained("... CUDA failure 2: out of memory ; GPU=0", Gpu(), machine_with(SETUP))
    assert isinstance(error, OverBudgetError)
    assert "no memory for a CUDA context (CUDA failure 2: out of memory); stop other programs" in str(error)


def test_an_old_runtime_is_told_where_the_libraries_are() -> None:
    gpu = OldGpu()
    assert preload(gpu, SETUP) == ""
    folder = "/usr/local/cuda-12.6/lib64"
    libraries = tuple(
        dataclasses.replace(library, places=(("CUDA folder", f"{folder}/{library.name}"),))
        for library in SETUP.libraries
    )
    setup = dataclasses.replace(SETUP, libraries=libraries)
    wanted = f"loads what the system's loader knows: export LD_LIBRARY_PATH={folder}; or train"
    assert wanted in said(LEFT_OUT, setup, OldGpu())
    assert "LD_LIBRARY_PATH" not in said(LEFT_OUT, setup)


def test_libraries_missing_where_the_doctor_sees_no_problem_are_still_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_setup, "installed_runtimes", dict)  # a build that no distribution brought
    assert "CUDA 13 libraries that were not found: libcudart.so.13;" in said(LEFT_OUT, without("libcudart.so.13"))


def test_a_runtime_without_the_provider() -> None:
    with pytest.raises(RuntimeMissingError, match=f"the ONNX Runtime that is installed has no {PROVIDER}: pip unin"):
        load_libraries(Gpu(providers=(CPU_PROVIDER,)), machine_with(SETUP))


@pytest.mark.parametrize(
    "text",
    [
        "Non-zero status code returned while running Conv node. Status Message: cuDNN is not available. Install cuDNN",
        NO_KERNEL,
    ],
)
def test_what_is_missing_only_shows_in_a_run_and_is_no_fault_of_the_bundle(text: str) -> None:
    error = translated(RuntimeError(text), "step.onnx failed")
    assert isinstance(error, RuntimeMissingError)
    assert str(error).endswith("; `edgelocal doctor` says what is missing")


def test_cuda_out_of_memory_is_over_the_budget() -> None:
    for text in ("CUDA failure 2: out of memory ; GPU=0", "CUBLAS failure 3: CUBLAS_STATUS_ALLOC_FAILED ; GPU=0"):
        assert isinstance(translated(RuntimeError(text), "step.onnx failed"), OverBudgetError)


@pytest.mark.skipif(
    PROVIDER not in runtime().get_available_providers() or bool(accelerator(cuda_setup.look()[0])),
    reason="wants a runtime with CUDA on a machine without",
)
def test_the_real_runtime_without_a_gpu_is_refused() -> None:
    with pytest.raises(RuntimeMissingError, match=r"CUDA cannot be used .*none is seen here"):
        open_cuda()
