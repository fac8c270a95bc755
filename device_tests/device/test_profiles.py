"""Device profiles: names, and figures that cannot be."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from edgelocal.errors import UsageError
from edgelocal.machine.budget import format_size
from edgelocal.machine.profiles import PROFILES, find_profile

WANTED = {
    "jetson-orin-nano-4gb": (4, 6),
    "jetson-orin-nano-8gb": (8, 6),
    "jetson-orin-nx-8gb": (8, 6),
    "jetson-orin-nx-16gb": (16, 8),
    "jetson-agx-orin-32gb": (32, 8),
    "jetson-agx-orin-64gb": (64, 12),
    "jetson-thor": (128, 14),
    "raspberry-pi-4-2gb": (2, 4),
    "raspberry-pi-4-4gb": (4, 4),
    "raspberry-pi-4-8gb": (8, 4),
    "raspberry-pi-5-2gb": (2, 4),
    "raspberry-pi-5-4gb": (4, 4),
    "raspberry-pi-5-8gb": (8, 4),
    "raspberry-pi-5-16gb": (16, 4),
    "raspberry-pi-zero-2w": (0.5, 4),
    "gateway-1gb": (1, 4),
    "gateway-512mb": (0.5, 2),
    "cuda-8gb": (16, 8),
    "cuda-24gb": (32, 8),
}


def test_memory_and_cores() -> None:
    assert {p.name: (p.ram_bytes / 2**30, p.cores) for p in PROFILES} == WANTED


def test_a_system_takes_its_share_and_no_more_than_a_tenth_of_more_memory() -> None:
    for profile in PROFILES:
        left = profile.ram_bytes - profile.usable_bytes
        assert left >= 190 << 20
        assert left <= max(profile.ram_bytes * 0.45, 1 << 30)
        assert profile.machine in ("aarch64", "x86_64")
        assert profile.shared_memory == profile.name.startswith(("jetson", "raspberry"))


def test_what_a_gpu_has() -> None:
    for profile in PROFILES:
        assert profile.cuda == profile.name.startswith(("jetson", "cuda"))
        assert (profile.device_memory_bytes > 0) == profile.name.startswith("cuda")
        assert profile.cuda_context_bytes <= profile.device_usable_bytes // 2
    assert find_profile("jetson-orin-nano-8gb").device_usable_bytes == find_profile("jetson-orin-nano-8gb").usable_bytes
    assert find_profile("cuda-24gb").as_dict()["device_usable_bytes"] == 24 * 2**30 * 90 // 100
    assert find_profile("raspberry-pi-5-8gb").device_usable_bytes == 0


def test_names_in_any_case() -> None:
    assert find_profile(" Jetson-Thor ").cores == 14
    assert find_profile("raspberry-pi-5-4gb").as_dict()["usable_bytes"] == 4 * 2**30 * 85 // 100


def test_an_unknown_name_without_a_likeness() -> None:
    with pytest.raises(UsageError, match=r"no device profile 'zzz'; choose one of jetson-orin-nano-4gb, "):
        find_profile("zzz")


def test_the_page_lists_them() -> None:
    page = (Path(__file__).parents[2] / "docs" / "planning.md").read_text()
    rows = re.findall(r"^\| `([^`]+)` \| (.+) \| (.+) \| (\d+) % \| (.+) \| (\d+) \|$", page, re.MULTILINE)
    assert rows == [
        (p.name, p.model, format_size(p.ram_bytes), str(p.usable_percent), format_size(p.usable_bytes), str(p.cores))
        for p in PROFILES
    ]
    gpus = re.findall(r"^\| `([^`]+)` \| (its own|the CPU's) \| (.+) \| (.+) \|$", page, re.MULTILINE)
    assert gpus == [
        (
            p.name,
            "the CPU's" if p.shared_memory else "its own",
            format_size(p.device_usable_bytes),
            format_size(p.cuda_context_bytes),
        )
        for p in PROFILES
        if p.cuda
    ]
