"""Why no plan fits, said so that one can do something about it."""

from __future__ import annotations

from edgelocal.machine.budget import format_size, size_up
from edgelocal.memory.peaks import ALL_TRIED, Workload
from edgelocal.memory.planned import Plan


def refusal(work: Workload, plan: Plan, budget: int) -> str:
    """Why nothing fits, and what would; `plan` is the one that needs least."""
    worst = max(plan.blocks, key=lambda b: b.total)
    others = plan.peak_bytes - work.idle - worst.total
    parts = f"{size_up(work.idle)} idle, {size_up(worst.total)} for the block"
    advice = "lower --batch, or export more blocks"
    if others:
        parts += f", {size_up(others)} more {_what_else(work)}"
        advice = "lower --batch"
    fitting = work.largest_batch(budget)
    # Of very large batches not all were tried.
    which = "the largest" if work.batch - 1 <= ALL_TRIED else "a"
    fits = f"{which} --batch that fits is {fitting}" if fitting else "not even a batch of one sample fits"
    if work.idle >= budget:
        fits += ", as the process takes more before it has loaded anything"
    at_once = "the whole batch" if worst.accumulation == 1 else f"{worst.micro_batch} of {work.batch} samples"
    return (
        f"the process needs {size_up(plan.peak_bytes)} while block {worst.name} trains {at_once} at a time ({parts}), "
        f"the budget is {format_size(budget)}; {fits}, and the smallest budget for this batch is "
        f"{size_up(plan.peak_bytes)} ({plan.peak_bytes} bytes); raise --memory-budget, {advice}"
    )


def _what_else(work: Workload) -> str:
    """What takes the memory that no block at work does."""
    validating = ["to validate with the whole batch"] * work.validates
    frozen = ["to pass the whole batch through frozen blocks"] * (work.schedule == "sequential")
    return " or ".join(["to make a batch", *validating, *frozen])


def device_refusal(plan: Plan, most: int) -> str:
    """Why the device does not hold what needs least."""
    assert plan.device is not None, "there is a device"
    found = plan.device
    return (
        f"the device has {format_size(most)} for this process, and at the least it would hold {size_up(found.peak)} "
        f"({size_up(found.context)} of them its context, {size_up(found.handles + found.workspace)} handles and "
        "workspace of kernels); lower --batch, export more blocks, free the device's memory, or train with --device cpu"
    )
