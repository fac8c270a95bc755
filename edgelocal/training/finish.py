"""A trained run -> what is deployed: model.onnx for any runtime, weights.safetensors for PyTorch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgelocal.bundle.folder import Bundle
from edgelocal.bundle.onnx_wire import bind, compose
from edgelocal.errors import UsageError
from edgelocal.runtime.block import Block
from edgelocal.storage.tensors import Array, encode
from edgelocal.storage.whole import atomic_write, staging


def finish(bundle: Bundle, blocks: Sequence[Block], out: Path, exit_block: int | None) -> dict[str, Any]:
    """Write the folder `out`, all or nothing, and return what is in it.

    `model.onnx` takes x (N, *input shape), normalised as the manifest says, and returns logits (N, classes);
    normalisation and class names are in its metadata; auxiliaries are left out. With `exit_block` K the network ends
    at block K, through its auxiliary head. `weights.safetensors` holds the whole network under PyTorch's names, for
    `load_state_dict(strict=True)`; with `exit_block` only the tensors of that smaller model.

    Raises:
        UsageError: no such block, or `out` exists.
    """
    state = {name: array for block in blocks for name, array in block.state().items()}
    manifest = bundle.manifest
    normalization = {"scale": 255, "mean": list(manifest.input.mean), "std": list(manifest.input.std)}
    about = {"network": manifest.network, "normalization": json.dumps(normalization)}
    if manifest.task.class_names:
        about["class_names"] = json.dumps(list(manifest.task.class_names))
    model = bind(_network(bundle, exit_block), state, {f"edgelocal.{key}": value for key, value in about.items()})
    kept = blocks if exit_block is None else blocks[: exit_block + 1]
    with staging(out) as folder:
        atomic_write(folder / "model.onnx", [model])
        tensors = torch_names(kept, exit_block)
        atomic_write(folder / "weights.safetensors", encode(tensors, {"format": "pt"}))
    return {
        "out": str(out),
        "model_bytes": len(model),
        "tensors": len(tensors),
        "exit_block": exit_block,
        "input": ["N", *manifest.input.shape],
        "dtype": manifest.input.dtype,
        "normalization": normalization,
        "classes": manifest.task.classes,
        "class_names": list(manifest.task.class_names),
    }


def torch_names(blocks: Sequence[Block], exit_block: int | None) -> dict[str, Array]:
    """Parameters and buffers under the names of the original module; of auxiliaries only that of the exit block."""
    tensors: dict[str, Array] = {}
    for block in blocks:
        for name, array in block.state().items():
            kind, _, own = name.partition("/")
            if kind in ("param", "buf") and (not own.startswith("aux/") or block.index == exit_block):
                tensors[own] = array
    return tensors


def _network(bundle: Bundle, exit_block: int | None) -> bytes:
    blocks = bundle.manifest.blocks
    if exit_block is None:
        return bundle.read(bundle.manifest.predict.file)
    if not 0 <= exit_block < len(blocks):
        raise UsageError(f"--exit-block {exit_block}: the network has blocks 0 to {len(blocks) - 1}")
    last = blocks[exit_block]
    models = [bundle.read(block.forward.file) for block in blocks[: exit_block + 1]]
    return compose([*models, bundle.read(last.head.file)] if last.head else models)
