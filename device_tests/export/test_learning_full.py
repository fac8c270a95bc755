"""benchmarks/learning_full.py: its table and sections, what it chooses, that it stops and goes on; a tiny rehearsal."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import cuda_result
import learning
import learning_full
import numpy as np
import pytest
from learning_full import CANDIDATES, Training, body, reached, table, train
from page_sections import section, with_section

PAGE = "# Title\n\ntext\n\n## One\n\nfirst\n\n### below\n\n## Two\n\nsecond\n"


def test_a_section_is_replaced_and_the_rest_stays() -> None:
    assert section(PAGE, "One") == "first\n\n### below"
    assert section(PAGE, "Two") == "second"
    assert section(PAGE, "Tw") is None
    assert with_section(PAGE, "One", "new") == "# Title\n\ntext\n\n## One\n\nnew\n\n## Two\n\nsecond\n"
    assert with_section(PAGE, "Two", "new\n") == PAGE.replace("second", "new")
    assert with_section(PAGE, "Three", "new") == f"{PAGE}\n## Three\n\nnew\n"


def test_the_other_program_keeps_the_section(tmp_path: Path) -> None:
    page = tmp_path / "learning.md"
    learning.write_page(page, "# CPU\n\nold")
    assert page.read_text() == "# CPU\n\nold"
    page.write_text(with_section(page.read_text(), learning.GPU_SECTION, "of the GPU"))
    learning.write_page(page, "# CPU\n\nnew")
    assert page.read_text() == f"# CPU\n\nnew\n\n## {learning.GPU_SECTION}\n\nof the GPU\n"


def run(test: float | None, peak: int, seconds: float, done: int = 30) -> dict[str, Any]:
    found = {"epochs": 30, "epochs_done": done, "done": test is not None, "seed": 0, "test": test}
    return {**found, "peak_bytes": peak, "epoch_s": seconds}


def test_the_table_stands_beside_what_was_published() -> None:
    runs = {
        "bp": run(0.9312, 1 << 30, 10.0),
        "auglocal per-unit, d = 6": run(0.9254, 1 << 28, 45.0),
        "linear per-unit": run(None, 1 << 26, 5.0, done=12),
    }
    lines = table(runs, "resnet110").splitlines()
    assert "| bp | 93.12 % | 94.61 % | 1 GiB | 1.00 | 10.0 | 1.00 | 30 of 30 |" in lines
    assert "| auglocal per-unit, d = 6 | 92.54 % | 93.96 % | 256 MiB | 0.25 | 45.0 | 4.50 | 30 of 30 |" in lines
    assert "| linear per-unit | not at its end |  | 64 MiB | 0.06 | 5.0 | 0.50 | 12 of 30 |" in lines
    assert "| auglocal per-unit, d = 2 | not trained |  | | | | | |" in lines
    assert len({line.count("|") for line in lines}) == 1
    assert body({}).startswith("**Not run yet")
    assert "On A GPU, driver 1, host h." in body(
        {"machine": {"name": "A GPU", "driver": "1", "host": "h"}, "learning": {"resnet110": runs}}
    )


def training(folder: Path, epochs: int = 30) -> Training:
    return Training("resnet8", "bp", folder, epochs, "cpu", 0)


def test_the_recipe_is_the_same_for_all(tmp_path: Path) -> None:
    assert [training(tmp_path, epochs).warmup for epochs in (5, 30, 100, 400)] == [0, 3, 10, 10]
    depths = {name: rest for name, rest in CANDIDATES.items() if "per-unit, d" in name}
    assert {name[-1]: rest[-1] for name, rest in depths.items()} == {d: d for d in "246"}


def test_a_run_is_read_wherever_it_stands(tmp_path: Path) -> None:
    given = training(tmp_path)
    assert reached(given) is None
    given.run.mkdir()
    (given.run / "metrics.jsonl").write_text('{"seconds": 3}\n{"seconds": 2}\n{"seconds": 2}\n')
    found = reached(given)
    assert found is not None
    assert (found["done"], found["epochs_done"], found["epoch_s"], found["test"]) == (False, 3, 2, None)
    device = {"peak_bytes": 900, "context_bytes": 300}
    (given.run / "report.json").write_text(json.dumps({"validation": {"accuracy": 0.5}, "device": device}))
    found = reached(given)
    assert found is not None
    assert (found["done"], found["test"], found["peak_bytes"]) == (True, 0.5, 600)


WAITS = "import signal, sys, time; signal.signal(signal.SIGINT, lambda *_: sys.exit({code})); time.sleep(60)"


@pytest.mark.parametrize(("code", "goes_on"), [(7, True), (3, False)])
def test_when_the_time_is_up_a_training_is_asked_to_stop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, goes_on: bool
) -> None:
    line = [sys.executable, "-c", WAITS.format(code=code)]
    monkeypatch.setattr(Training, "command", lambda self, data: line)
    if goes_on:
        assert not train(training(tmp_path), tmp_path, time.monotonic() + 3)
    else:
        with pytest.raises(SystemExit, match="resnet8, bp: training failed with exit code 3"):
            train(training(tmp_path), tmp_path, time.monotonic() + 3)


def test_a_rehearsal_trains_keeps_and_is_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rng = np.random.default_rng(0)
    arrays = {f"x_{split}": rng.integers(0, 256, (40, 3, 32, 32), dtype=np.uint8) for split in ("train", "test")}
    arrays |= {f"y_{split}": np.arange(40) % 10 for split in ("train", "test")}
    np.savez(tmp_path / "data.npz", **arrays)
    words = [str(tmp_path / "data.npz"), "--device", "cpu", "--networks", "resnet8", "--epochs", "2", "--candidates"]
    words += ["bp", "--work", str(tmp_path / "work"), "--result", str(tmp_path / "result.json")]
    learning_full.main([*words, "--minutes", "1e-9"])
    assert "the time is up" in capsys.readouterr().err
    learning_full.main(words)
    found = cuda_result.read(tmp_path / "result.json", "cpu")["learning"]["resnet8"]["bp"]
    assert (found["done"], found["epochs_done"]) == (True, 2)
    assert found["peak_bytes"] > 0
    monkeypatch.setattr(Training, "command", lambda self, data: ["false"])
    learning_full.main(words)
    page = tmp_path / "learning.md"
    page.write_text("# CPU\n")
    learning_full.main(["--write", str(page), "--result", str(tmp_path / "result.json")])
    assert f"| bp | {100 * found['test']:.2f} % |" in page.read_text()
    with pytest.raises(SystemExit, match="no candidate is called 'no'"):
        learning_full.main([*words[:-6], "--candidates", "no", *words[-4:]])
