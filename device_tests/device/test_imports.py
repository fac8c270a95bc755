"""What the device side may import, and what importing it costs."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
from pathlib import Path

import edgelocal

PACKAGE = Path(edgelocal.__file__).parent
SOURCES = sorted(p for p in PACKAGE.rglob("*.py") if "exporters" not in p.relative_to(PACKAGE).parts)
LAYERS = (  # from below
    *("errors", "machine", "storage", "bundle", "memory", "data", "runtime", "training", "report", "commands", "cli"),
)
WORKSTATION = ("torch", "onnx", "onnxscript", "safetensors", "sklearn", "sympy")

BLOCKED = f"""
import importlib, json, pathlib, sys

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {WORKSTATION!r} or name.startswith("edgelocal.exporters"):
            raise AssertionError("imports " + name)

sys.meta_path.insert(0, Refuse())
import edgelocal
root = pathlib.Path(edgelocal.__file__).parent
parts = [p.relative_to(root.parent).with_suffix("").parts for p in root.rglob("*.py")]
names = [".".join(p) for p in parts if "exporters" not in p and p[-1] not in ("__main__", "__init__")]
for name in names:
    importlib.import_module(name)
print(json.dumps(names))
"""

NUMPY = """
import time
started = time.process_time()
import numpy
print(time.process_time() - started)
"""

COST = """
import json, time
started = time.process_time()
import edgelocal.cli, edgelocal.commands.train, edgelocal.commands.evaluate
seconds = time.process_time() - started
from edgelocal.machine.budget import peak_rss_bytes  # not ru_maxrss: that counts what the parent held when it forked
print(json.dumps([seconds, peak_rss_bytes() / 2**20]))
"""


def python(code: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_device_side_imports_without_torch_onnx_and_exporters() -> None:
    names = json.loads(python(BLOCKED))
    assert {
        "edgelocal.cli",
        "edgelocal.training.trainer",
        "edgelocal.runtime.session",
        "edgelocal.data.formats.images",
    } <= set(names)


def test_importing_takes_under_400_ms_and_60_mib() -> None:
    """Processor time, the best of five. A machine that is slow just now may take longer, but no more than four times as
    long as for numpy alone, which is measured in turn (a fourth of that limit on a machine that is not)."""
    costs, numpys = [], []
    for _ in range(5):
        costs.append(json.loads(python(COST)))
        numpys.append(float(python(NUMPY)))
    seconds, mebibytes = zip(*costs, strict=True)
    slow = [own / other for own, other in zip(seconds, numpys, strict=True)]
    assert min(seconds) < 0.4 or min(slow) < 4
    assert min(mebibytes) < 60


def imported(path: Path) -> dict[str, bool]:
    """Top-level names a file imports -> whether on the level of the module."""
    tree = ast.parse(path.read_text())
    top = {id(node) for node in tree.body}
    found: dict[str, bool] = {}
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module]
        for name in names:
            found[name] = found.get(name, False) or id(node) in top
    return found


def test_one_module_imports_the_runtime() -> None:
    users = {p.name for p in SOURCES for name in imported(p) if name.split(".")[0] == "onnxruntime"}
    assert users == {"library.py"}


def test_only_the_command_line_reaches_the_exporters_and_only_when_asked() -> None:
    for path in SOURCES:
        for name, at_top in imported(path).items():
            assert name.split(".")[0] not in WORKSTATION, path
            if name.startswith("edgelocal.exporters"):
                assert path.name == "cli.py"
                assert not at_top


def layer(parts: tuple[str, ...]) -> int:
    return LAYERS.index(parts[1].removesuffix(".py"))


def test_every_package_knows_only_those_below_it() -> None:
    for path in SOURCES:
        own = path.relative_to(PACKAGE.parent).parts
        if own[1] in ("__init__.py", "__main__.py"):
            continue
        for name in imported(path):
            parts = tuple(name.split("."))
            if parts[0] == "edgelocal" and parts[1:] and parts[1] != "exporters":
                assert layer(parts) <= layer(own), f"{path} imports {name}"


def writes(path: Path) -> set[str]:
    """The calls in a file that change the file system."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        name, owner = node.func.attr, node.func.value
        mode = node.args[0].value if node.args and isinstance(node.args[0], ast.Constant) else ""
        if name in ("write_bytes", "write_text", "fsync", "mkdir", "savez"):
            found.add(name)
        if name in ("rename", "replace", "remove") and isinstance(owner, ast.Name) and owner.id == "os":
            found.add(name)
        if name == "open" and isinstance(mode, str) and set(mode) & set("wax+"):
            found.add(name)
    return found


def test_only_the_store_writes_what_must_last() -> None:
    writers = {path.name: writes(path) for path in SOURCES if path.name != "disk.py" and writes(path)}
    assert writes(PACKAGE / "storage/disk.py") >= {"fsync"}
    assert writers == {
        "cache.py": {"mkdir", "open"},  # its file need not outlive the process
        "pages.py": {"open"},  # nor its
        "budget.py": {"write_text"},  # /proc/self/clear_refs
    }
