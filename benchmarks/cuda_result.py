"""The file that keeps what was measured on a GPU, by section, so that one can be measured again without the others.

    machine     the GPU, its driver, versions
    parity      precision -> rows of benchmarks/parity.py, by name; "golden": the error of the golden steps
    speed       case -> variants and their rounds, of benchmarks/cuda.py
    learning    network and candidate -> what benchmarks/learning_full.py trained

A section may also be text: {"markdown": ...} is put on the page as it is.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

from edgelocal.errors import UsageError
from edgelocal.machine.device import describe
from edgelocal.storage.whole import atomic_write

FILE = Path("out/cuda/result.json")
_PACKAGES = ("torch", "onnxruntime-gpu", "onnxruntime", "numpy", "nvidia-cudnn-cu13", "nvidia-cudnn-cu12")
_SAME = ("device", "name", "packages")  # what figures in one file must have in common
_ASKED = "name,driver_version,memory.total"

Result = dict[str, Any]


def read(path: Path | None, device: str) -> Result:
    """What is kept, {} if nothing is.

    Raises:
        UsageError: it was measured on another machine, or with other versions.
    """
    if path is None or not path.is_file():
        return {}
    found: Result = json.loads(path.read_text())
    here = machine(device)
    other = [f"{key} {found['machine'][key]}, here {here[key]}" for key in _SAME if found["machine"][key] != here[key]]
    if other:
        raise UsageError(f"{path} was measured with {'; '.join(other)}: give another file, or move it away")
    return found


def put(path: Path, device: str, where: tuple[str, ...], value: Any) -> None:
    """Keep `value` in the section that `where` leads to; all else stays as it is."""
    found = read(path, device) or {"machine": machine(device)}
    inner = found
    for name in where[:-1]:
        inner = inner.setdefault(name, {})
    inner[where[-1]] = value
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, [(json.dumps(found, indent=1) + "\n").encode()])


def machine(device: str) -> dict[str, Any]:
    """The device's name, its driver and memory as nvidia-smi says, the host, and the versions of what was measured."""
    host = f"{platform.machine()}, {describe().cores} cores"
    found = {"device": device, "host": host, "python": platform.python_version(), "packages": _versions()}
    return found | (_gpu() if device == "cuda" else {"name": "CPU"})


def _gpu() -> dict[str, str]:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return {"name": "a GPU without nvidia-smi"}
    line = [tool, f"--query-gpu={_ASKED}", "--format=csv,noheader"]
    done = subprocess.run(line, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise UsageError(f"nvidia-smi failed: {(done.stderr or done.stdout).strip()}")
    values = (value.strip() for value in done.stdout.splitlines()[0].split(","))
    return dict(zip(("name", "driver", "memory"), values, strict=True))


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found
