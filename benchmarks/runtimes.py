"""The same bundle, data and seed on both runtimes: is it the same training as in eager PyTorch, and which is faster?

    python benchmarks/runtimes.py [--networks resnet32,vit] [--optimizers sgd,adamw] [--steps 100] [--batch 16]

In an environment with PyTorch and ONNX Runtime's training build. Every network is exported once, in blocks with
auxiliaries, for both runtimes. Eager PyTorch in float64 trains; before every step its state is given to eager float32,
to the step graphs (portable) and to the artifacts (ort-training), which take the same step. Three more of them start
with it and are left alone. A line a network and optimizer: for each of the three the relative error of a block's loss
(the largest of all steps), of the gradients (as the optimizer's slots; the median step), of the worst tensor of the
state (the median step), of the worst that holds running statistics (the largest), and of a loss where it was left alone
(the largest); the largest relative difference between the two runtimes of a tensor and of a loss left alone; and the
time of a step on both, medians of interleaved steps. Exit code 1 if a runtime is further from float64, or from the
other runtime, than eager float32 allows (`worse`). Trainings left alone are not judged: a value of a ReLU that rounding
moves over zero, in any of them at any step, sets them apart.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate, pairwise
from pathlib import Path
from statistics import median
from typing import TypeAlias

import numpy as np
import torch
from parity_training import (
    TASK,
    Array,
    Arrays,
    Sample,
    adopt,
    apart,
    eager_slots,
    eager_state,
    eager_step,
    relative,
    worst,
)

from edgelocal.bundle.folder import Bundle, open_bundle
from edgelocal.commands.export_options import ExportOptions
from edgelocal.exporters.optimizers import Optimizer
from edgelocal.exporters.oracle import Oracle
from edgelocal.exporters.pack import export_bundle
from edgelocal.exporters.request import make_request
from edgelocal.exporters.rules import build_blocks
from edgelocal.exporters.units import load_network
from edgelocal.runtime.library import runtime
from edgelocal.runtime.tensor import Tensor
from edgelocal.training.blocks import load_blocks

NETWORKS = ("resnet32", "vgg13", "mobilenetv2", "vit", "mlp")
INPUTS = {"mlp": "784"}  # others 3x32x32
SGD_RATE, ADAMW_RATE = 0.05, 1e-3
SLACK = 10.0  # how much further than eager float32 a runtime may be from float64
FLOOR = 1e-5  # and what is always near enough
APART = 1e-4  # how far apart the runtimes may be after a step from one state

Found = tuple[float, float, float, float, float]  # as the fields of Errors
Programs: TypeAlias = "tuple[Eager, Runner, Runner]"


@dataclass(frozen=True)
class Errors:
    """Relative errors of a program: of all steps the largest, of gradients and state the median.

    A value of a ReLU that rounding moves over zero changes a gradient by far more than rounding, in the steps where
    there is one.
    """

    loss: float
    gradients: float
    state: float
    statistics: float
    free_loss: float


@dataclass(frozen=True)
class Row:
    """A network with an optimizer. `apart`, `free_apart`: the largest relative difference between the runtimes, of a
    tensor after a step from one state, and of a loss of trainings left alone."""

    network: str
    optimizer: str
    blocks: int
    eager: Errors
    portable: Errors
    artifacts: Errors
    apart: float
    free_apart: float
    portable_s: float
    artifacts_s: float

    @property
    def worse(self) -> bool:
        """Whether a runtime is further from float64, or from the other, than it may be."""
        if self.apart > max(APART, SLACK * self.eager.state):
            return True
        limits = {kind: max(FLOOR, SLACK * getattr(self.eager, kind)) for kind in ("loss", "gradients", "state")}
        limits["statistics"] = FLOOR  # a biased variance would be some 1e-4 off
        return any(getattr(p, kind) > limit for kind, limit in limits.items() for p in (self.portable, self.artifacts))


class Runner:
    """The blocks of a bundle as the device trains them."""

    def __init__(self, bundle: Bundle, optimizer: Optimizer, *, artifacts: bool) -> None:
        self.blocks = load_blocks(bundle, 1, None, artifacts=artifacts)
        self.hyper = dict(optimizer.hyper)
        self.times: list[float] = []

    def losses(self, x: Array, y: Array, lr: float) -> list[float]:
        """One training step of all blocks."""
        h, targets, found = Tensor.of(x), Tensor.of(y), []
        started = time.perf_counter()
        for block in self.blocks:
            result = block.step(h, targets, {"lr": lr, **self.hyper}, 0, 0)
            found.append(result.loss)
            h = result.h
        self.times.append(time.perf_counter() - started)
        return found

    def take(self, truth: Eager, steps: int) -> None:
        """Be in its state, with so many updates done."""
        values = {**truth.state(), **truth.slots()}
        for block in self.blocks:
            for name, array in block.state().items():
                if name in values:
                    array[...] = values[name]
                elif name == "opt/step":
                    array[...] = steps

    def state(self) -> Arrays:
        """Parameters and floating buffers, float64."""
        return self._named("param", "buf")

    def slots(self) -> Arrays:
        """What the optimizer keeps."""
        return self._named("opt")

    def _named(self, *kinds: str) -> Arrays:
        found = {name: a for block in self.blocks for name, a in block.state().items()}
        return {n: a.astype(np.float64) for n, a in found.items() if n.split("/")[0] in kinds and a.dtype == np.float32}


class Eager:
    """The same blocks in eager PyTorch, built as the exporter built them."""

    def __init__(self, bundle: Bundle, optimizer: Optimizer, dtype: torch.dtype) -> None:
        manifest = bundle.manifest
        network = load_network(manifest.network, manifest.input.shape, 10, manifest.seed, torch.float32)
        ends = list(accumulate(len(block.units) for block in manifest.blocks))
        cut = tuple(range(start, end) for start, end in pairwise([0, *ends]))
        blocks = build_blocks(network, manifest.rule, cut, manifest.seed, tuple(b.depth for b in manifest.blocks[:-1]))
        self.oracle = Oracle(blocks, TASK, optimizer.reference, dtype)
        self.optimizer = optimizer

    def losses(self, x: Array, y: Array, lr: float) -> list[float]:
        """One training step of all blocks."""
        return eager_step(self.oracle, x, y, lr)

    def take(self, truth: Eager, steps: int) -> None:
        """Be in its state, from now on rounded to float32 there too."""
        adopt(truth.oracle, self.oracle)

    def state(self) -> Arrays:
        """Parameters and floating buffers, float64."""
        return eager_state(self.oracle)

    def slots(self) -> Arrays:
        """What the optimizer keeps."""
        return eager_slots(self.oracle, self.optimizer)


def main() -> None:
    """Parse, run, print; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default=",".join(NETWORKS))
    parser.add_argument("--optimizers", default="sgd,adamw")
    parser.add_argument("--blocks", default="2")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--json", type=Path, help="Write every figure to this file.")
    options = parser.parse_args()
    versions = f"onnxruntime {runtime().__version__}, torch {torch.__version__}"
    print(f"{versions}, batch {options.batch}, {options.steps} steps")
    rows = []
    for network in options.networks.split(","):
        for optimizer in options.optimizers.split(","):
            rows.append(measure(network, optimizer, options.blocks, options.steps, options.batch))
            print(line(rows[-1]), flush=True)
            if options.json is not None:
                options.json.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    tensor, loss = max(row.apart for row in rows), max(row.free_apart for row in rows)
    print(
        f"largest relative difference between the runtimes: {tensor:.1e} of a tensor, {loss:.1e} of a loss left alone"
    )
    sys.exit(any(row.worse for row in rows))


