"""What a run reached and measured, as plain values for report.json (docs/report.md shows them)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from edgelocal.commands.progress import count_parameters
from edgelocal.training.run_info import RunInfo
from edgelocal.training.trainer import Trainer


def make_report(
    trainer: Trainer,
    info: RunInfo,
    idle_bytes: int,
    scores: Sequence[dict[str, float]],
    notes: Sequence[str],
    metrics: Sequence[dict[str, Any]],
) -> dict[str, Any]:
    """Per block and for the whole run.

    `scores` are those of the exits on validation, `idle_bytes` is what the process held before the first block.
    """
    manifest, plan = trainer.manifest, trainer.plan
    training = {name: values for record in metrics for name, values in record["blocks"].items()}
    planned = plan.as_dict()["blocks"] if plan else [None] * len(trainer.blocks)
    blocks = []
    for index, (block, measures) in enumerate(zip(trainer.blocks, trainer.measures, strict=True)):
        own = planned[index] or {}
        blocks.append(
            {
                "name": block.spec.name,
                "units": list(block.spec.units),
                "parameters": count_parameters(block.spec.step.inputs),
                "training": training.get(block.spec.name),
                "validation": scores[index] if scores else None,
                "train_s": round(measures.step_s, 3),
                "steps": measures.steps,
                "plan": {key: own[key] for key in ("micro_batch", "accumulation", "resident")} if own else None,
                "predicted": own.get("predicted"),
                "predicted_arena_bytes": own.get("predicted_arena_bytes"),
                "working_set_bytes": max(0, measures.peak_bytes - idle_bytes) if measures.peak_bytes else None,
                "arena_bytes": measures.arena_bytes or None,
                "latency_s": measures.latency_s(),
                "paged_bytes": block.paged_bytes,
            }
        )
    frontier = manifest.frontier
    return {
        "network": manifest.network,
        "rule": manifest.rule.name,
        "loss": manifest.task.loss,
        "schedule": trainer.config.schedule,
        "trained_by": trainer.config.runtime,
        "batch": trainer.config.batch,
        "blocks": blocks,
        "validation": scores[-1] if scores else None,
        "samples": len(trainer.train),
        "steps": trainer.position.steps,
        "train_s": round(sum(m.step_s for m in trainer.measures), 3),
        "process_peak_bytes": trainer.memory.process_peak_bytes,
        "planned_peak_bytes": plan.peak_bytes if plan else None,
        "idle_bytes": idle_bytes,
        "budget_bytes": info.budget_bytes,
        "paged_bytes": sum(block.paged_bytes for block in trainer.blocks),
        "cached_bytes": trainer.cached_bytes,
        "cache": None if trainer.config.cache == "off" else {"precision": trainer.config.cache},
        "timeline": [list(point) for point in trainer.memory.timeline.points],
        "frontier": None if frontier is None else [vars(point) for point in frontier],
        "device": None,  # of a run on one `device_report` says what it took there
        "runtime": info.runtime,
        "threads": info.threads,
        "notes": list(notes),
    }
