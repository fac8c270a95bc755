"""Pretrained weights -> a network, with every name that does not fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from edgelocal.errors import ExportError


@dataclass(frozen=True)
class Mismatch:
    """What a file of weights and a network do not share. `shapes` lists (name, in the file, in the network)."""

    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    shapes: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]

    def lines(self) -> list[str]:
        """One line a name."""
        return [
            *(f"missing in the file: {name}" for name in self.missing),
            *(f"unexpected in the file: {name}" for name in self.unexpected),
            *(f"other shape: {name} is {list(a)} in the file, {list(b)} in the network" for name, a, b in self.shapes),
        ]


def load_weights(path: Path, module: nn.Module, *, partial: bool) -> Mismatch:
    """Copy the tensors of a .safetensors file, or of a .pt file read weights-only, into `module`.

    With `partial` what does not fit is left as it was and only reported.

    Raises:
        ExportError: the file cannot be read, holds no tensors, or does not fit and `partial` is False.
    """
    found = _read(path)
    expected = module.state_dict()
    # PyTorch before 0.4.1 wrote no batch counters; they do not matter for training with a fixed momentum.
    missing = tuple(n for n in expected if n not in found and not n.endswith("num_batches_tracked"))
    unexpected = tuple(n for n in found if n not in expected)
    shapes = tuple(
        (n, tuple(t.shape), tuple(expected[n].shape))
        for n, t in found.items()
        if n in expected and t.shape != expected[n].shape
    )
    mismatch = Mismatch(missing, unexpected, shapes)
    if mismatch.lines() and not partial:
        raise ExportError(
            f"{path} does not fit the network:\n  "
            + "\n  ".join(mismatch.lines())
            + "\ngive --partial-weights to take what fits"
        )
    wrong = {name for name, _, _ in shapes}
    fitting = {n: t for n, t in found.items() if n in expected and n not in wrong}
    if not fitting:
        raise ExportError(f"{path} shares no tensor with the network; found e.g. {next(iter(found), 'nothing')!r}")
    module.load_state_dict({**expected, **fitting})
    return mismatch


def _read(path: Path) -> Mapping[str, torch.Tensor]:
    if not path.is_file():
        raise ExportError(f"there is no file {path}")
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            loaded: object = load_file(path)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ExportError(f"{path} cannot be read as weights: {' '.join(str(error).split())[:300]}") from error
    if isinstance(loaded, Mapping) and isinstance(loaded.get("state_dict"), Mapping):
        loaded = loaded["state_dict"]  # the usual form of training checkpoints
    if not isinstance(loaded, Mapping) or not all(isinstance(t, torch.Tensor) for t in loaded.values()):
        raise ExportError(f"{path} holds no mapping of names to tensors; save model.state_dict()")
    return loaded
