"""What is in a bundle, as plain values and as a table."""

from __future__ import annotations

from typing import Any

from rich.table import Table

from edgelocal.budget import format_size
from edgelocal.needs import tensor_bytes
from edgelocal.progress import count_parameters
from edgelocal.spec import BlockSpec, Manifest


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
        "batch": manifest.defaults.batch,
        "frontier": None if manifest.frontier is None else [vars(point) for point in manifest.frontier],
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
        "depth": block.depth,
        "macs": None if block.macs is None else vars(block.macs),
        "state_bytes": sum(tensor_bytes(t) for t in block.state()),
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


_NAMES = {
    "bp": "back-propagation, one block",
    "checkpointing": "back-propagation, checkpointed (estimate)",
    "per-unit": "a block for every unit",
    "linear": "linear classifiers, a block for every unit",
}


def frontier_table(info: dict[str, Any]) -> tuple[Table | str, ...]:
    """Memory against compute: partitions, the chosen one marked, and what they are compared with; nothing for a bundle
    that was exported without a budget."""
    points = info["frontier"]
    if not points:
        return ()
    plain = next(p for p in points if p["kind"] == "bp")
    table = Table(title=f"memory against compute, batch {info['batch']}", title_justify="left")
    for name in ("", "blocks", "working set", "of back-propagation", "training MACs a sample", "of back-propagation"):
        table.add_column(name, justify="left" if not name else "right")
    for point in sorted(points, key=lambda p: p["working_set_bytes"]):
        name = _NAMES.get(point["kind"], "-> chosen" if point["chosen"] else "partition")
        size, macs = point["working_set_bytes"], point["training_macs"]
        table.add_row(
            name,
            str(point["blocks"]),
            format_size(size),
            f"{size / plain['working_set_bytes']:.2f}",
            f"{macs / 1e6:,.1f} M",
            f"{macs / plain['training_macs']:.2f}",
        )
    return table, _advice(points)


def _advice(points: list[dict[str, Any]]) -> str:
    """Where checkpointed back-propagation is the better choice, said plainly."""
    chosen = next(p for p in points if p["chosen"])
    kept = next(p for p in points if p["kind"] == "checkpointing")
    if kept["working_set_bytes"] <= chosen["working_set_bytes"] and kept["training_macs"] <= chosen["training_macs"]:
        return (
            "checkpointed back-propagation would need no more memory and less compute than the chosen partition, and "
            "learns as plain back-propagation does: on a device that runs PyTorch it is the better choice here"
        )
    if kept["training_macs"] < chosen["training_macs"]:
        return (
            "checkpointed back-propagation would need less compute, but "
            f"{kept['working_set_bytes'] / chosen['working_set_bytes']:.1f} times the memory of the chosen partition"
        )
    return "the chosen partition needs less compute than checkpointed back-propagation"
