"""benchmarks/cuda.py: a rehearsal on the CPU, and the page drawn from invented figures."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import cuda_bench
import cuda_page
import cuda_result
import pytest

from edgelocal.errors import UsageError
from edgelocal.exporters.bench.result import Measurement

MIB = 1 << 20
ROOT = Path(__file__).parents[2]
MACHINE = {
    "device": "cuda",
    "name": "A GPU",
    "driver": "1.2",
    "memory": "80 GB",
    "host": "h",
    "python": "3",
    "packages": {},
}


def measured(variant: str, working_set: int, seconds: float) -> dict[str, Any]:
    found = Measurement(variant, "resnet32", 1024, 0, 300 * MIB, working_set, 400 * MIB, (seconds,), seconds, 7, (2.0,))
    values: dict[str, Any] = json.loads(json.dumps(asdict(found)))
    return values


def result(share: float, ratio: float) -> dict[str, Any]:
    """Ours takes `share` of PyTorch's memory and `ratio` of the time of its local program."""
    rounds = {
        cuda_page.TORCH: [measured("bp", 1000 * MIB, 1.0)] * 2,
        cuda_page.LOCAL: [measured("local", 500 * MIB, 2.0), measured("local", 500 * MIB, 4.0)],
        cuda_page.OWN_UNITS: [
            measured("units", int(share * 1000) * MIB, 2.0 * ratio),
            measured("units", int(share * 1000) * MIB, 4.0 * ratio),
        ],
    }
    setting = {"input": "3x32x32", "steps": 10}
    skipped = [{"name": cuda_page.COMPILED, "why": "no\ncompiler"}]
    return {
        "machine": MACHINE,
        "speed": {"resnet32, batch 1024": {"setting": setting, "rounds": rounds, "skipped": skipped}},
    }


def verdicts(found: dict[str, Any]) -> dict[str, str]:
    """The last cell of every goal's row, by what it is about."""
    rows = [[cell.strip() for cell in goal.row().strip("|").split("|")] for goal in cuda_page.goals(found)]
    return {row[0]: row[-1] for row in rows}


def test_goals_are_judged_by_what_was_found() -> None:
    memory = "ResNet-32, batch 1024: memory of a block for every unit, of PyTorch's"
    time = "resnet32, batch 1024: time of a step, of PyTorch's on the same blocks"
    good, bad = verdicts(result(0.2, 1.2)), verdicts(result(0.21, 1.21))
    assert (good[memory], good[time]) == ("reached", "reached")
    assert (bad[memory], bad[time]) == ("**not reached**", "**not reached**")
    assert set(verdicts({}).values()) == {"not measured"}
    assert good["ResNet-110, batch 1024: memory of a block for every unit, of PyTorch's"] == "not measured"


def test_accuracy_is_compared_at_the_end_of_as_many_epochs() -> None:
    runs = {
        "bp": {"epochs": 30, "done": True, "test": 0.93},
        "auglocal per-unit, d = 6": {"epochs": 30, "done": True, "test": 0.915},
    }
    goal = "ResNet-110, auglocal d = 6: points of accuracy below bp"
    assert verdicts({"learning": {"resnet110": runs}})[goal] == "**not reached**"
    runs["bp"]["test"] = 0.92
    assert verdicts({"learning": {"resnet110": runs}})[goal] == "reached"
    runs["bp"]["done"] = False
    assert verdicts({"learning": {"resnet110": runs}})[goal] == "not measured"
    runs["bp"] |= {"done": True, "epochs": 31}
    assert verdicts({"learning": {"resnet110": runs}})[goal] == "not measured"


def test_the_page_says_what_was_not_run() -> None:
    empty = cuda_page.page({})
    assert "Nothing on this page has been run on a GPU yet" in empty
    assert empty.count(cuda_page.NOT_YET) == 3
    full = cuda_page.page(result(0.2, 1.2) | {"gradients": {"markdown": "forms, measured"}})
    assert "Measured on A GPU, driver 1.2, 80 GB" in full
    assert "| edgelocal, a block for every unit | 200 | 0.200 |" in full
    assert "PyTorch, torch.compile: no compiler" in full
    assert "forms, measured" in full
    assert full.count(cuda_page.NOT_YET) == 1
    assert "A rehearsal on the CPU" in cuda_page.page({"machine": {**MACHINE, "device": "cpu"}})


def test_the_committed_page_is_drawn_by_this_program() -> None:
    """Up to its figures: the same headings and commands."""
    page = (ROOT / "docs" / "cuda.md").read_text()
    drawn = cuda_page.page({})
    fixed = [line for line in drawn.splitlines() if line.startswith(("#", "    make", "- "))]
    assert [line for line in page.splitlines() if line in fixed] == fixed


def test_a_file_holds_figures_of_one_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "out" / "result.json"
    cuda_result.put(file, "cpu", ("speed", "one"), 1)
    cuda_result.put(file, "cpu", ("speed", "two"), 2)
    cuda_result.put(file, "cpu", ("gradients",), {"markdown": "x"})
    found = cuda_result.read(file, "cpu")
    assert (found["speed"], found["gradients"]) == ({"one": 1, "two": 2}, {"markdown": "x"})
    monkeypatch.setattr(cuda_result, "_versions", lambda: {"torch": "0"})
    with pytest.raises(UsageError, match=r"was measured with packages .*, here \{'torch': '0'\}: give another file"):
        cuda_result.put(file, "cpu", ("speed", "one"), 3)


def test_a_rehearsal_measures_keeps_and_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    line = [sys.executable, str(ROOT / "benchmarks" / "cuda.py"), "--device", "cpu", "--networks", "resnet8", "--batch"]
    line += ["4", "--rounds", "1", "--steps", "2", "--result", str(file), "--variants"]
    subprocess.run([*line, cuda_page.LOCAL], check=True, capture_output=True)
    first = json.loads(file.read_text())["speed"]["resnet8, batch 4"]
    done = subprocess.run(
        [*line, f"{cuda_page.LOCAL}; {cuda_page.OWN_UNITS}"], check=True, capture_output=True, text=True
    )
    second = json.loads(file.read_text())["speed"]["resnet8, batch 4"]
    assert second["rounds"][cuda_page.LOCAL] == first["rounds"][cuda_page.LOCAL]  # not measured again
    assert second["skipped"] == []
    own = second["rounds"][cuda_page.OWN_UNITS][0]
    assert own["process_peak_bytes"] - own["idle_bytes"] == own["working_set_bytes"] > 0
    assert f"| {cuda_page.OWN_UNITS} |" in done.stdout


def test_when_the_time_is_up_nothing_more_is_begun(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "result.json"
    words = ["--device", "cpu", "--networks", "resnet8", "--batch", "4", "--minutes", "1e-9", "--result", str(file)]
    cuda_bench.main(None, words)
    out, err = capsys.readouterr()
    assert "the time is up: give the same command again" in err
    assert out.strip() == cuda_page.NOT_YET
    assert not file.exists()
