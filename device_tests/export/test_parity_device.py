"""benchmarks/parity.py on a device: sessions for a fixed batch, rows that are kept, the page's tables of them."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

import cuda_page
import cuda_result
import parity
import pytest
from on_device import golden_error, make_provider
from parity import Case, Row, measure, measure_kept
from parity_training import Errors, Export

from edgelocal.errors import RuntimeMissingError
from edgelocal.runtime.cuda import NAME
from edgelocal.runtime.library import runtime
from edgelocal.runtime.provider import CPU, Provider

CASES = [Case("mlp", "sgd", 1), Case("mlp", "sgd", 3)]


def test_sessions_for_a_fixed_batch_train_alike() -> None:
    free, fixed = (measure(Case("mlp", "adamw", 3), 3, provider) for provider in (CPU, Provider(fixed_batch=True)))
    assert fixed.graph == free.graph
    assert fixed.graph.loss < 1e-6


def test_the_golden_bundle_is_near_float64() -> None:
    assert 0 < golden_error(make_provider("cpu")) < 1e-6


@pytest.mark.skipif(NAME in runtime().get_available_providers(), reason="this runtime has CUDA")
def test_no_device_is_said_with_what_to_do() -> None:
    with pytest.raises(RuntimeMissingError, match=f"has no {NAME}"):
        make_provider("cuda")


def test_rows_are_kept_and_not_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Case] = []
    errors = Errors(1e-7, 2e-6, 3e-5, 4e-4, 5e-3)

    def fake(case: Case, steps: int, provider: Provider, export: Export) -> Row:
        asked.append(case)
        return Row(case, steps, errors, replace(errors, loss=6e-8), 2.0)

    monkeypatch.setattr(parity, "measure", fake)
    file = tmp_path / "result.json"
    given = argparse.Namespace(device="cpu", tf32=False, bf16=False, result=file, steps=20, minutes=0)
    first = measure_kept(CASES[:1], given)
    assert measure_kept(CASES, given) == [*first, replace(first[0], case=CASES[1])]
    assert asked == CASES
    assert measure_kept([Case("vit", "sgd", 1)], argparse.Namespace(**{**vars(given), "minutes": 1e-9})) == []
    assert asked == CASES  # the time was up
    shown = cuda_page.parity(cuda_result.read(file, "cpu"))
    assert "| 1.0e-07 | 2.0e-06 | 4.0e-04 | 2 |" in shown
    assert "| mlp | sgd | 3 | float32 | 1.0e-07 | 2.0e-06 | 3.0e-05 | 4.0e-04 | 6.0e-08 | 4.0e-04 |" in shown


def test_without_a_result_every_row_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def fake(case: Case, steps: int, provider: Provider, export: Export) -> Row:
        asked.append(case.blocks)
        return Row(case, steps, Errors(0, 0, 0, 0, 0), Errors(0, 0, 0, 0, 0), 0)

    monkeypatch.setattr(parity, "measure", fake)
    given = argparse.Namespace(device="cpu", tf32=False, bf16=False, result=None, steps=20, minutes=0)
    measure_kept(CASES, given)
    measure_kept(CASES, given)
    assert asked == [1, 3, 1, 3]
