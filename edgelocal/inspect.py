"""What is in a bundle, as plain values and as a table."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from edgelocal.budget import format_size
from edgelocal.progress import count_parameters
from edgelocal.spec import BlockSpec, Manifest

ITEM_BYTES = {"float32": 4, "int64": 8, "bool": 1}


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
        "bytes": sum(f.size for f in manifest.files.values()),
        "blocks": [_describe_block(manifest, block) for block in manifest.blocks],
    }


def _describe_block(manifest: Manifest, block: BlockSpec) -> dict[str, Any]:
    names = [block.step.file, block.forward.file, block.weights] + ([block.head.file] if block.head else [])
    return {
        "name": block.name,
        "units": list(block.units),
        "input": list(block.step.inputs[0].shape),
        "output": list(block.step.outputs[0].shape),
        "parameters": count_parameters(block.step.inputs),
        "state_bytes": sum(t.elements_per_sample() * ITEM_BYTES[t.dtype] for t in block.state()),
        "file_bytes": sum(manifest.files[name].size for name in names),
    }


def bundle_table(info: dict[str, Any]) -> Table:
    """The blocks of `describe_bundle` as a table."""
    rule = info["rule"]
    table = Table(title=f"{info['network']}: {info['units']} units, rule {rule['name']}", title_justify="left")
    table.add_column("block")
    table.add_column("units", overflow="fold")
    for name in ("output", "parameters", "auxiliary", "state"):
        table.add_column(name, justify="right")
    for block in info["blocks"]:
        units = block["units"]
        table.add_row(
            block["name"],
            ", ".join(units) if len(units) < 4 else f"{units[0]} ... {units[-1]} ({len(units)})",
            " x ".join(str(d) for d in block["output"][1:]),
            f"{block['parameters']['network']:,}",
            f"{block['parameters']['auxiliary']:,}",
            format_size(block["state_bytes"]),
        )
    return table
