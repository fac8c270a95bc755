"""Plans for a device: what lies where, by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from device_tests.device.invented import Invented, manifest
from device_tests.device.test_plan import DATA, IDLE, SETTING
from edgelocal.bundle.spec import Manifest, graph_bytes
from edgelocal.errors import BudgetError
from edgelocal.memory.needs import RUNTIME_BYTES, DeviceNeeds, block_needs
from edgelocal.memory.peaks import DEVICE_HOST_BYTES, Workload
from edgelocal.memory.plan import make_plan, make_thresholds
from edgelocal.memory.planned import Plan

NETWORK = manifest(Invented(), Invented(weight=5000, buffer=0, width_in=8, per_sample=3000))
DEVICE = DeviceNeeds(context=IDLE // 2, most=None, workspace=7000, handles=3000, shared=False)


def plan(budget: int | None = None, network: Manifest = NETWORK, **changes: Any) -> Plan:
    return make_plan(Workload.of(network, device=replace(DEVICE, **changes), **SETTING), budget)


def states() -> list[int]:
    return [block_needs(block).state_bytes for block in NETWORK.blocks]


def test_tensors_are_on_the_device_graphs_and_data_on_the_host() -> None:
    found = plan()
    assert found.device is not None
    needs = [block_needs(block) for block in NETWORK.blocks]
    touched = max(n.whole.arena(16).touched for n in needs)
    working = max(sum(n.whole.written.values()) + n.input.at(16) + n.output.at(16) for n in needs)
    ahead = 2 * needs[0].input.at(16)  # two batches in turn
    apart = 256 * (256 + sum(len(block.state()) for block in NETWORK.blocks))
    assert found.device.tensors == touched + touched // 5 + sum(states()) + working + ahead + apart
    assert found.device.handles == 2 * len({block.step.key for block in NETWORK.blocks}) * DEVICE.handles
    assert found.device.peak == DEVICE.context + DEVICE.workspace + found.device.handles + found.device.tensors
    graphs = 2 * sum(graph_bytes(block.step) for block in NETWORK.blocks)  # for the batch and a short one
    host = IDLE - DEVICE.context + RUNTIME_BYTES + DEVICE_HOST_BYTES + graphs + DATA.total
    assert found.peak_bytes == host + found.device.peak
    assert found.region_bytes == 0  # the host's arena is for nothing but start-up
    assert found.device.limit is None
    assert found.blocks[1].predicted["workspace"] >= DEVICE.workspace


def test_the_arena_s_limit_is_what_the_budget_or_the_device_leaves() -> None:
    free = plan()
    assert free.device is not None
    arena = free.device.tensors + free.device.workspace
    bounded, small = plan(free.peak_bytes + 300), plan(free.peak_bytes + 300, most=free.device.peak + 200)
    assert bounded.device is not None
    assert bounded.device.limit == arena + 300
    assert small.device is not None
    assert small.device.limit == arena + 200


def test_states_go_from_a_small_device_to_the_host_and_with_a_small_budget_to_the_disk() -> None:
    free = plan()
    assert free.device is not None
    smaller = plan(most=free.device.peak - 1)
    assert smaller.device is not None
    gone = sum(state for state, block in zip(states(), smaller.blocks, strict=True) if not block.resident)
    assert gone > 0
    assert smaller.device.paging == "host"
    assert smaller.device.peak < free.device.peak
    assert smaller.peak_bytes == free.peak_bytes - free.device.peak + smaller.device.peak + gone
    exact = plan(smaller.peak_bytes, most=free.device.peak - 1)
    assert exact.device is not None
    assert exact.device.paging == "host"
    assert exact.graphs_bytes is None  # to drop graphs would make no room on the device
    less = plan(smaller.peak_bytes - 1, most=free.device.peak - 1)
    assert less.device is not None
    assert (less.device.paging, less.graphs_bytes is None) == ("host", False)
    least = plan(less.peak_bytes - 1, most=free.device.peak - 1)
    assert least.device is not None
    assert (least.device.paging, least.peak_bytes) == ("disk", less.peak_bytes - gone)


def test_one_pool_has_no_host_to_wait_on() -> None:
    kept = make_thresholds(Workload.of(NETWORK, device=replace(DEVICE, shared=True), **SETTING)).states
    assert kept is not None
    paged = plan(kept - 1, shared=True)
    assert paged.device is not None
    assert not all(block.resident for block in paged.blocks)
    assert paged.device.paging == "disk"


def test_a_bundle_for_cuda_is_foreseen_and_others_have_a_margin() -> None:
    other, own = plan(), plan(network=replace(NETWORK, target="cuda"))
    assert other.device is not None
    assert own.device is not None
    touched = max(block_needs(block).whole.arena(16).touched for block in NETWORK.blocks)
    assert other.device.tensors - own.device.tensors == touched // 5


def test_micro_batches_where_the_device_is_too_small_for_the_batch() -> None:
    free = plan()
    assert free.device is not None
    small = plan(most=free.device.peak - sum(states()) - 20_000)
    assert small.device is not None
    assert any(block.accumulation > 1 for block in small.blocks)
    assert small.device.peak <= free.device.peak - sum(states()) - 20_000


def test_a_device_too_small_for_one_sample_is_refused() -> None:
    with pytest.raises(BudgetError, match=r"the device has .* for this process, and at the least it would hold"):
        plan(most=DEVICE.context + DEVICE.workspace + 10)


def test_as_plain_values() -> None:
    found = plan(1 << 30)
    assert found.device is not None
    values = found.as_dict()["device"]
    assert values["peak_bytes"] == sum(
        values[f"{part}_bytes"] for part in ("context", "handles", "tensors", "workspace")
    )
    assert values["limit_bytes"] == found.device.limit


def test_a_run_that_goes_on_keeps_its_plan() -> None:
    free = plan()
    assert free.device is not None
    for most in (None, free.device.peak - 1, free.device.peak - sum(states()) - 20_000):
        for budget in (None, free.peak_bytes - 1, free.peak_bytes - graph_bytes(NETWORK.blocks[0].step) - 1000):
            work = Workload.of(NETWORK, device=replace(DEVICE, most=most), **SETTING)
            found = make_plan(work, budget)
            assert make_plan(work, budget, [block.micro_batch for block in found.blocks]) == found


def test_budgets_that_are_named_are_those_that_the_device_allows() -> None:
    free = plan()
    assert free.device is not None
    small = Workload.of(NETWORK, device=replace(DEVICE, most=free.device.peak - 1), **SETTING)
    found = make_thresholds(small)
    assert (found.everything, found.states) == (None, None)
    assert make_plan(small, found.least).peak_bytes <= found.least
    with pytest.raises(BudgetError):
        make_plan(small, found.least - 1)
    none = Workload.of(NETWORK, device=replace(DEVICE, most=DEVICE.context), **SETTING)
    with pytest.raises(BudgetError, match="the device has"):
        make_plan(none, 1)  # no budget would help


def test_what_waits_on_the_host_has_room_there() -> None:
    free = plan()
    assert free.device is not None
    paged = plan(most=free.device.peak - 1)
    assert paged.device is not None
    beside = paged.peak_bytes - paged.device.peak
    less = plan(most=free.device.peak - 1, host=beside - 1)
    assert (paged.device.paging, less.device and less.device.paging) == ("host", "host")
    assert less.graphs_bytes is not None  # graphs made room
    assert less.device is not None
    least = plan(most=free.device.peak - 1, host=less.peak_bytes - less.device.peak - 1)
    assert least.device is not None
    assert least.device.paging == "disk"


def test_a_context_that_nobody_counts_can_be_refused_too() -> None:
    with pytest.raises(BudgetError, match="0 B of them its context"):
        plan(context=0, most=100)
