"""What of CUDA can be told without a GPU: its settings, its messages, how memory is asked for."""

from __future__ import annotations

import ctypes
from typing import Any

import pytest

from edgelocal.errors import RuntimeMissingError
from edgelocal.runtime.cuda import NAME, DeviceMemory, cuda_provider, device_memory, settings
from edgelocal.runtime.library import runtime

no_cuda = pytest.mark.skipif(NAME in runtime().get_available_providers(), reason="this runtime has CUDA")


@no_cuda
def test_a_runtime_without_cuda_is_told_what_to_install() -> None:
    with pytest.raises(RuntimeMissingError, match=f"has no {NAME}: .*pip install"):
        cuda_provider()


def test_settings_are_text_and_bounded() -> None:
    plain = settings(None, tf32=False, bounded=False)
    assert "gpu_mem_limit" not in plain
    assert plain["use_tf32"] == "0"
    bounded = settings(1 << 30, tf32=True, bounded=True)
    assert bounded["gpu_mem_limit"] == str(1 << 30)
    assert bounded["use_tf32"] == "1"
    assert (plain["cudnn_conv_algo_search"], bounded["cudnn_conv_algo_search"]) == ("EXHAUSTIVE", "HEURISTIC")
    assert all(isinstance(value, str) for value in bounded.values())


class Library:
    """A CUDA runtime that answers with these."""

    def __init__(self, code: int, free: int, total: int) -> None:
        self.answer = code, free, total

    def cudaMemGetInfo(self, free: Any, total: Any) -> int:  # noqa: N802 (the name is the library's)
        code, *sizes = self.answer
        for place, size in zip((free, total), sizes, strict=True):
            ctypes.cast(place, ctypes.POINTER(ctypes.c_size_t))[0] = size
        return code


def test_the_device_s_memory_is_what_the_runtime_says() -> None:
    asked = []

    def load(name: str) -> Library:
        asked.append(name)
        if name.endswith("13"):
            raise OSError(name)
        return Library(0, 3 << 30, 80 << 30)

    assert device_memory(load) == DeviceMemory(3 << 30, 80 << 30)
    assert asked == ["libcudart.so.13", "libcudart.so.12"]
    with pytest.raises(RuntimeMissingError, match="error 100"):
        device_memory(lambda name: Library(100, 0, 0))


def test_no_cuda_runtime_is_said_with_what_to_install() -> None:
    def load(name: str) -> None:
        raise OSError(name)

    listed = r"libcudart.so.13, libcudart.so.12, libcudart.so.11.0 can be loaded: .*pip install"
    with pytest.raises(RuntimeMissingError, match=listed):
        device_memory(load)
