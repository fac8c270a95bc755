"""The machine read from trees of files, and the doctor's findings."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from importlib import metadata
from itertools import product
from pathlib import Path

import pytest

from edgelocal.machine.device import DeviceInfo, describe
from edgelocal.machine.doctor import (
    RUNTIMES,
    TRAINING_BUILDS,
    Report,
    advice,
    examine,
    installed_packages,
    installed_runtimes,
)
from edgelocal.machine.packages import TABLE, Package, accelerator, oldest_runtime, package

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
        ({"dev/nvidia3": ""}, False, True, None),  # a container with the fourth GPU only
        ({"dev/nvidiactl": ""}, False, False, None),
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
    assert 'need one -> pip install "onnxruntime>=1.17"' in text


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


RANGE = {
    ("x86_64", "3.10"): 'pip install "onnxruntime>=1.17,<1.24"',
    ("x86_64", "3.11"): 'pip install "onnxruntime>=1.17"',
    ("x86_64", "3.12"): 'pip install "onnxruntime>=1.17"',
    ("x86_64", "3.13"): 'pip install "onnxruntime>=1.17"',
    ("aarch64", "3.10"): 'pip install "onnxruntime>=1.20,!=1.21.*,<1.24"',
    ("aarch64", "3.11"): 'pip install "onnxruntime>=1.20,!=1.21.*"',
    ("aarch64", "3.12"): 'pip install "onnxruntime>=1.20,!=1.21.*"',
    ("aarch64", "3.13"): 'pip install "onnxruntime>=1.20,!=1.21.*"',
}
ORIN, THOR = "NVIDIA Jetson AGX Orin Developer Kit", "NVIDIA Jetson AGX Thor Developer Kit"
XAVIER, PI = "NVIDIA Jetson Xavier NX Developer Kit", "Raspberry Pi 5 Model B Rev 1.0"
BOARDS = {"": PI, "cuda": None, "orin": ORIN, "thor": THOR, "jetson": XAVIER}
TRAINING = "for --runtime ort-training: pip install onnxruntime-training-cpu==1.19.2 (the last release; it also does"


def machine(name: str, kind: str, python: str) -> DeviceInfo:
    """A machine with this accelerator, as `describe` would find it."""
    jetson = kind in ("orin", "thor", "jetson")
    model = BOARDS[kind] if name == "aarch64" or jetson else None
    return dataclasses.replace(
        INFO, machine=name, python=f"{python}.4", model=model, jetson=jetson, cuda=jetson or kind == "cuda"
    )


@pytest.mark.parametrize("kind", BOARDS)
@pytest.mark.parametrize(("name", "python"), RANGE)
def test_the_command_for_every_machine(name: str, python: str, kind: str) -> None:
    command, *more = advice(machine(name, kind, python)).split(" (", 1)
    assert command == RANGE[name, python]
    assert bool(more) == bool(kind)
    if kind:
        assert more[0].startswith("this trains on the CPU; ")


GPU = {
    ("x86_64", "cuda", "3.10"): '"onnxruntime-gpu[cuda,cudnn]>=1.23.2,<1.24" (CUDA 12)',
    ("x86_64", "cuda", "3.11"): '"onnxruntime-gpu[cuda,cudnn]>=1.28" (CUDA 13; for a driver of CUDA 12: '
    '"onnxruntime-gpu[cuda,cudnn]>=1.23.2,<1.27")',
    ("aarch64", "cuda", "3.12"): '"onnxruntime-gpu[cuda,cudnn]>=1.29" (CUDA 13, glibc 2.34 or later)',
    ("aarch64", "orin", "3.10"): "onnxruntime_gpu-*-cp310-*_aarch64.whl, the file from NVIDIA's Jetson index "
    "(JetPack 6, CUDA 12.6)",
    ("aarch64", "thor", "3.12"): "onnxruntime_gpu-*-cp312-*_aarch64.whl, the file from NVIDIA's Jetson index "
    "(JetPack 7, CUDA 13)",
}


@pytest.mark.parametrize(("name", "kind", "python"), GPU)
def test_what_training_on_the_gpu_needs(name: str, kind: str, python: str) -> None:
    text = advice(machine(name, kind, python))
    assert text.endswith(f"; for --device cuda, instead of it: pip install {GPU[name, kind, python]})")


@pytest.mark.parametrize(
    ("name", "kind", "python"),
    [
        ("aarch64", "cuda", "3.10"),
        ("aarch64", "orin", "3.12"),
        ("aarch64", "thor", "3.11"),
        ("aarch64", "jetson", "3.10"),
        ("x86_64", "jetson", "3.11"),
    ],
)
def test_no_wheel_for_a_gpu_is_said(name: str, kind: str, python: str) -> None:
    assert advice(machine(name, kind, python)).endswith(
        f"; no onnxruntime-gpu wheel is known for this GPU and Python {python})"
    )


@pytest.mark.parametrize(("name", "python"), RANGE)
def test_the_training_build_is_for_x86_64_and_python_up_to_3_12(name: str, python: str) -> None:
    text = examine(machine(name, "", python), {}).training
    if name == "x86_64" and python != "3.13":
        assert text.startswith(TRAINING)
    else:
        assert text.startswith(f"none for {name} with Linux and Python {python}: ONNX Runtime's training build")


def test_whether_the_runtime_is_a_training_build() -> None:
    for build in TRAINING_BUILDS:
        report = examine(INFO, {build: "1.19.2"})
        assert report.training_build
        assert report.training == f"{build} 1.19.2 is a training build: --runtime ort-training can be used"
    report = examine(INFO, {"onnxruntime": "1.31.1"})
    assert not report.training_build
    assert "pip uninstall -y onnxruntime && pip install onnxruntime-training-cpu==1.19.2" in report.training
    both = examine(INFO, {"onnxruntime": "1.31.1", "onnxruntime-training-cpu": "1.19.2"})
    assert not both.training_build
    assert both.training == "a training build is installed, but beside another runtime: mend that first"
    values = json.loads(json.dumps(both.as_dict()))
    assert (values["training_build"], values["training"]) == (False, both.training)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"machine": "riscv64"}, "riscv64 with Linux and Python 3.11"),
        ({"machine": "armv7l", "jetson": True, "cuda": True}, "armv7l with Linux and Python 3.11"),
        ({"python": "3.9.2"}, "x86_64 with Linux and Python 3.9"),
        ({"system": "Darwin", "machine": "aarch64"}, "aarch64 with Darwin and Python 3.11"),
        ({"python": "unknown"}, "x86_64 with Linux and Python 0.0"),
    ],
)
def test_a_machine_that_is_not_in_the_table(change: dict[str, str | bool], words: str) -> None:
    info = dataclasses.replace(INFO, **change)  # type: ignore[arg-type]
    assert advice(info) == (
        f'pip install "onnxruntime>=1.17" (there may be no ready wheel for {words}: if pip finds none, build ONNX '
        "Runtime from source)"
    )


def test_a_newer_python_than_tested_is_said() -> None:
    assert advice(dataclasses.replace(INFO, python="3.14.0")) == (
        'pip install "onnxruntime>=1.17" (edgelocal was not tested with this version of Python)'
    )


@pytest.mark.parametrize(
    ("model", "jetson", "cuda", "kind"),
    [
        (ORIN, True, True, "orin"),
        ("Jetson AGX Orin", True, True, "orin"),
        ("NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super", True, True, "orin"),
        ("NVIDIA Orin NX Developer Kit", False, True, "orin"),  # in a container: no nv_tegra_release
        (THOR, True, True, "thor"),
        ("NVIDIA Jetson T5000", True, True, "thor"),
        (XAVIER, True, True, "jetson"),
        (None, True, True, "jetson"),
        ("Thor's own board", False, False, ""),
        (PI, False, False, ""),
        (None, False, True, "cuda"),
    ],
)
def test_which_accelerator(model: str | None, jetson: bool, cuda: bool, kind: str) -> None:
    assert accelerator(dataclasses.replace(INFO, model=model, jetson=jetson, cuda=cuda)) == kind


def test_a_board_read_from_files_gets_its_command(tmp_path: Path) -> None:
    read = put(tmp_path, {"proc/device-tree/model": THOR + "\0", "etc/nv_tegra_release": "# R38", "dev/nvidia0": ""})
    info = dataclasses.replace(read, machine="aarch64", system="Linux", python="3.12.3")
    assert GPU["aarch64", "thor", "3.12"] in advice(info)


def test_each_machine_has_at_most_one_row_for_a_use_and_each_row_a_machine() -> None:
    reached = set()
    for name, use in {(row.machine, row.use) for row in TABLE}:
        for kind, minor in product(BOARDS, range(8, 16)):
            rows = [row for row in TABLE if row.use == use and row.suits(name, kind, (3, minor))]
            assert len(rows) <= 1
            assert package(machine(name, kind, f"3.{minor}"), use) == next(iter(rows), None)
            reached |= {*rows}
    assert reached == {*TABLE}


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row.machine}-{row.name}-{row.pythons[0]}")
def test_the_documentation_names_every_row(row: Package) -> None:
    text = (Path(__file__).parents[2] / "docs" / "devices.md").read_text(encoding="utf-8")
    assert row.command.removeprefix("pip install ") in text


def pairs() -> list[tuple[str, str]]:
    names = sorted({row.name.split("[")[0] for row in TABLE}, key=RUNTIMES.index)
    return [(a, b) for a in names for b in names if RUNTIMES.index(a) < RUNTIMES.index(b)]


# (pair, kind of machine) -> what is kept, or "" where pip would not find it again.
KEPT = {
    ("onnxruntime-training-cpu", "onnxruntime-gpu"): {
        "": "onnxruntime-training-cpu",
        "cuda": "onnxruntime-training-cpu",
    },
    ("onnxruntime-training-cpu", "onnxruntime"): {"": "onnxruntime-training-cpu", "cuda": "onnxruntime-training-cpu"},
    ("onnxruntime-gpu", "onnxruntime"): {"": "onnxruntime", "cuda": "onnxruntime-gpu", "orin": "", "thor": ""},
}


def test_every_pair_of_the_table_is_known_here() -> None:
    assert set(pairs()) == set(KEPT)


@pytest.mark.parametrize(("pair", "kind", "kept"), [(p, kind, kept) for p in KEPT for kind, kept in KEPT[p].items()])
def test_what_to_type_for_two_runtimes(pair: tuple[str, str], kind: str, kept: str) -> None:
    versions = {"onnxruntime-training-cpu": "1.19.2", "onnxruntime-gpu": "1.23.0", "onnxruntime": "1.31.1"}
    info = machine("aarch64" if kind in ("orin", "thor") else "x86_64", kind, "3.12")
    [problem] = examine(info, {"numpy": "2.1.0"} | {name: versions[name] for name in pair}).problems
    remove = f"pip uninstall -y {pair[0]} {pair[1]}"
    if kept:
        assert problem.remedy == f"{remove} && pip install {kept}=={versions[kept]}"
    else:
        again = "install the wheel of onnxruntime-gpu 1.23.0 again from where it came: PyPI does not have it"
        assert problem.remedy == f"{remove}, then {again}"


@pytest.mark.parametrize(
    ("installed", "kept"),
    [
        ({"onnxruntime-gpu": "1.20.0", "onnxruntime-training": "1.19.2"}, "onnxruntime-training==1.19.2"),
        ({"onnxruntime-training": "1.19.2", "onnxruntime-training-cpu": "1.19.2"}, "onnxruntime-training-cpu==1.19.2"),
        ({"onnxruntime-training-cpu": "1.16.3", "onnxruntime": "1.20.0"}, "onnxruntime==1.20.0"),
        ({"onnxruntime": "1.20.0", "onnxruntime-openvino": "1.20.0"}, "onnxruntime-openvino==1.20.0"),
    ],
)
def test_old_runtimes_and_those_for_an_absent_gpu_are_not_kept(installed: dict[str, str], kept: str) -> None:
    [problem] = examine(INFO, installed).problems
    assert problem.remedy.endswith(f" && pip install {kept}")


def test_a_build_that_pip_cannot_find_is_not_asked_of_pip() -> None:
    local = examine(
        dataclasses.replace(INFO, cuda=True), {"onnxruntime-training": "1.19.2+cu118", "onnxruntime": "1.20.0"}
    )
    assert "&& pip install" not in found(local)
    assert "install the wheel of onnxruntime-training 1.19.2+cu118 again from where it came" in found(local)
    orin = examine(machine("aarch64", "orin", "3.10"), {"numpy": "2.0.0", "onnxruntime-gpu": "1.16.3"})
    assert "--upgrade" not in found(orin)
    assert "older than 1.20 -> install a wheel of onnxruntime-gpu 1.20 or later from where this one came" in found(orin)
    assert '1.19 or later from where this one came, or pip install "numpy<2"' in found(orin)


def test_age_and_numpy_are_those_of_the_runtime_that_is_kept() -> None:
    report = examine(INFO, {"numpy": "2.0.0", "onnxruntime": "1.16.3", "onnxruntime-training-cpu": "1.19.2"})
    assert len(report.problems) == 1
    report = examine(INFO, {"numpy": "2.0.0", "onnxruntime": "1.18.0", "onnxruntime-gpu": "1.20.0"})
    assert 'built for numpy 1 and fails with numpy 2.0.0 -> pip install --upgrade "onnxruntime>=1.19"' in found(report)


def test_a_release_that_dies_on_some_arm_cores_is_a_problem_there_only() -> None:
    arm = examine(machine("aarch64", "", "3.11"), {"numpy": "2.0.0", "onnxruntime": "1.21.0"})
    assert "onnxruntime 1.21.0 does not run on every aarch64 machine" in found(arm)
    assert '-> pip install --upgrade "onnxruntime>=1.20,!=1.21.*"' in found(arm)
    assert not examine(machine("x86_64", "", "3.11"), {"numpy": "2.0.0", "onnxruntime": "1.21.0"}).problems
    old = examine(machine("aarch64", "", "3.11"), {"numpy": "1.26.0", "onnxruntime": "1.19.2"})
    assert 'older than 1.20 -> pip install --upgrade "onnxruntime>=1.20,!=1.21.*"' in found(old)


def test_no_row_names_a_runtime_that_is_unknown_or_too_old() -> None:
    for row in TABLE:
        assert row.name.split("[")[0] in RUNTIMES
        assert row.source != "PyPI" or tuple(
            map(int, row.versions.lstrip(">=").split(",")[0].split(".")[:2])
        ) >= oldest_runtime(row.machine)


def test_installed_versions_are_those_of_the_metadata() -> None:
    assert installed_packages()["numpy"] == metadata.version("numpy")
    assert installed_packages(["no-such-distribution"]) == {}
    assert set(installed_runtimes()) <= set(RUNTIMES)


def test_the_doctor_imports_nothing_it_examines() -> None:
    code = (
        "import sys; from edgelocal.machine.doctor import installed_packages; installed_packages(); "
        "print({'onnxruntime', 'torch'} & {*sys.modules})"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"


@pytest.mark.parametrize(("machine", "first"), [("x86_64", "1.17"), ("aarch64", "1.20")])
def test_what_is_too_old_depends_on_the_machine(machine: str, first: str) -> None:
    major, minor = (int(part) for part in first.split("."))
    for version, old in ((f"{major}.{minor - 1}.9", True), (f"{first}.0", False)):
        info = dataclasses.replace(INFO, machine=machine)
        found = [problem.found for problem in examine(info, {"onnxruntime": version, "numpy": "1.26.4"}).problems]
        assert (f"onnxruntime {version} is older than {first}" in found) == old
