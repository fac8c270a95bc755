"""The machine read from trees of files, and the doctor's findings."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from edgelocal.device import DeviceInfo, describe
from edgelocal.doctor import RUNTIMES, Report, advice, examine, installed_packages, installed_runtimes

MIB = 1 << 20
MEMINFO = "MemTotal:  4000 kB\nMemFree:  100 kB\nMemAvailable:  3000 kB\nHugePages_Total:  0\n"
INFO = DeviceInfo(
    machine="x86_64",
    system="Linux",
    python="3.11.0",
    cores=4,
    memory_total_bytes=4096 * MIB,
    memory_available_bytes=3000 * MIB,
    memory_limit_bytes=None,
    disk_free_bytes=1 << 34,
    model=None,
    jetson=False,
    cuda=False,
)
USABLE_CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def tree(root: Path, **files: str) -> Path:
    """Files below `root`; in a keyword "__" stands for "/"."""
    for name, text in files.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def put(root: Path, files: dict[str, str]) -> DeviceInfo:
    return describe(tree(root, **{name.replace("/", "__"): text for name, text in files.items()}))


def test_this_machine() -> None:
    info = describe()
    assert info.cores >= 1
    assert 0 < info.effective_bytes <= info.memory_total_bytes
    assert info.disk_free_bytes > 0
    assert info.machine not in ("arm64", "AMD64")


def test_an_empty_tree_still_gives_an_answer(tmp_path: Path) -> None:
    info = describe(tmp_path)
    assert info.cores == USABLE_CORES
    assert info.memory_total_bytes == info.memory_available_bytes > 0
    assert (info.memory_limit_bytes, info.model, info.jetson, info.cuda) == (None, None, False, False)


def test_memory_of_meminfo(tmp_path: Path) -> None:
    info = put(tmp_path, {"proc/meminfo": MEMINFO})
    assert (info.memory_total_bytes, info.memory_available_bytes) == (4000 * 1024, 3000 * 1024)
    assert info.effective_bytes == 3000 * 1024


V1 = "12:cpu,cpuacct:/docker/x\n11:memory:/docker/x\n1:name=systemd:/init\n"


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/memory.max": "2000000"}, 2_000_000),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/memory.max": "max"}, None),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/b/memory.max": "2000000",
                "sys/fs/cgroup/a/memory.max": "1000000",
            },
            1_000_000,
        ),
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "2000000"}, 2_000_000),
        ({"proc/self/cgroup": "0::/../../host\n", "sys/fs/cgroup/memory.max": "2000000"}, 2_000_000),
        ({"sys/fs/cgroup/memory.max": "2000000"}, 2_000_000),
        ({"proc/self/cgroup": V1, "sys/fs/cgroup/memory/docker/x/memory.limit_in_bytes": "2000000"}, 2_000_000),
        ({"proc/self/cgroup": V1, "sys/fs/cgroup/memory/memory.limit_in_bytes": "2000000"}, 2_000_000),
        ({"proc/self/cgroup": V1, "sys/fs/cgroup/memory/memory.limit_in_bytes": "9223372036854771712"}, None),
        ({"proc/self/cgroup": "nonsense\n", "sys/fs/cgroup/memory.max": "-7"}, None),
    ],
)
def test_memory_limits(tmp_path: Path, files: dict[str, str], limit: int | None) -> None:
    info = put(tmp_path, files | {"proc/meminfo": MEMINFO})
    assert info.memory_limit_bytes == limit
    assert info.effective_bytes == min(limit or 3000 * 1024, 3000 * 1024)


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "100000 100000"}, 1),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "5000 100000"}, 1),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "150000 100000"}, 2),
        ({"proc/self/cgroup": "0::/a\n", "sys/fs/cgroup/a/cpu.max": "max 100000"}, 10**6),
        (
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu,cpuacct/docker/x/cpu.cfs_quota_us": "50000",
                "sys/fs/cgroup/cpu,cpuacct/docker/x/cpu.cfs_period_us": "100000",
            },
            1,
        ),
        (
            {
                "proc/self/cgroup": V1,
                "sys/fs/cgroup/cpu/docker/x/cpu.cfs_quota_us": "-1",
                "sys/fs/cgroup/cpu/docker/x/cpu.cfs_period_us": "100000",
            },
            10**6,
        ),
    ],
)
def test_core_quotas(tmp_path: Path, files: dict[str, str], quota: int) -> None:
    assert put(tmp_path, files).cores == min(USABLE_CORES, quota)


@pytest.mark.parametrize(
    ("files", "jetson", "cuda", "model"),
    [
        (
            {"proc/device-tree/model": "Raspberry Pi 4 Model B Rev 1.4\0"},
            False,
            False,
            "Raspberry Pi 4 Model B Rev 1.4",
        ),
        ({"etc/nv_tegra_release": "# R35"}, True, False, None),
        (
            {"proc/device-tree/model": "NVIDIA Jetson Orin Nano\0", "dev/nvhost-gpu": ""},
            True,
            True,
            "NVIDIA Jetson Orin Nano",
        ),
        ({"dev/nvidia0": ""}, False, True, None),
        ({"usr/bin/nvidia-smi": ""}, False, True, None),
    ],
)
def test_boards(tmp_path: Path, files: dict[str, str], jetson: bool, cuda: bool, model: str | None) -> None:
    info = put(tmp_path, files)
    assert (info.jetson, info.cuda, info.model) == (jetson, cuda, model)


def found(report: Report) -> str:
    return "\n".join(f"{problem.found} -> {problem.remedy}" for problem in report.problems)


def test_a_healthy_machine_has_no_problems_and_a_report_in_json() -> None:
    report = examine(INFO, {"edgelocal": "0.1", "numpy": "2.1.0", "onnxruntime": "1.19.2"})
    assert report.problems == ()
    assert report.runtimes == {"onnxruntime": "1.19.2"}
    values = json.loads(json.dumps(report.as_dict()))
    assert values["device"]["effective_bytes"] == INFO.effective_bytes
    assert values["problems"] == []


def test_no_runtime_says_what_to_type() -> None:
    text = found(examine(INFO, {"numpy": "2.0.0"}))
    assert "no ONNX Runtime is installed" in text
    assert "pip install onnxruntime" in text


@pytest.mark.parametrize(
    ("special", "cuda", "kept"),
    [
        ("onnxruntime-gpu", True, "onnxruntime-gpu"),
        ("onnxruntime-gpu", False, "onnxruntime"),
        ("onnxruntime-training-cpu", False, "onnxruntime-training-cpu"),
    ],
)
def test_two_runtimes_say_which_to_keep(special: str, cuda: bool, kept: str) -> None:
    report = examine(dataclasses.replace(INFO, cuda=cuda), {"onnxruntime": "1.20.0", special: "1.20.0"})
    assert f"2 ONNX Runtimes share one module name: {special} 1.20.0, onnxruntime 1.20.0" in found(report)
    assert f"pip uninstall -y {special} onnxruntime && pip install {kept}==1.20.0" in found(report)


def test_an_old_runtime_and_a_new_numpy() -> None:
    text = found(examine(INFO, {"numpy": "2.0.0", "onnxruntime": "1.16.3"}))
    assert 'onnxruntime 1.16.3 is older than 1.17 -> pip install --upgrade "onnxruntime>=1.17"' in text
    assert "built for numpy 1 and fails with numpy 2.0.0" in text
    assert not examine(INFO, {"numpy": "1.26.4", "onnxruntime": "1.17.0"}).problems
    assert "older than 1.17" in found(examine(INFO, {"onnxruntime": "unknown"}))


def test_little_memory() -> None:
    report = examine(dataclasses.replace(INFO, memory_limit_bytes=200 * MIB), {"onnxruntime": "1.20.0"})
    assert "200 MiB of memory can be used" in found(report)


@pytest.mark.parametrize("machine", ["x86_64", "aarch64", "riscv64"])
@pytest.mark.parametrize(("jetson", "cuda"), [(False, False), (False, True), (True, True)])
def test_advice_for_every_machine(machine: str, jetson: bool, cuda: bool) -> None:
    text = advice(dataclasses.replace(INFO, machine=machine, jetson=jetson, cuda=cuda))
    assert text.startswith("pip install onnxruntime")
    assert ("JetPack" in text) == (machine == "aarch64" and jetson)
    assert ("onnxruntime-gpu instead" in text) == (machine == "x86_64" and cuda and not jetson)
    assert ("no ready wheel for riscv64" in text) == (machine == "riscv64")


def test_installed_versions_are_those_of_the_metadata() -> None:
    assert installed_packages()["numpy"] == metadata.version("numpy")
    assert installed_packages(["no-such-distribution"]) == {}
    assert set(installed_runtimes()) <= set(RUNTIMES)


def test_the_doctor_imports_nothing_it_examines() -> None:
    code = "import sys, edgelocal.doctor as d; d.installed_packages(); print({'onnxruntime', 'torch'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
