"""Reports and run folders of any number of blocks, made by formulas, for the tests of `edgelocal report`."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from device_tests.device.runs import config
from edgelocal.training.run_info import RunInfo

MIB = 1 << 20
SHARES = {
    "parameters": 4,
    "optimizer": 4,
    "buffers": 1,
    "gradients": 3,
    "activations": 30,
    "workspace": 14,
    "input": 3,
    "output": 3,
    "runtime": 2,
    "pipeline": 4,
}


def sample_report(blocks: int, epochs: int = 12, schedule: str = "interleaved") -> dict[str, Any]:
    """report.json with every key, of a network whose later blocks are smaller and learn better."""
    listed = [_block(i, blocks, epochs) for i in range(blocks)]
    largest = max(b["working_set_bytes"] for b in listed)
    return {
        "network": "resnet32",
        "rule": "auglocal",
        "loss": "cross_entropy",
        "schedule": schedule,
        "samples": 10_000,
        "steps": 79 * epochs,
        "train_s": sum(b["train_s"] for b in listed),
        "notes": ["the data has no test split, so nothing is validated; give some with --val"],
        "runtime": {"onnxruntime": "1.31.1", "provider": "CPUExecutionProvider", "machine": "x86_64"},
        "threads": 3,
        "batch": 128,
        "budget_bytes": 160 * MIB,
        "process_peak_bytes": 61 * MIB + largest,
        "planned_peak_bytes": 66 * MIB + largest,
        "idle_bytes": 58 * MIB,
        "blocks": listed,
        "paged_bytes": 12 * MIB,
        "cached_bytes": 210 * MIB,
        "cache": {"precision": "float16"},
        "timeline": _timeline(listed, schedule),
        "frontier": _frontier(blocks, largest),
        "validation": listed[-1]["validation"],
    }


def _block(index: int, blocks: int, epochs: int) -> dict[str, Any]:
    depth = index / max(1, blocks - 1)
    scale = 0.4 + 0.6 * math.cos(1.4 * depth) ** 2
    predicted = {kind: round(share * MIB * scale) for kind, share in SHARES.items()}
    predicted["total"] = sum(predicted.values())
    p50 = 0.02 + 0.015 * math.sin(2.2 * depth)
    return {
        "name": f"{index:02d}",
        "units": [f"layer{1 + 3 * index // blocks}.{index}"],
        "parameters": {"network": 4_000 + 900 * index, "auxiliary": 70_000 * (index < blocks - 1)},
        "training": loss_and_accuracy(depth, epochs),
        "validation": loss_and_accuracy(depth, 0.8 * epochs),
        "train_s": round(79 * epochs * p50 * 1.1, 3),
        "steps": 79 * epochs,
        "plan": {"micro_batch": 64, "accumulation": 2, "resident": index % 3 > 0},
        "predicted": predicted,
        "working_set_bytes": round(predicted["total"] * (0.93 + 0.04 * math.sin(5 * depth))),
        "arena_bytes": 40 * MIB,
        "predicted_arena_bytes": 42 * MIB,
        "latency_s": {"p50": p50, "p90": 1.25 * p50, "p99": 2.1 * p50},
        "paged_bytes": MIB,
    }


def loss_and_accuracy(depth: float, epoch: float) -> dict[str, float]:
    """Scores that fall and rise with the epoch, the faster the deeper (0..1) the block is."""
    loss = 0.04 + 2.2 * math.exp(-(0.25 + 0.25 * depth) * epoch)
    return {"loss": loss, "accuracy": 1 - 0.9 * (1 - math.exp(-loss))}


def _timeline(blocks: list[dict[str, Any]], schedule: str) -> list[list[float]]:
    points, turns = 600, 5 if schedule == "interleaved" else 1
    count = len(blocks)
    found: list[list[float]] = [[0.0, 58 * MIB, -1]]
    for i in range(points):
        index = (i * turns * count // points) % count
        wave = 0.9 + 0.1 * math.sin(i)
        found.append([0.1 * (i + 1), round(60 * MIB + blocks[index]["working_set_bytes"] * wave), index])
    return found


def _frontier(blocks: int, largest: int) -> list[dict[str, Any]]:
    macs = 9_000_000_000
    chosen = min(blocks, 8)
    found = [
        {
            "kind": "partition",
            "blocks": n,
            "working_set_bytes": round(largest * (0.8 + 0.2 * chosen / n)),
            "training_macs": round(macs * (1 + 0.05 * n)),
            "chosen": n == chosen,
            "batch": 128,
            "estimated": False,
        }
        for n in range(1, 10)
    ]
    for kind, memory, work in (
        ("bp", 2.6, 1.0),
        ("checkpointing", 1.5, 1.33),
        ("per-unit", 0.95, 1.6),
        ("linear", 0.85, 1.03),
    ):
        point = {"kind": kind, "blocks": 1, "chosen": False, "training_macs": round(macs * work), "batch": 128}
        point["estimated"] = kind == "checkpointing"
        found.append(point | {"working_set_bytes": round(largest * memory)})
    return found


def sample_metrics(report: dict[str, Any], epochs: int = 12) -> list[dict[str, Any]]:
    """Records of metrics.jsonl for the blocks of a report, by its schedule."""
    names = [block["name"] for block in report["blocks"]]
    sequential = report["schedule"] == "sequential"
    stages = [[name] for name in names] if sequential else [names]
    found = []
    for stage, trained in enumerate(stages):
        for epoch in range(1, epochs + 1):
            depths = {name: names.index(name) / max(1, len(names) - 1) for name in trained}
            record: dict[str, Any] = {"stage": stage, "epoch": epoch, "lr": 0.1, "steps": 79 * (stage * epochs + epoch)}
            record |= {"seconds": 3.2, "blocks": {n: loss_and_accuracy(depth, epoch) for n, depth in depths.items()}}
            found.append(record | {"validation": loss_and_accuracy(1, 0.8 * epoch)})
    return found


def write_run(folder: Path, report: dict[str, Any] | None, metrics: list[dict[str, Any]], epochs: int = 12) -> Path:
    """A run folder with run.json, metrics.jsonl and, unless it is None, report.json."""
    folder.mkdir(parents=True)
    info = RunInfo(
        bundle="/data/bundles/resnet32",
        bundle_digest="cf4c403662c41b37" * 4,
        data="/data/images",
        data_digest="4427e9f5caa9b91a" * 4,
        config=config(epochs=epochs, batch=128, cache="off", schedule=report["schedule"] if report else "interleaved"),
        budget_bytes=160 * MIB,
        runtime={"onnxruntime": "1.31.1", "provider": "CPUExecutionProvider", "machine": "x86_64"},
        threads=2,
    )
    (folder / "run.json").write_bytes(info.render())
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in metrics))
    if report is not None:
        (folder / "report.json").write_text(json.dumps(report))
    return folder


def loaded(blocks: int = 4, schedule: str = "interleaved") -> dict[str, Any]:
    """A report as `load_report` returns it."""
    report = sample_report(blocks, schedule=schedule)
    return {**report, "metrics": sample_metrics(report), "run": {"bundle": "/b", "config": {"lr": 0.1}}}
