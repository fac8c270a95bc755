"""What of CUDA can be told without a GPU: its settings and its messages."""

from __future__ import annotations

import pytest

from edgelocal.errors import RuntimeMissingError
from edgelocal.runtime.cuda import NAME, open_cuda, settings
from edgelocal.runtime.library import runtime

no_cuda = pytest.mark.skipif(NAME in runtime().get_available_providers(), reason="this runtime has CUDA")


@no_cuda
def test_a_runtime_without_cuda_is_told_what_to_install() -> None:
    with pytest.raises(RuntimeMissingError, match=f"has no {NAME}: .*(pip install|NVIDIA's driver)"):
        open_cuda()


def test_settings_are_text_and_bounded() -> None:
    plain = settings(None, tf32=False, bounded=False)
    assert "gpu_mem_limit" not in plain
    assert plain["use_tf32"] == "0"
    bounded = settings(1 << 30, tf32=True, bounded=True)
    assert bounded["gpu_mem_limit"] == str(1 << 30)
    assert bounded["use_tf32"] == "1"
    assert (plain["cudnn_conv_algo_search"], bounded["cudnn_conv_algo_search"]) == ("EXHAUSTIVE", "HEURISTIC")
    assert all(isinstance(value, str) for value in bounded.values())