def measure(network: str, optimizer: str, blocks: str, steps: int, batch: int) -> Row:
    """One network with one optimizer."""
    shape = INPUTS.get(network, "3x32x32")
    given = ExportOptions(
        blocks=blocks, optimizer=optimizer, input_shape=shape, batch=batch, runtime="both", pad=0, flip=False
    )
    request = make_request(network, given)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="edgelocal-runtimes-") as folder:
        export_bundle(request, Path(folder) / "bundle", lambda text: None)
        bundle = open_bundle(Path(folder) / "bundle")
        truth = Eager(bundle, request.optimizer, torch.float64)
        led, free = (_programs(bundle, request.optimizer) for _ in range(2))
        lr = ADAMW_RATE if optimizer == "adamw" else SGD_RATE
        every = list(_steps(truth, led, free, lr, _data(shape, steps, batch)))
    errors, between = zip(*every, strict=True)
    eager, portable, artifacts = (_summary(steps) for steps in zip(*errors, strict=True))
    times = [median(runner.times[2:]) for runner in led[1:]]
    largest = np.max(between, axis=0).tolist()
    return Row(network, optimizer, len(bundle.manifest.blocks), eager, portable, artifacts, *largest, *times)


def _summary(steps: Sequence[Found]) -> Errors:
    """Of all steps."""
    loss, gradients, state, statistics, free_loss = zip(*steps, strict=True)
    return Errors(max(loss), median(gradients), median(state), max(statistics), max(free_loss))


