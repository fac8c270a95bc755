"""`export --memory-budget`: what is chosen fits, and costs least; what is shown beside it is true."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from device_tests.export.test_request import request
from edgelocal.bundle import open_bundle
from edgelocal.errors import BudgetError, UsageError
from edgelocal.exporters.fit import IDLE_BYTES
from edgelocal.exporters.pack import export_bundle
from edgelocal.exporters.request import ExportRequest, parse_memory_budget
from edgelocal.plan import PipelineBytes, make_plan

MIB = 1 << 20
BATCH = 128
NOTHING = PipelineBytes(0, 0)


def asked(budget: int) -> ExportRequest:
    given: ExportRequest = request(blocks="auto", batch=BATCH, aux_depth=1)
    return replace(given, network="resnet14", budget_bytes=budget)


@pytest.fixture(scope="module")
def loose(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return export_bundle(asked(4096 * MIB), tmp_path_factory.mktemp("fit") / "b", lambda text: None)


def test_with_room_for_everything_the_network_stays_whole(loose: dict[str, Any]) -> None:
    assert len(loose["blocks"]) == 1
    chosen = [point for point in loose["frontier"] if point["chosen"]]
    plain = next(point for point in loose["frontier"] if point["kind"] == "bp")
    assert [point["training_macs"] for point in chosen] == [plain["training_macs"]]
    assert {point["kind"] for point in loose["frontier"]} == {"partition", "bp", "checkpointing", "per-unit", "linear"}


def test_a_tight_budget_is_kept_by_every_block_and_by_the_plan(loose: dict[str, Any], tmp_path: Path) -> None:
    partitions = sorted((p["working_set_bytes"], p["blocks"]) for p in loose["frontier"] if p["kind"] == "partition")
    least = partitions[0][0]
    whole = partitions[-1][0]
    assert least < whole
    budget = IDLE_BYTES + least
    found = export_bundle(asked(budget), tmp_path / "b", lambda text: None)
    assert len(found["blocks"]) > 1
    chosen = next(point for point in found["frontier"] if point["chosen"])
    assert chosen["working_set_bytes"] <= least
    manifest = open_bundle(tmp_path / "b").manifest
    plan = make_plan(
        manifest,
        batch=BATCH,
        schedule="interleaved",
        idle_bytes=IDLE_BYTES,
        pipeline=NOTHING,
        budget_bytes=budget,
        validates=False,
    )
    assert [block.accumulation for block in plan.blocks] == [1] * len(plan.blocks)
    # The chosen partition's MACs, as counted block by block.
    macs = [block.macs for block in manifest.blocks]
    assert all(m is not None for m in macs)
    assert sum(m.training + m.training_auxiliary for m in macs if m) == chosen["training_macs"]


def test_what_fits_nowhere_says_what_would(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"the smallest budget that would do is .* \((\d+) bytes") as caught:
        export_bundle(asked(IDLE_BYTES + MIB), tmp_path / "b", lambda text: None)
    assert not (tmp_path / "b").exists()
    smallest = int(str(caught.value).split("(")[1].split(" bytes")[0])
    export_bundle(asked(smallest), tmp_path / "b", lambda text: None)


@pytest.mark.parametrize("text", ["60%", "auto", "much"])
def test_only_sizes_are_budgets_on_the_workstation(text: str) -> None:
    with pytest.raises(UsageError):
        parse_memory_budget(text, "auto")


def test_a_budget_chooses_the_blocks_itself() -> None:
    with pytest.raises(UsageError, match="leave --blocks '3' out"):
        parse_memory_budget("200MiB", "3")
