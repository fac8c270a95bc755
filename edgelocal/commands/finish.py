"""`edgelocal finish` as a function: paths in, plain values out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from edgelocal.training.finish import finish
from edgelocal.training.run import open_trained


def finish_run(run: Path, out: Path, exit_block: int | None, bundle: Path | None) -> dict[str, Any]:
    """Write the deployable model of a run; see `edgelocal.training.finish`."""
    trained = open_trained(run, 1, bundle)
    return finish(trained.bundle, trained.blocks, out, exit_block) | {"notes": list(trained.notes)}


def finish_text(result: dict[str, Any]) -> str:
    """What was written, and how to feed it."""
    shape = ", ".join(str(d) for d in result["input"])
    lines = [
        f"wrote {result['out']}/model.onnx and {result['out']}/weights.safetensors",
        f"model.onnx: x ({shape}) {result['dtype']} -> logits (N, {result['classes']})",
    ]
    if result["dtype"] == "float32":
        mean, std = (", ".join(f"{v:.6g}" for v in result["normalization"][key]) for key in ("mean", "std"))
        lines.append(f"x is (bytes / 255 - mean) / std by channel: mean {mean}; std {std} (also in its metadata)")
    return "\n".join(lines)
