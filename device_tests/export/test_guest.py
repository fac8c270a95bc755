"""The network's own code, when it does more than build a network: it prints, exits, changes the folder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from device_tests.device.runs import ENVIRONMENT
from device_tests.export.test_pack import export
from edgelocal.bundle.folder import open_bundle, verify
from edgelocal.errors import ExportError

NET = """
import os, sys
from torch import nn

class Doing(nn.Module):
    def __init__(self, deed):
        super().__init__()
        self.deed = deed

    def forward(self, x):
        if self.deed is not None:
            self.deed(self)
        return x

def net(classes, deed=None):
    middle = [nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 8), Doing(deed), nn.ReLU()]
    return nn.Sequential(nn.Flatten(), *middle, nn.Linear(8, classes))
"""
LINEAR: dict[str, Any] = {"rule": "linear", "blocks": "2", "tail": "all"}


def write_net(folder: Path, make: str) -> None:
    (folder / "net.py").write_text(NET + make)


EXITS = {
    "import": "sys.exit(0)",
    "call": "def make(classes): sys.exit(0)",
    "forward": "def make(classes): return net(classes, lambda module: sys.exit(0))",
    "training": "def make(classes): return net(classes, lambda module: module.training and sys.exit(0))",
}


@pytest.mark.parametrize("when", EXITS)
def test_a_network_cannot_end_the_process(tmp_path: Path, when: str) -> None:
    write_net(tmp_path, EXITS[when])
    with pytest.raises(ExportError, match=r"net.py:make called sys.exit\(0\); code that is imported must not"):
        export(tmp_path / "out" / "b", f"{tmp_path}/net.py:make", **LINEAR)
    assert list((tmp_path / "out").iterdir()) == []


def test_an_interrupt_stays_one(tmp_path: Path) -> None:
    write_net(tmp_path, "def make(classes): raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        export(tmp_path / "out" / "b", f"{tmp_path}/net.py:make")
    assert list((tmp_path / "out").iterdir()) == []


def test_a_network_that_fails_in_training_only_is_refused(tmp_path: Path) -> None:
    write_net(tmp_path, "def make(classes): return net(classes, lambda module: module.training and 1 / 0)")
    with pytest.raises(ExportError, match="a trial run in training mode failed with ZeroDivisionError"):
        export(tmp_path / "b", f"{tmp_path}/net.py:make", **LINEAR)


def test_the_folder_is_that_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A network that changes the current folder moves neither the bundle nor the weights."""
    write_net(tmp_path, f"def make(classes):\n    os.chdir({str(tmp_path / 'away')!r})\n    return net(classes)")
    write_weights = f"import sys, torch; sys.path.insert(0, {str(tmp_path)!r}); import net\n"
    write_weights += f"torch.save(net.net(4).state_dict(), {str(tmp_path / 'w.pt')!r})"
    subprocess.run([sys.executable, "-c", write_weights], check=True)
    (tmp_path / "away").mkdir()
    monkeypatch.chdir(tmp_path)
    export(Path("b"), "net.py:make", weights=Path("w.pt"), **LINEAR)
    verify(open_bundle(tmp_path / "b"))
    assert list((tmp_path / "away").iterdir()) == []
    assert not list(tmp_path.glob(".*"))


NOISY = """
def say(module=None):
    print("print")
    os.write(1, b"write\\n")
    sys.__stdout__.write("kept back\\n")

say()

def make(classes):
    say()
    return net(classes, say)
"""


def run_export(tmp_path: Path, **streams: Any) -> subprocess.CompletedProcess[str]:
    options = ["--input", "1x8x8", "--classes", "4", "--rule", "linear", "--blocks", "2", "--tail", "all", "--json"]
    line = [sys.executable, "-m", "edgelocal", "export", "net.py:make", "b", *options]
    return subprocess.run(line, text=True, env=ENVIRONMENT, timeout=120, check=False, cwd=tmp_path, **streams)


def test_what_a_network_prints_does_not_reach_stdout(tmp_path: Path) -> None:
    write_net(tmp_path, NOISY)
    done = run_export(tmp_path, capture_output=True)
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["blocks"]) == 2
    assert all(text in done.stderr for text in ("print\n", "write\n", "kept back\n"))


@pytest.mark.parametrize("closed", [1, 2])
def test_a_process_without_a_standard_stream_exports_too(tmp_path: Path, closed: int) -> None:
    write_net(tmp_path, "def make(classes): return net(classes, print)")
    done = run_export(tmp_path, preexec_fn=lambda: os.close(closed))
    assert done.returncode == 0
    verify(open_bundle(tmp_path / "b"))
