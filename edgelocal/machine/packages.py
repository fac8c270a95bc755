"""Which package brings ONNX Runtime, by machine, accelerator and Python: one table, which `edgelocal doctor` reads out.

What the rows rest on, and which of them were tried, is in docs/devices.md.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from edgelocal.machine.device import DeviceInfo

Use = Literal["portable", "ort-training", "cuda"]
Python = tuple[int, int]

X86_64, AARCH64 = "x86_64", "aarch64"
CPU, CUDA, ORIN, THOR, JETSON = "", "cuda", "orin", "thor", "jetson"
ANY = (CPU, CUDA, ORIN, THOR, JETSON)
PYPI, JETSON_INDEX = "PyPI", "NVIDIA's Jetson index"

_NOT_TESTED = "edgelocal was not tested with this version of Python"
# Boards name themselves "NVIDIA Jetson AGX Orin Developer Kit", "NVIDIA Orin NX Developer Kit", or by their module.
_BOARDS = {"orin": ORIN, "thor": THOR, "t4000": THOR, "t5000": THOR}


@dataclass(frozen=True)
class Package:
    """What to install where, and what for.

    `machine` is that of `DeviceInfo`; `accelerators` are those of `accelerator` that the row holds for; `pythons` are
    the first and the last version, None where no last one is known. `use` is a runtime of `train --runtime`, or "cuda"
    for `train --device cuda`. Wheels of another `source` than PyPI are files that one fetches first.
    """

    machine: str
    accelerators: tuple[str, ...]
    pythons: tuple[Python, Python | None]
    name: str
    versions: str
    use: Use
    remark: str = ""
    source: str = PYPI

    @property
    def command(self) -> str:
        """What to type."""
        if self.source != PYPI:
            tag = "cp{}{}".format(*self.pythons[0])
            return f"pip install {self.name.replace('-', '_')}-*-{tag}-*_{self.machine}.whl"
        requirement = f"{self.name}{self.versions}"
        quote = '"' if re.search(r"[^\w.=-]", requirement) else ""  # a shell would take < > ! * [ for its own
        return f"pip install {quote}{requirement}{quote}"

    @property
    def for_installed(self) -> str:
        """What of `versions` holds for a runtime that is there already, and not only for what pip finds."""
        return ",".join(part for part in self.versions.split(",") if not part.startswith("<"))

    def leaves_out(self, version: str) -> bool:
        """Whether this release is one of those that do not work here."""
        out = (part.removeprefix("!=") for part in self.versions.split(",") if part.startswith("!="))
        return release(version) in {release(number) for number in out}

    def suits(self, machine: str, accelerator: str, python: Python) -> bool:
        """Whether the row holds for this machine and Python."""
        first, last = self.pythons
        here = machine == self.machine and accelerator in self.accelerators
        return here and first <= python and (last is None or python <= last)


# Of NVIDIA's drivers, the first release that runs programs of this version of CUDA, by NVIDIA's compatibility guide.
FIRST_DRIVER = {11: 450, 12: 525, 13: 580}

# 1.23 is the last with wheels for Python 3.10. On aarch64, 1.21.0 dies of an illegal instruction on cores without the
# atomic instructions of ARMv8.1, such as the Raspberry Pi 4's. PyPI's onnxruntime-gpu is for CUDA 12 up to 1.26, for
# CUDA 13 from 1.27 on (whose extras name packages that do not exist, so 1.28), and has aarch64 wheels from 1.29 on.
TABLE = (
    Package(X86_64, ANY, ((3, 10), (3, 10)), "onnxruntime", ">=1.17,<1.24", "portable"),
    Package(X86_64, ANY, ((3, 11), (3, 13)), "onnxruntime", ">=1.17", "portable"),
    Package(X86_64, ANY, ((3, 14), None), "onnxruntime", ">=1.17", "portable", _NOT_TESTED),
    Package(AARCH64, ANY, ((3, 10), (3, 10)), "onnxruntime", ">=1.20,!=1.21.*,<1.24", "portable"),
    Package(AARCH64, ANY, ((3, 11), (3, 13)), "onnxruntime", ">=1.20,!=1.21.*", "portable"),
    Package(AARCH64, ANY, ((3, 14), None), "onnxruntime", ">=1.20,!=1.21.*", "portable", _NOT_TESTED),
    Package(X86_64, ANY, ((3, 8), (3, 12)), "onnxruntime-training-cpu", "==1.19.2", "ort-training", "the last release"),
    Package(X86_64, (CUDA,), ((3, 10), (3, 10)), "onnxruntime-gpu[cuda,cudnn]", ">=1.23.2,<1.24", "cuda", "CUDA 12"),
    Package(
        X86_64,
        (CUDA,),
        ((3, 11), None),
        "onnxruntime-gpu[cuda,cudnn]",
        ">=1.28",
        "cuda",
        'CUDA 13; for a driver of CUDA 12: "onnxruntime-gpu[cuda,cudnn]>=1.23.2,<1.27"',
    ),
    Package(
        AARCH64,
        (CUDA,),
        ((3, 11), None),
        "onnxruntime-gpu[cuda,cudnn]",
        ">=1.29",
        "cuda",
        "CUDA 13, glibc 2.34 or later",
    ),
    Package(
        AARCH64,
        (ORIN,),
        ((3, 10), (3, 10)),
        "onnxruntime-gpu",
        "",
        "cuda",
        "JetPack 6, CUDA 12.6",
        JETSON_INDEX,
    ),
    Package(
        AARCH64,
        (THOR,),
        ((3, 12), (3, 12)),
        "onnxruntime-gpu",
        "",
        "cuda",
        "JetPack 7, CUDA 13",
        JETSON_INDEX,
    ),
)


def oldest_runtime(machine: str) -> Python:
    """The first release of ONNX Runtime that trains there. On aarch64 those before 1.20 register no arena that graphs
    could share (issue 21191 of ONNX Runtime; seen under emulation, docs/aarch64.md)."""
    return (1, 20) if machine == AARCH64 else (1, 17)


def package(info: DeviceInfo, use: Use) -> Package | None:
    """The row for this machine and its Python, or None; the table is of Linux."""
    if info.system != "Linux":
        return None
    wanted = (info.machine, accelerator(info), python_of(info))
    return next((row for row in TABLE if row.use == use and row.suits(*wanted)), None)


def accelerator(info: DeviceInfo) -> str:
    """ "orin", "thor", "jetson" (another, or one that does not say which), "cuda", or "" for none."""
    words = re.findall(r"[a-z0-9]+", (info.model or "").lower())
    boards = [_BOARDS[word] for word in words if word in _BOARDS]
    if boards and (info.jetson or "nvidia" in words):
        return boards[0]
    return JETSON if info.jetson else CUDA if info.cuda else CPU


def python_of(info: DeviceInfo) -> Python:
    """Major and minor version of Python; (0, 0) where it cannot be read."""
    return release(info.python)


def release(version: str) -> Python:
    """Major and minor number; (0, 0) for a version that does not begin with them."""
    match = re.match(r"([0-9]{1,9})\.([0-9]{1,9})", version)
    return (int(match[1]), int(match[2])) if match else (0, 0)
