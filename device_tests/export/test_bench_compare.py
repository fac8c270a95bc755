"""The side-by-side benchmark with invented measurements: order of rounds, medians, what does not fit, the table."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from edgelocal.errors import BudgetError, UsageError
from edgelocal.exporters.bench import compare
from edgelocal.exporters.bench.own_side import Bundle, export_variant, measure_own, write_samples
from edgelocal.exporters.bench.result import Measurement, Setting

MIB = 1 << 20
SETTING = Setting("resnet8", input="1x8x8", batch=8, steps=4, threads=1)


def measurement(variant: str, working_set: int, seconds: float = 0.5, batch: int = 8) -> Measurement:
    idle = 70 * MIB
    return Measurement(
        variant, "resnet8", batch, 0, idle, working_set, idle + working_set, (seconds,), seconds / batch, 10, (2.0,)
    )


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every measurement in order; PyTorch needs 400 MiB, half of it with its allocator tuned; the blocks 50 MiB."""
    made: list[str] = []
    noise: Iterator[int] = iter(range(1000))

    def torch(setting: Setting, segments: int = 0) -> Measurement:
        made.append(f"torch {segments}{' tuned' if setting.tuned else ''}")
        size = (400 if segments == 0 else 300) * MIB // (2 if setting.tuned else 1)
        return measurement("bp", size + next(noise), batch=setting.batch)

    def best(setting: Setting, say: Any) -> Measurement:
        found = torch(setting, 5)
        return Measurement(**{**vars(found), "segments": 5})

    def export(setting: Setting, folder: Path, variant: str, say: Any, **options: Any) -> Bundle:
        if options.get("budget") and int(options["budget"]) < 70 * MIB + 100 * MIB:
            raise BudgetError("no partition fits")
        return Bundle(variant, folder)

    def own(setting: Setting, bundle: Bundle, data: Path, out: Path, budget: int | None = None) -> Measurement:
        made.append(bundle.variant)
        if budget is not None and budget < 70 * MIB + 50 * MIB:
            raise BudgetError("too little")
        return measurement(bundle.variant, 50 * MIB, 1.0)

    monkeypatch.setattr(compare, "measure_bp", torch)
    monkeypatch.setattr(compare, "measure_checkpointed", torch)
    monkeypatch.setattr(compare, "best_checkpointing", best)
    monkeypatch.setattr(compare, "batch_at_peak", lambda setting, size, say: None if setting.tuned else torch(setting))
    monkeypatch.setattr(compare, "export_variant", export)
    monkeypatch.setattr(compare, "measure_own", own)
    monkeypatch.setattr(compare, "_smallest", lambda *given: 70 * MIB + 50 * MIB)
    return made


def test_rounds_are_interleaved_and_what_does_not_fit_is_said(calls: list[str], tmp_path: Path) -> None:
    said: list[str] = []
    found = compare.bench_memory(SETTING, 2, tmp_path / "f.json", said.append)
    assert json.loads((tmp_path / "f.json").read_text()) == json.loads(json.dumps(found))
    names = [row["name"] for row in found["variants"]]
    assert names[:4] == [
        "PyTorch",
        "PyTorch (malloc tuned)",
        "PyTorch, 5 checkpoints",
        "PyTorch, 5 checkpoints (malloc tuned)",
    ]
    assert "edgelocal, partition for 50% of PyTorch" in names
    # 25 % and 12 % of 400 MiB: the search finds nothing for the second and the third; blocks of one unit fail at 12 %.
    assert [s["name"] for s in found["skipped"]] == [
        "edgelocal, partition for 12% of PyTorch",
        "edgelocal, a block for every unit, 12% of PyTorch",
    ]
    rounds = [i for i, call in enumerate(calls) if call == "torch 0"]
    assert calls[rounds[1] : rounds[1] + 4] == ["torch 0", "torch 0 tuned", "torch 5", "torch 5 tuned"]
    assert [row["name"] for row in found["cut_batches"]] == ["PyTorch, batch cut"]
    assert any(text.startswith("round 2 of 2, PyTorch: 400 MiB") for text in said)


def test_the_table_shows_parts_of_pytorch(calls: list[str]) -> None:
    console = Console(width=200, record=True, quiet=False, file=None)
    with console.capture() as shown:
        console.print(compare.bench_table(compare.bench_memory(SETTING, 1, None, lambda text: None)))
    lines = {line.split("│")[1].strip(): line for line in shown.get().splitlines() if line.count("│") > 5}
    assert "1.000" in lines["PyTorch"]
    assert "0.125" in lines["edgelocal, a block for every unit"]
    assert "2.00" in lines["edgelocal, a block for every unit"]


def test_a_bundle_is_trained_as_a_user_would(tmp_path: Path) -> None:
    bundle = export_variant(SETTING, tmp_path / "b", "blocks", lambda text: None, rule="auglocal", blocks="2")
    write_samples(SETTING, tmp_path / "d.npz")
    found = measure_own(SETTING, bundle, tmp_path / "d.npz", tmp_path / "run", 512 * MIB)
    assert found.process_peak_bytes == found.idle_bytes + found.working_set_bytes < 512 * MIB
    assert found.time_per_sample_s > 0
    with pytest.raises(BudgetError, match="the budget is 20 MiB"):
        measure_own(SETTING, bundle, tmp_path / "d.npz", tmp_path / "run2", 20 * MIB)
    with pytest.raises(UsageError, match=r"training blocks failed with exit code 5: .*does not exist"):
        measure_own(SETTING, bundle, tmp_path / "none.npz", tmp_path / "run3")
