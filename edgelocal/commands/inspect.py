"""What is in a bundle, as plain values and as a table."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from edgelocal.bundle.spec import BlockSpec, FrontierSpec, MacsSpec, Manifest
from edgelocal.commands.progress import count_parameters
from edgelocal.machine.budget import format_size
from edgelocal.memory.advice import advice_on
from edgelocal.memory.needs import tensor_bytes
from edgelocal.report.words import NONE, ratio, short_count


def describe_bundle(manifest: Manifest) -> dict[str, Any]:
    """Everything `inspect --json` prints."""
    return {
        "network": manifest.network,
        "rule": {
            "name": manifest.rule.name,
            "depth": manifest.rule.depth,
            "tau": manifest.rule.tau,
            "tail": manifest.rule.tail,
        },
        "input": list(manifest.input.shape),
        "classes": manifest.task.classes,
        "class_names": list(manifest.task.class_names),
        "loss": manifest.task.loss,
        "optimizer": {"name": manifest.optimizer.name, **manifest.optimizer.hyper},
        "units": len(manifest.units),
        "versions": manifest.versions,
        "runtimes": list(manifest.runtimes),
        "target": manifest.target or "cpu",
        "precision": manifest.precision or "float32",
        "bytes": sum(f.size for f in manifest.files.values()),
        "batch": manifest.defaults.batch,
        "frontier": None if manifest.frontier is None else [vars(point) for point in manifest.frontier],
        "blocks": [_describe_block(manifest, block) for block in manifest.blocks],
    }


def _describe_block(manifest: Manifest, block: BlockSpec) -> dict[str, Any]:
    own = f"blocks/{block.name}/"
    return {
        "name": block.name,
        "units": list(block.units),
        "input": list(block.step.inputs[0].shape),
        "output": list(block.step.outputs[0].shape),
        "parameters": count_parameters(block.step.inputs),
        "depth": block.depth,
        "macs": None if block.macs is None else vars(block.macs),
        "state_bytes": sum(tensor_bytes(t) for t in block.state()),
        "file_bytes": sum(file.size for name, file in manifest.files.items() if name.startswith(own)),
    }


def bundle_table(info: dict[str, Any]) -> Table:
    """The blocks of `describe_bundle` as a table."""
    rule = info["rule"]
    table = Table(title=f"{info['network']}: {info['units']} units, rule {rule['name']}", title_justify="left")
    table.caption_justify = "left"
    table.caption = (
        "MACs of training a sample; again: those of them done a second time, to need less memory\n"
        f"for train --runtime {' or '.join(info['runtimes'])}; graphs for {_NAMED_TARGETS[info['target']]}"
        f"{', matrix products in bfloat16' if info['precision'] == 'bfloat16' else ''}"
    )
    table.add_column("block")
    table.add_column("units", overflow="fold")
    for name in ("output", "params", "aux", "state", "MACs", "again"):
        table.add_column(name, justify="right")
    for block in info["blocks"]:
        units, macs = block["units"], block["macs"]
        table.add_row(
            block["name"],
            ", ".join(units) if len(units) < 4 else f"{units[0]} ... {units[-1]} ({len(units)})",
            " x ".join(str(d) for d in block["output"][1:]),
            f"{block['parameters']['network']:,}",
            f"{block['parameters']['auxiliary']:,}",
            format_size(block["state_bytes"]),
            NONE if macs is None else short_count(MacsSpec(**macs).step),
            NONE if macs is None else short_count(macs["recomputed"]),
        )
    return table


_NAMED_TARGETS = {"cpu": "the CPU", "cuda": "CUDA", "both": "the CPU and for CUDA"}
_NAMES = {"bp": "bp", "checkpointing": "bp, checkpointed", "per-unit": "per unit", "linear": "linear"}


def frontier_table(info: dict[str, Any]) -> tuple[Table | str, ...]:
    """Memory against compute: partitions, the chosen one marked, and what they are compared with, in 80 columns; then
    where back-propagation would be the better choice. Nothing for a bundle that says nothing of it."""
    points = [FrontierSpec(**point) for point in info["frontier"] or ()]
    if not points:
        return ()
    plain = next(((p.working_set_bytes, p.training_macs) for p in points if p.kind == "bp"), (None, None))
    title = f"memory against compute, batch {points[0].batch}; MACs of training a sample"
    table = Table(title=title, title_justify="left", pad_edge=False)
    for name in ("", "blocks", "working set", "of bp", "MACs", "of bp"):
        table.add_column(name, justify="right" if name else "left")
    for point in sorted(points, key=lambda p: p.working_set_bytes):
        table.add_row(
            _name(point),
            str(point.blocks),
            format_size(point.working_set_bytes),
            ratio(point.working_set_bytes, plain[0]),
            short_count(point.training_macs),
            ratio(point.training_macs, plain[1]),
        )
    advice = advice_on(points)
    return (table, advice) if advice else (table,)


def _name(point: FrontierSpec) -> str:
    name = _NAMES.get(point.kind, "-> chosen" if point.chosen else "partition")
    return f"{name} (estimate)" if point.estimated else name
