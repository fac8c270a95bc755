"""The two halves of benchmarks/aarch64.sh: what is trained on each machine, and the comparison.

    python benchmarks/aarch64.py steps FOLDER               # 20 steps of the golden bundle; data for `edgelocal train`
    python benchmarks/aarch64.py compare X86_64 AARCH64     # two such folders, with runs of `edgelocal train`

`compare` exits with 1 if the second was not made by aarch64, or if the two differ by more than BOUND.
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from device_tests.device.golden_steps import EXPECTED, LR, STEPS, batches
from edgelocal.bundle.folder import open_bundle
from edgelocal.runtime.arena import start
from edgelocal.runtime.block import Block
from edgelocal.runtime.graphs import GraphPool
from edgelocal.runtime.tensor import Tensor
from edgelocal.storage.tensors import Array, decode

BOUND = 1e-4  # of a relative difference; a loss's and a tensor's
THREADS = 2
RESIDUAL = EXPECTED.parent / "residual"


def steps(folder: Path) -> None:
    """Write losses and final state of 20 steps (`steps.npz`), and their data as `edgelocal train` reads it."""
    bundle = open_bundle(RESIDUAL)
    graphs = GraphPool(bundle, THREADS)
    blocks = [Block(bundle, index, graphs) for index in range(len(bundle.manifest.blocks))]
    hyper = {"lr": LR, **bundle.manifest.optimizer.hyper}
    data = list(batches())
    start()
    began = time.perf_counter()
    losses = [_step(blocks, x, y, hyper, number) for number, (x, y) in enumerate(data)]
    seconds = time.perf_counter() - began
    state = {f"{block.index}/{name}": array for block in blocks for name, array in block.state().items()}
    np.savez(folder / "steps.npz", machine=platform.machine(), seconds=seconds, losses=losses, **state)
    x, y = (np.concatenate(parts) for parts in zip(*data, strict=True))
    np.savez(folder / "data.npz", x_train=x, y_train=y, x_test=x[:64], y_test=y[:64])


def _step(blocks: list[Block], x: Array, y: Array, hyper: dict[str, float], number: int) -> list[float]:
    h, losses = Tensor.of(x), []
    for block in blocks:
        result = block.step(h, Tensor.of(y), hyper, 0, number)
        h = result.h
        losses.append(result.loss)
    return losses


@dataclass(frozen=True)
class Side:
    """What one machine made."""

    doctor: dict[str, Any]
    data: dict[str, Array]
    steps: dict[str, Array]
    report: dict[str, Any]
    weights: Mapping[str, Array]

    @classmethod
    def read(cls, folder: Path) -> Side:
        """From the folder benchmarks/aarch64.sh filled."""
        with np.load(folder / "data.npz") as data, np.load(folder / "steps.npz") as found:
            return cls(
                json.loads((folder / "doctor.json").read_text()),
                dict(data),
                dict(found),
                json.loads((folder / "train.json").read_text()),
                decode((folder / "model" / "weights.safetensors").read_bytes())[0],
            )

    @property
    def name(self) -> str:
        """The machine every process said it ran on."""
        said = {self.doctor["device"]["machine"], str(self.steps["machine"]), self.report["runtime"]["machine"]}
        return " and ".join(sorted(said))

    @property
    def error(self) -> float:
        """The largest relative error of a loss of the 20 steps against float64."""
        expected = np.asarray(json.loads(EXPECTED.read_text())["losses"])
        return float((np.abs(self.steps["losses"] - expected) / expected).max())

    def state(self, *, weights: bool) -> dict[str, Array]:
        """Every block's weights after the 20 steps; or momentum and running statistics."""
        state = {name: array for name, array in self.steps.items() if "/" in name}
        return {name: array for name, array in state.items() if ("/param/" in name) == weights}

    @property
    def run_losses(self) -> Array:
        """Of the run: every block's training and validation loss."""
        blocks = self.report["blocks"]
        return np.asarray([block[split]["loss"] for block in blocks for split in ("training", "validation")])

    def row(self) -> str:
        """Machine, versions, seconds and error, for the table."""
        packages = self.doctor["packages"]
        versions = f"Python {self.doctor['device']['python']}, numpy {packages['numpy']}, ORT {packages['onnxruntime']}"
        seconds = f"{float(self.steps['seconds']):10.1f} {self.report['train_s']:10.1f}"
        return f"{self.name:8} {versions:44} {seconds} {self.error:16.1e}"


def compare(first: Side, second: Side) -> list[str]:
    """Print both and how far they are apart; what is wrong."""
    print(f"\n{'':8} {'':44} {'20 steps':>10} {'train':>10} {'error of a loss':>16}")
    print(f"{'machine':8} {'':44} {'seconds':>10} {'seconds':>10} {'against float64':>16}")
    print(f"{first.row()}\n{second.row()}\n")
    differences = {
        "20 steps: a loss": _apart(first.steps["losses"], second.steps["losses"]),
        "20 steps: a weight": _largest(first.state(weights=True), second.state(weights=True)),
        "20 steps: momentum, running statistics": _largest(first.state(weights=False), second.state(weights=False)),
        "train: a loss of an epoch": _apart(first.run_losses, second.run_losses),
        "train, finish: weights.safetensors": _largest(first.weights, second.weights),
    }
    print("largest relative difference between the two")
    for what, difference in differences.items():
        print(f"  {what:40} {difference:.1e}")
    wrong = [f"{what} differs by {value:.1e}" for what, value in differences.items() if not value < BOUND]
    named = (first, "x86_64"), (second, "aarch64")
    wrong += [f"made on {side.name}, not on {name}" for side, name in named if side.name != name]
    wrong += [f"a run of {side.report['steps']} steps" for side in (first, second) if side.report["steps"] != STEPS]
    if not all(np.array_equal(first.data[name], second.data[name]) for name in first.data):
        wrong.append("the two made different data")
    return wrong


def _apart(first: Array, second: Array) -> float:
    """The largest difference of two numbers, relative to the first."""
    return float((np.abs(first - second) / np.abs(first)).max())


def _largest(first: Mapping[str, Array], second: Mapping[str, Array]) -> float:
    """The largest difference of two values of a tensor, relative to the largest value of that tensor."""
    assert set(first) == set(second)
    scales = {name: float(np.abs(array).max()) or 1.0 for name, array in first.items()}
    return max(float(np.abs(first[name] - second[name]).max()) / scales[name] for name in first)


def main() -> None:
    """See the module."""
    match sys.argv[1:]:
        case ["steps", folder]:
            steps(Path(folder))
        case ["compare", first, second]:
            wrong = compare(Side.read(Path(first)), Side.read(Path(second)))
            if wrong:
                sys.exit(f"not the same training: {'; '.join(wrong)}")
            print(f"the same training: every difference is below {BOUND:.0e}")
        case _:
            sys.exit(__doc__)


if __name__ == "__main__":
    main()
