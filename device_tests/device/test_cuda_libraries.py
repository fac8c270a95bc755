"""Where the CUDA libraries are and what is missing, in trees of invented files."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pytest

from device_tests.device.fake_elf import write_cache, write_library
from edgelocal.machine.cuda_libraries import (
    PROVIDER,
    CudaSetup,
    Library,
    loader_cache,
    preload_folders,
    read_cuda,
)
from edgelocal.machine.elf import GpuCode, gpu_code, linked_libraries

# As onnxruntime-gpu 1.31.1 is linked.
LINKED_13 = ("libcublasLt.so.13", "libcublas.so.13", "libcurand.so.10", "libcudart.so.13", "libcuda.so.1", "libc.so.6")
TOOLKIT_13 = LINKED_13[:4]
TOOLKIT_12 = ("libcublasLt.so.12", "libcublas.so.12", "libcurand.so.10", "libcudart.so.12")
SASS = ((2, 75), (2, 80), (2, 86), (2, 90), (2, 86))


def install(root: Path, linked: tuple[str, ...] = LINKED_13) -> Path:
    """A runtime with the provider; gives back its site-packages."""
    site = root / "venv/site-packages"
    write_library(site / PROVIDER, linked, SASS)
    return site


def put(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()


def read(root: Path, *packages: Path, **environment: str) -> CudaSetup:
    return read_cuda(root, [str(folder) for folder in packages], "aarch64", environment)


def sources(setup: CudaSetup) -> dict[str, str | None]:
    return {library.name: library.source for library in setup.libraries}


def test_what_a_library_is_linked_with_and_has_code_for(tmp_path: Path) -> None:
    path = write_library(tmp_path / "lib.so", ("libcudart.so.13", "libc.so.6"), (*SASS, (1, 90)))
    assert linked_libraries(path) == ("libcudart.so.13", "libc.so.6")
    assert gpu_code(path) == GpuCode(sass=(75, 80, 86, 90), ptx=(90,))


@pytest.mark.skipif(sys.platform != "linux", reason="ELF")
def test_a_real_library_is_read() -> None:
    [path, *_] = Path(np.__path__[0]).glob("*core/_multiarray_umath*.so")  # core before numpy 2
    assert "libc.so.6" in linked_libraries(path)
    assert gpu_code(path) == GpuCode((), ())


def test_a_file_that_is_no_library_or_is_cut_off_is_refused(tmp_path: Path) -> None:
    whole = write_library(tmp_path / "lib.so", LINKED_13, SASS).read_bytes()
    cut = tmp_path / "cut.so"
    for length in (0, 5, 50, 70, len(whole) // 2, len(whole) - 20):
        cut.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut off|no 64-bit|empty"):
            linked_libraries(cut)
    cut.write_bytes(b"#!/bin/sh\n" * 50)
    with pytest.raises(ValueError, match="no 64-bit shared library"):
        gpu_code(cut)


def test_damage_ends_in_an_answer_or_a_value_error(tmp_path: Path) -> None:
    whole = write_library(tmp_path / "lib.so", LINKED_13, SASS).read_bytes()
    path, random = tmp_path / "damaged.so", np.random.default_rng(1)
    refused = 0
    for _ in range(400):
        damaged = bytearray(whole)
        for at in random.integers(8, len(whole), 4):
            damaged[at] = random.integers(256)
        path.write_bytes(damaged)
        for read_one in (linked_libraries, gpu_code):
            try:
                read_one(path)
            except ValueError:
                refused += 1
    assert 0 < refused < 800


@pytest.mark.parametrize(
    ("code", "capability", "runs"),
    [
        (GpuCode((80, 86), ()), 86, True),
        (GpuCode((80, 86), ()), 87, True),
        (GpuCode((80, 86), ()), 75, False),
        (GpuCode((80, 86), ()), 90, False),
        (GpuCode((80, 100, 120), ()), 110, False),
        (GpuCode((80,), (90,)), 110, True),
        (GpuCode((80,), (120,)), 110, False),
        (GpuCode((), ()), 80, False),
    ],
)
def test_code_runs_on_its_own_generation_and_ptx_on_later_ones(code: GpuCode, capability: int, runs: bool) -> None:
    assert code.runs_on(capability) == runs


def test_no_runtime_or_one_without_the_provider(tmp_path: Path) -> None:
    assert read(tmp_path, tmp_path) == CudaSetup()
    (tmp_path / "onnxruntime/capi").mkdir(parents=True)
    assert read(tmp_path, tmp_path) == CudaSetup()


def test_nothing_found_lists_what_is_missing_and_what_is_not_needed(tmp_path: Path) -> None:
    setup = read(tmp_path, install(tmp_path))
    assert (setup.provider, setup.major, setup.code) == (True, 13, GpuCode((75, 80, 86, 90), ()))
    assert setup.missing == (*LINKED_13[:5], "libcudnn.so.9")
    assert [library.name for library in setup.libraries if not library.needed] == ["libcufft.so.12", "libnvrtc.so.13"]
    assert preload_folders(setup.libraries) == {"cuda": ("",), "cudnn": ("",)}


def test_the_wheels_of_cuda_13_and_12(tmp_path: Path) -> None:
    site = install(tmp_path)
    put(site / "nvidia/cu13/lib", *TOOLKIT_13)
    put(site / "nvidia/cudnn/lib", "libcudnn.so.9")
    setup = read(tmp_path, site)
    assert setup.missing == ("libcuda.so.1",)
    assert {sources(setup)[name] for name in TOOLKIT_13} == {"NVIDIA's wheels"}
    other = install(tmp_path / "12", (*TOOLKIT_12, "libcudnn.so.9", "libcufft.so.11"))
    for folder, names in (("cublas", TOOLKIT_12[:2]), ("curand", TOOLKIT_12[2:3]), ("cuda_runtime", TOOLKIT_12[3:])):
        put(other / "nvidia" / folder / "lib", *names)
    setup = read(tmp_path / "12", other)
    assert setup.major == 12
    assert setup.missing == ("libcudnn.so.9", "libcufft.so.11")  # as a build of 1.26 or before is linked
    assert preload_folders(setup.libraries) == {"cuda": ("",), "cudnn": ("",)}


def test_libraries_of_another_cuda_do_not_count(tmp_path: Path) -> None:
    site = install(tmp_path)
    put(site / "nvidia/cublas/lib", *TOOLKIT_12)
    assert "libcublas.so.13" in read(tmp_path, site).missing


def test_an_installed_torch_has_them_in_its_own_folder(tmp_path: Path) -> None:
    site = install(tmp_path)
    put(site / "torch/lib", *TOOLKIT_13, "libcudnn.so.9")
    setup = read(tmp_path, site)
    folder = str(site / "torch/lib")
    assert setup.missing == ("libcuda.so.1",)
    assert sources(setup)["libcudnn.so.9"] == "torch"
    assert preload_folders(setup.libraries) == {"cuda": (folder,), "cudnn": (folder,)}


def test_a_torch_elsewhere_brings_its_wheels(tmp_path: Path) -> None:
    site, other = install(tmp_path), tmp_path / "system/site-packages"
    (other / "torch/lib").mkdir(parents=True)
    put(other / "nvidia/cu13/lib", *TOOLKIT_13)
    put(other / "nvidia/cudnn/lib", "libcudnn.so.9")
    folders = preload_folders(read(tmp_path, site, other).libraries)
    assert folders == {"cuda": (str(other / "nvidia/cu13/lib"),), "cudnn": (str(other / "nvidia/cudnn/lib"),)}


def test_a_torch_elsewhere_with_a_wheel_for_each_library(tmp_path: Path) -> None:
    site, other = install(tmp_path, (*TOOLKIT_12, "libcudnn.so.9")), tmp_path / "system/site-packages"
    (other / "torch/lib").mkdir(parents=True)
    for folder, names in (("cublas", TOOLKIT_12[:2]), ("curand", TOOLKIT_12[2:3]), ("cuda_runtime", TOOLKIT_12[3:])):
        put(other / "nvidia" / folder / "lib", *names)
    put(other / "nvidia/cudnn/lib", "libcudnn.so.9")
    setup = read(tmp_path, site, other)
    assert not setup.missing
    folders = preload_folders(setup.libraries)
    assert folders["cuda"] == tuple(str(other / f"nvidia/{name}/lib") for name in ("cublas", "curand", "cuda_runtime"))
    assert folders["cudnn"] == (str(other / "nvidia/cudnn/lib"),)


def test_torch_comes_before_the_system_and_the_wheels_before_both(tmp_path: Path) -> None:
    site = install(tmp_path)
    put(tmp_path / "usr/lib/aarch64-linux-gnu", *TOOLKIT_13, "libcudnn.so.9", "libcuda.so.1")
    assert preload_folders(read(tmp_path, site).libraries) == {"cuda": ("",), "cudnn": ("",)}
    put(site / "torch/lib", *TOOLKIT_13)
    setup = read(tmp_path, site)
    assert preload_folders(setup.libraries) == {"cuda": (str(site / "torch/lib"),), "cudnn": ("",)}
    assert sources(setup) | {"libcufft.so.12": None} == {
        **dict.fromkeys(TOOLKIT_13, "torch"),
        "libcuda.so.1": "system",
        "libcudnn.so.9": "system",
        "libcufft.so.12": None,
        "libnvrtc.so.13": None,
    }
    put(site / "nvidia/cu13/lib", *TOOLKIT_13)
    assert preload_folders(read(tmp_path, site).libraries) == {"cuda": ("",), "cudnn": ("",)}


def test_half_a_torch_is_not_taken(tmp_path: Path) -> None:
    site = install(tmp_path)
    put(site / "torch/lib", "libcudart.so.13", "libcublas.so.13")
    assert preload_folders(read(tmp_path, site).libraries)["cuda"] == ("",)


def test_the_loader_s_cache_its_path_and_folders_that_it_does_not_know(tmp_path: Path) -> None:
    site = install(tmp_path)
    put(tmp_path / "opt/cuda", "libcublas.so.13")
    put(tmp_path / "opt/i386", "libcuda.so.1")
    put(tmp_path / "opt/lib", "libcuda.so.1")
    cached = ("libcuda.so.1", "/opt/i386/libcuda.so.1"), ("libcuda.so.1", "/opt/lib/libcuda.so.1")
    write_cache(tmp_path, [*cached, ("libcublas.so.13", "/opt/cuda/libcublas.so.13"), ("libgone.so", "/opt/gone")])
    put(tmp_path / "home/lib", "libcurand.so.10")
    put(tmp_path / "usr/local/cuda-13.0/lib64", "libcublasLt.so.13")
    put(tmp_path / "usr/lib/aarch64-linux-gnu/nvidia", "libcudart.so.13")
    setup = read(tmp_path, site, LD_LIBRARY_PATH="/nowhere:/home/lib:")
    places = {library.name: library.places for library in setup.libraries if library.places}
    assert places == {
        "libcublasLt.so.13": (("CUDA folder", f"{tmp_path}/usr/local/cuda-13.0/lib64/libcublasLt.so.13"),),
        "libcublas.so.13": (("system", f"{tmp_path}/opt/cuda/libcublas.so.13"),),
        "libcurand.so.10": (("system", f"{tmp_path}/home/lib/libcurand.so.10"),),
        "libcudart.so.13": (("CUDA folder", f"{tmp_path}/usr/lib/aarch64-linux-gnu/nvidia/libcudart.so.13"),),
        "libcuda.so.1": (("system", f"{tmp_path}/opt/lib/libcuda.so.1"),),
    }


def test_a_whole_cuda_folder_that_the_loader_does_not_know_is_named(tmp_path: Path) -> None:
    site = install(tmp_path)
    put(tmp_path / "usr/local/cuda-13.0/lib64", *TOOLKIT_13)
    folders = preload_folders(read(tmp_path, site).libraries)
    assert folders == {"cuda": (f"{tmp_path}/usr/local/cuda-13.0/lib64",), "cudnn": ("",)}


def test_a_damaged_cache_is_no_cache(tmp_path: Path) -> None:
    assert loader_cache(tmp_path) == {}
    write_cache(tmp_path, [("libc.so.6", "/lib/libc.so.6"), ("libm.so.6", "/lib/libm.so.6")])
    path = tmp_path / "etc/ld.so.cache"
    whole = path.read_bytes()
    assert loader_cache(tmp_path) == {name: tmp_path / "lib" / name for name in ("libc.so.6", "libm.so.6")}
    path.write_bytes(whole[:60])
    assert loader_cache(tmp_path) == {}
    path.write_bytes(whole[:40])
    assert loader_cache(tmp_path) == {}
    path.write_bytes(b"ld.so-1.7.0" + whole[20:])
    assert loader_cache(tmp_path) == {}


@pytest.mark.skipif(not Path("/etc/ld.so.cache").exists(), reason="another C library")
def test_the_cache_of_this_machine() -> None:
    assert loader_cache()["libc.so.6"].is_file()


def test_a_provider_that_cannot_be_read_is_told_by_what_its_build_wrote(tmp_path: Path) -> None:
    site = tmp_path / "site"
    put(site / "onnxruntime/capi", "libonnxruntime_providers_cuda.so")
    setup = read(tmp_path, site)
    assert (setup.provider, setup.major, setup.code) == (True, None, None)
    assert setup.missing == ("libcurand.so.10", "libcuda.so.1", "libcudnn.so.9")
    written = "package_name = 'onnxruntime-gpu'\n__version__ = '1.23.0'\ncuda_version = '12.6'\n"
    (site / "onnxruntime/capi/build_and_package_info.py").write_text(written)
    setup = read(tmp_path, site)
    assert setup.major == 12
    assert "libcublas.so.12" in setup.missing
    assert Library("libcufft.so.11", needed=False) in setup.libraries


@pytest.mark.parametrize("entry", ["x" * 300, "/proc/1/root/lib"])
def test_a_folder_that_cannot_be_looked_into_has_nothing(entry: str, tmp_path: Path) -> None:
    site = install(tmp_path)
    setup = read(tmp_path, site, Path("x" * 300), LD_LIBRARY_PATH=entry)
    assert "libcublas.so.13" in setup.missing


def test_a_runtime_linked_with_nonsense_has_no_version(tmp_path: Path) -> None:
    site = install(tmp_path, ("libcudart.so..", "libcudart.so.x"))
    assert read(tmp_path, site).major is None
