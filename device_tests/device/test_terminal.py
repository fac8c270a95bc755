"""What a person sees on a terminal of 80 columns: bar, score of every block, speed, peak memory, time left."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import sys
import termios
from pathlib import Path

import pytest

from device_tests.device.runs import ENVIRONMENT, RESIDUAL, command, write_data

COLUMNS, LINES = 80, 24
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


def on_terminal(*arguments: object) -> tuple[int, list[str]]:
    """Run the command on a pseudo-terminal; its exit code, and all lines that were ever shown."""
    pid, master = pty.fork()
    if pid == 0:  # pragma: no cover - the child becomes the command
        fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
        environment = {k: v for k, v in ENVIRONMENT.items() if k not in ("COLUMNS", "NO_COLOR")} | {"TERM": "xterm"}
        os.execve(sys.executable, [sys.executable, "-m", "edgelocal", *map(str, arguments)], environment)
    shown = b""
    while True:
        try:
            part = os.read(master, 65536)
        except OSError:  # Linux says EIO once the other side is closed
            break
        if not part:
            break
        shown += part
    status = os.waitpid(pid, 0)[1]
    os.close(master)
    text = CONTROL.sub("", shown.decode())
    return os.waitstatus_to_exitcode(status), re.split(r"[\r\n]+", text)


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    folder = tmp_path_factory.mktemp("terminal")
    data = write_data(folder / "d.npz", RESIDUAL, samples=480)
    code, lines = on_terminal("train", RESIDUAL, "--data", data, "--out", folder / "run", "--epochs", 12, "--lr", 0.02)
    assert code == 0, lines
    return lines


def test_the_bar_fits_its_line(shown: list[str]) -> None:
    bars = [line for line in shown if "━" in line and "epoch" in line]
    assert bars
    shown_always = r"epoch \d+/12 [━╸╺]+ \d+ samples/s  peak \d+(\.\d)? MiB (\d:\d\d:\d\d|-:--:--)"
    for line in bars:
        assert re.match(shown_always, line), line
        assert len(line.rstrip()) <= COLUMNS
        assert "…" not in line


def test_the_score_of_every_block_is_below_the_bar(shown: list[str]) -> None:
    scores = [line for line in shown if re.match(r"00 loss \d\.\d{3} +[\d.]+ %", line)]
    assert scores
    assert all(re.search(r"01 loss .* %", line) for line in scores)


def test_the_start_names_versions_and_the_end_the_result(shown: list[str]) -> None:
    text = "\n".join(shown)
    for name in ("edgelocal", "Python", "numpy", "onnxruntime", "exported with", "torch"):
        assert name in text
    assert re.search(r"validation loss .* peak memory .* in steps", text)


def test_without_a_terminal_there_are_plain_lines(tmp_path: Path) -> None:
    data = write_data(tmp_path / "d.npz", RESIDUAL)
    done = command("train", RESIDUAL, "--data", data, "--out", tmp_path / "run", "--epochs", 3)
    assert done.returncode == 0
    assert "\x1b" not in done.stdout + done.stderr
    epochs = [line for line in done.stderr.splitlines() if line.startswith("epoch ")]
    assert len(epochs) == 3
    assert all(
        re.match(r"epoch \d: 00 loss .* 01 loss .* 02 loss .* validation .* lr \S+  [\d.]+ s$", e) for e in epochs
    )
