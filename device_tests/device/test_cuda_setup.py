"""CUDA made ready with runtimes that play the GPU's; when something is missing they do what the real one did."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest

from device_tests.device.fake_gpu import CONTEXT, FakeGpu
from device_tests.device.test_cuda_doctor import H200, MACHINE, SETUP, without
from edgelocal.errors import EdgelocalError, OverBudgetError, RuntimeMissingError
from edgelocal.machine.cuda_doctor import Cuda
from edgelocal.machine.cuda_libraries import CudaSetup
from edgelocal.machine.device import DeviceInfo
from edgelocal.machine.gpu_libraries import LibraryError
from edgelocal.machine.gpu_memory import Meter, gpu_meter
from edgelocal.machine.packages import accelerator
from edgelocal.runtime import cuda_setup
from edgelocal.runtime.cuda_setup import PROVIDER, make_ready, preload
from edgelocal.runtime.library import CPU_PROVIDER, runtime, translated

NO_DEVICE = (
    "/src/core/providers/cuda/cuda_call.cc:154 CudaCall(ERRTYPE, const char*) [with ERRTYPE = cudaError] CUDA failure "
    "100: no CUDA-capable device is detected ; GPU=-1 ; hostname=vm ; expr=cudaSetDevice(info_.device_id);\n"
)
NO_KERNEL = (
    "Non-zero status code returned while running Add node. Name:'' Status Message: CUDA error "
    "cudaErrorNoKernelImageForDevice:no kernel image is available for execution on the device"
)


class Session:
    """The CPU's, under the name of CUDA."""

    def __init__(self, gpu: Gpu, model: bytes, options: Any) -> None:
        self._gpu = gpu
        self._real = runtime().InferenceSession(model, options, providers=[CPU_PROVIDER])

    def get_providers(self) -> list[str]:
        return [CPU_PROVIDER] if self._gpu.silent else [PROVIDER, CPU_PROVIDER]

    def run(self, names: list[str], feeds: dict[str, Any]) -> Any:
        if self._gpu.at_run:
            raise RuntimeError(self._gpu.at_run)
        return [y + self._gpu.wrong_by for y in self._real.run(names, feeds)]


@dataclasses.dataclass
class Gpu:
    """A runtime with the CUDA provider. `silent`: it goes on with the CPU; `at_load`, `at_run`: what it then raises."""

    silent: bool = False
    at_load: str = ""
    at_run: str = ""
    wrong_by: float = 0.0
    printed: str = ""
    providers: tuple[str, ...] = (PROVIDER, CPU_PROVIDER)
    preloaded: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    SessionOptions = staticmethod(lambda: runtime().SessionOptions())
    GraphOptimizationLevel = property(lambda self: runtime().GraphOptimizationLevel)

    def get_available_providers(self) -> list[str]:
        return list(self.providers)

    def preload_dlls(self, **wanted: Any) -> None:
        print(self.printed)
        self.preloaded.append(wanted)

    def InferenceSession(  # noqa: N802 (the name is the runtime's)
        self, model: bytes, options: Any, *, providers: list[str], enable_fallback: int
    ) -> Session:
        assert (providers, enable_fallback) == ([PROVIDER], 0)
        if self.at_load:
            raise RuntimeError(self.at_load)
        return Session(self, model, options)


class OldGpu(Gpu):
    """One that cannot load libraries ahead, as those before 1.21."""

    preload_dlls = property()  # type: ignore[assignment]


def ready(gpu: Gpu, setup: CudaSetup = SETUP, device: FakeGpu | None = None) -> Meter:
    device = device or FakeGpu()

    def look() -> tuple[DeviceInfo, Cuda]:
        return MACHINE, Cuda(H200, setup)

    return make_ready(gpu, look, lambda: gpu_meter(device.load, Path("/nowhere"), 4242))


def said(gpu: Gpu, setup: CudaSetup = SETUP) -> tuple[type[EdgelocalError], str]:
    with pytest.raises(EdgelocalError) as caught:
        ready(gpu, setup)
    return caught.type, str(caught.value)


@pytest.fixture(autouse=True)
def gpu_build(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_setup, "installed_runtimes", lambda: {"onnxruntime-gpu": "1.31.1"})


def test_a_gpu_that_works_is_ready_and_nothing_is_printed(capfd: pytest.CaptureFixture[str]) -> None:
    gpu = Gpu(printed="Failed to load libcufft.so.12")
    assert ready(gpu).used_bytes() == CONTEXT
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
    kind, text = said(Gpu(silent=True), without("libcublas.so.13", "libcudnn.so.9"))
    assert kind is RuntimeMissingError
    assert text == (
        "CUDA cannot be used (the runtime could not load its CUDA provider and would go on with the CPU): "
        "onnxruntime-gpu 1.31.1 does not find these libraries of CUDA 13: libcublas.so.13, libcudnn.so.9 -> pip "
        'install "onnxruntime-gpu[cuda,cudnn]==1.31.1"; or train with --device cpu'
    )


def test_what_the_runtime_raises_is_said_shortly() -> None:
    kind, text = said(Gpu(at_load=NO_DEVICE))
    assert kind is RuntimeMissingError
    assert text.startswith("CUDA cannot be used (CUDA failure 100: no CUDA-capable device is detected): see `edgelocal")
    kind, text = said(Gpu(at_run=NO_KERNEL))
    assert "no kernel image is available for execution on the device" in text
    kind, text = said(Gpu(at_load="something else\nentirely"))
    assert "(something else entirely)" in text


def test_a_device_without_memory_is_over_the_budget() -> None:
    kind, text = said(Gpu(at_load="... CUDA failure 2: out of memory ; GPU=0"))
    assert kind is OverBudgetError
    assert "no memory for a CUDA context (CUDA failure 2: out of memory); stop other programs" in text


def test_a_gpu_that_cannot_add_is_not_trusted() -> None:
    assert "1 + 1 is 3.0 on this GPU" in said(Gpu(wrong_by=1.0))[1]


def test_the_runtime_is_heard_before_the_meter() -> None:
    broken = FakeGpu(codes={"cudaDeviceGetAttribute": 35})
    with pytest.raises(RuntimeMissingError, match="CUDA failure 100"):
        ready(Gpu(at_load=NO_DEVICE), device=broken)
    with pytest.raises(LibraryError, match="cudaDeviceGetAttribute gave error 35"):
        ready(Gpu(), device=broken)


def test_an_old_runtime_is_told_where_the_libraries_are() -> None:
    gpu = OldGpu()
    assert preload(gpu, SETUP) == ""
    ready(gpu)
    folder = "/usr/local/cuda-12.6/lib64"
    libraries = tuple(
        dataclasses.replace(library, places=(("CUDA folder", f"{folder}/{library.name}"),))
        for library in SETUP.libraries
    )
    text = said(OldGpu(silent=True), dataclasses.replace(SETUP, libraries=libraries))[1]
    assert f"loads what the system's loader knows: export LD_LIBRARY_PATH={folder}; or train" in text
    assert "LD_LIBRARY_PATH" not in said(Gpu(silent=True), dataclasses.replace(SETUP, libraries=libraries))[1]


def test_a_runtime_without_the_provider() -> None:
    kind, text = said(Gpu(providers=(CPU_PROVIDER,)))
    assert kind is RuntimeMissingError
    assert text.startswith(f"the ONNX Runtime that is installed has no {PROVIDER}: ")


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
        make_ready(runtime())
