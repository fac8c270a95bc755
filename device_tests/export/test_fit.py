"""`export --memory-budget`: what is chosen fits, and costs least; what is shown beside it is true."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from device_tests.export.test_request import request
from edgelocal.bundle.folder import open_bundle
from edgelocal.bundle.spec import GRAPH_BYTES, NODE_BYTES, BlockSpec, FrontierSpec, MacsSpec, RuleSpec
from edgelocal.commands.plan import PlanRequest, plan_bundle
from edgelocal.errors import BudgetError, UsageError
from edgelocal.exporters.pack import export_bundle
from edgelocal.exporters.request import ExportRequest, parse_memory_budget
from edgelocal.exporters.search.comparison import checkpointed
from edgelocal.exporters.search.costs import make_problem
from edgelocal.exporters.search.problem import Candidate
from edgelocal.exporters.search.trial import THREADS
from edgelocal.exporters.units import load_network
from edgelocal.memory.needs import CONVOLUTION_BYTES, RUNTIME_BYTES, THREAD_BYTES

MIB = 1 << 20
BATCH = 128


def asked(budget: int, rule: str = "auglocal") -> ExportRequest:
    given: ExportRequest = request(blocks="auto", batch=BATCH, aux_depth=1, rule=rule)
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


def planned(folder: Path, budget: int, samples: int = 50_000) -> dict[str, Any]:
    """What `edgelocal plan` says for a Raspberry Pi: with data, validation and augmentation."""
    return plan_bundle(
        PlanRequest(
            bundle=folder,
            memory_budget=str(budget),
            batch=None,
            micro_batch=None,
            schedule="interleaved",
            samples=samples,
            validate=True,
            augment=True,
            profile="raspberry-pi-5-4gb",
            threads=None,
        )
    )


def test_what_fits_nowhere_says_what_would_and_that_is_planned_whole(tmp_path: Path) -> None:
    with pytest.raises(BudgetError, match=r"the smallest budget that would do is .* \((\d+) bytes") as caught:
        export_bundle(asked(80 * MIB, "linear"), tmp_path / "b", lambda text: None)
    assert not (tmp_path / "b").exists()
    smallest = int(str(caught.value).split("(")[1].split(" bytes")[0])
    found = export_bundle(asked(smallest, "linear"), tmp_path / "b", lambda text: None)
    assert len(found["blocks"]) > 1
    plan = planned(tmp_path / "b", smallest)
    assert [block["accumulation"] for block in plan["blocks"]] == [1] * len(plan["blocks"])
    assert [block["micro_batch"] for block in plan["blocks"]] == [BATCH] * len(plan["blocks"])
    needed = plan["thresholds"]["whole_batch_bytes"]
    assert 0.95 * smallest <= needed <= smallest  # what was foreseen was not far more than that either
    # The chosen partition's figures are those of the bundle, counted and modelled block by block.
    chosen = next(point for point in found["frontier"] if point["chosen"])
    manifest = open_bundle(tmp_path / "b").manifest
    macs = [block.macs for block in manifest.blocks]
    assert sum(m.training + m.training_auxiliary + m.recomputed for m in macs if m) == chosen["training_macs"]
    assert sum(m.recomputed for m in macs if m) > 0
    assert chosen["working_set_bytes"] == max(modelled(block) for block in manifest.blocks)
    points = [(p["working_set_bytes"], p["training_macs"]) for p in found["frontier"] if p["kind"] == "partition"]
    assert len(set(points)) == len(points)


def modelled(block: BlockSpec) -> int:
    """The sum by hand: state and what a step writes anew, batch and output, the arena, a loaded graph, the runtime."""
    assert block.memory is not None
    assert block.step.nodes is not None
    kept = {f"new/{name}" for name in block.step.in_place or ()}
    tensors = [*block.step.inputs]
    tensors += [t for t in block.step.outputs if (t.name.startswith("new/") or t.name == "h") and t.name not in kept]
    outside = sum({"float32": 4, "int64": 8, "bool": 1}[t.dtype] * math.prod(t.resolve(BATCH)) for t in tensors)
    graph = GRAPH_BYTES + NODE_BYTES * block.step.nodes + THREAD_BYTES * (THREADS - 1)
    return RUNTIME_BYTES + CONVOLUTION_BYTES + graph + outside + block.memory.step.arena_bytes(BATCH)


@pytest.fixture(scope="module")
def per_unit(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    given = replace(asked(0), budget_bytes=None, blocks="per-unit")
    return export_bundle(given, tmp_path_factory.mktemp("units") / "b", lambda text: None)


def test_a_bundle_that_was_not_searched_for_is_compared_too(loose: dict[str, Any], per_unit: dict[str, Any]) -> None:
    points = {point["kind"]: point for point in per_unit["frontier"]}
    assert {kind: point["estimated"] for kind, point in points.items()} == {
        "partition": False,
        "bp": True,
        "checkpointing": True,
    }
    assert {point["batch"] for point in per_unit["frontier"]} == {BATCH}
    macs = [block["macs"] for block in per_unit["blocks"]]
    chosen = points["partition"]
    assert chosen["chosen"]
    assert chosen["training_macs"] == sum(m["training"] + m["training_auxiliary"] + m["recomputed"] for m in macs)
    searched = {point["kind"]: point for point in loose["frontier"] if point["kind"] != "partition"}
    assert searched["per-unit"]["working_set_bytes"] == chosen["working_set_bytes"]
    assert searched["per-unit"]["training_macs"] == chosen["training_macs"]
    # Estimated from the blocks alone, beside the memory model of the whole network's own graph.
    for kind in ("bp", "checkpointing"):
        ratio = points[kind]["working_set_bytes"] / searched[kind]["working_set_bytes"]
        assert 0.7 <= ratio <= 1.45, (kind, ratio)
    whole = MacsSpec(**loose["blocks"][0]["macs"])
    assert points["bp"]["training_macs"] == whole.training


def test_checkpointing_saves_activations_and_nothing_else(loose: dict[str, Any]) -> None:
    bp, kept = (next(p for p in loose["frontier"] if p["kind"] == kind) for kind in ("bp", "checkpointing"))
    assert kept["estimated"]
    assert not bp["estimated"]
    fixed = loose["blocks"][0]["state_bytes"] + BATCH * 4 * math.prod(loose["input"]) + RUNTIME_BYTES
    assert fixed < kept["working_set_bytes"] < bp["working_set_bytes"]
    whole = MacsSpec(**loose["blocks"][0]["macs"])
    assert whole.training < kept["training_macs"] <= whole.training + whole.forward


def test_only_what_grows_with_the_batch_shrinks() -> None:
    network = load_network("resnet8", (1, 8, 8), 4, 0)
    problem = make_problem(network, RuleSpec("bp", 1, 0.5, 1, "merge"), 4)
    whole = problem.cell(Candidate(0, problem.units, None))
    bp = FrontierSpec("bp", 1, 50_000_000, int(problem.macs[whole]), True, 4, estimated=False)
    assert checkpointed(bp, 0, problem, network).working_set_bytes == bp.working_set_bytes
    half, all_of_it = (checkpointed(bp, n, problem, network).working_set_bytes for n in (20_000_000, 40_000_000))
    assert bp.working_set_bytes - all_of_it == pytest.approx(2 * (bp.working_set_bytes - half), abs=2)
    assert all_of_it > 10_000_000


def test_what_cannot_be_compared_is_exported_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*given: Any) -> None:
        raise ValueError("no formula for this operator")

    monkeypatch.setattr("edgelocal.exporters.search.comparison.make_problem", fail)
    said: list[str] = []
    given = request(blocks="2", rule="linear", batch=8, input_shape="1x8x8", pad=1)
    found = export_bundle(given, tmp_path / "b", said.append)
    assert [point["kind"] for point in found["frontier"]] == ["partition"]
    (line,) = [text for text in said if "not compared" in text]
    assert "ValueError: no formula for this operator" in line


@pytest.mark.parametrize("text", ["60%", "auto", "much"])
def test_only_sizes_are_budgets_on_the_workstation(text: str) -> None:
    with pytest.raises(UsageError):
        parse_memory_budget(text, "auto")


def test_a_budget_chooses_the_blocks_itself() -> None:
    with pytest.raises(UsageError, match="leave --blocks '3' out"):
        parse_memory_budget("200MiB", "3")