def _programs(bundle: Bundle, optimizer: Optimizer) -> tuple[Eager, Runner, Runner]:
    """Eager float32, the step graphs and the artifacts."""
    runners = (Runner(bundle, optimizer, artifacts=artifacts) for artifacts in (False, True))
    return Eager(bundle, optimizer, torch.float32), *runners


def _steps(
    truth: Eager, led: Programs, free: Programs, lr: float, data: Iterable[Sample]
) -> Iterator[tuple[list[Found], tuple[float, float]]]:
    """Of every step the errors of the programs, and how far the runtimes are apart."""
    for number, (x, y) in enumerate(data):
        for program in led if number else (*led, *free):
            program.take(truth, number)
        expected = truth.losses(x, y, lr)
        losses, alone = ([program.losses(x, y, lr) for program in programs] for programs in (led, free))
        state, slots = truth.state(), truth.slots()
        states = [program.state() for program in led]
        rows = zip(led, losses, states, alone, strict=True)
        errors = [
            (
                relative(loss, expected),
                apart(program.slots(), slots),
                worst(found, state),
                _statistics(found, state),
                relative(own, expected),
            )
            for program, loss, found, own in rows
        ]
        yield errors, (worst(states[2], states[1]), relative(alone[2], alone[1]))


def _statistics(found: Arrays, expected: Arrays) -> float:
    """The largest error of a buffer."""
    buffers = {name: value for name, value in expected.items() if name.startswith("buf/")}
    return worst(found, buffers) if buffers else 0.0


def _data(shape: str, steps: int, batch: int) -> Iterator[Sample]:
    rng = np.random.default_rng(0)
    sizes = [int(size) for size in shape.split("x")]
    for _ in range(steps):
        y = rng.integers(0, 10, batch)
        yield (rng.normal(size=(batch, *sizes)) + 0.3 * y.reshape(-1, *[1] * len(sizes))).astype(np.float32), y


def line(row: Row) -> str:
    """A row as text."""

    def text(name: str, errors: Errors) -> str:
        return " ".join([name, *(f"{value:.0e}" for value in asdict(errors).values())])

    parts = [text("eager", row.eager), text("portable", row.portable), text("ort-training", row.artifacts)]
    times = f"{1000 * row.portable_s:.0f} ms, {1000 * row.artifacts_s:.0f} ms ({row.artifacts_s / row.portable_s:.2f})"
    return f"{row.network:12} {row.optimizer:6} {'  '.join(parts)}  apart {row.apart:.1e} {row.free_apart:.1e}  {times}"


if __name__ == "__main__":
    main()
