"""One variant of PyTorch training, measured in a process of its own: prints one JSON object, a `Measurement`.

    python -m edgelocal.exporters.bench.worker_torch --network resnet32 --mode checkpoint --segments 6

It is the training loop of an ordinary program: SGD with Nesterov momentum, cross entropy, float32, PyTorch's own
allocator on top of the C library's, nothing tuned. What only this project loads, and what PyTorch loads on first use,
is loaded before the idle memory is read, so that no library counts as working set.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from edgelocal.errors import EdgelocalError, UsageError
from edgelocal.exporters.bench.result import Measurement, Setting
from edgelocal.exporters.guest import guest, network_errors
from edgelocal.exporters.request import parse_input
from edgelocal.exporters.units import Network, load_network, output_shapes
from edgelocal.machine.budget import peak_rss_bytes, reset_peak, rss_bytes

WARM_UP_STEPS = 2
LR = 0.01  # small: random labels at a large rate would soon leave the finite numbers
_LAZY = ("torch._dynamo", "edgelocal.exporters.zoo.custom")

_NOT_OPTIONS = ("network", "tuned")  # given apart; a matter of the environment

Forward = Callable[[Tensor], Tensor]


def measure(setting: Setting, segments: int) -> Measurement:
    """Train `setting.steps` steps after the warm-up; `segments` 0 is plain back-propagation.

    Raises:
        UsageError: a value out of range, or a system where the peak cannot be set back.
        ExportError: the network cannot be built or trained.
    """
    setting.check()
    idle_bytes = _idle_bytes(setting.threads)
    shape, dtype = parse_input(setting.input)
    network = load_network(setting.network, shape, setting.classes, setting.seed, getattr(torch, dtype))
    forward: Forward = checkpointed(network, segments) if segments else network.module
    with network_errors(f"{setting.network}: training at batch {setting.batch}"):
        losses, step_s = _train(network, forward, setting)
    peak_bytes = peak_rss_bytes()
    return Measurement(
        variant="checkpoint" if segments else "bp",
        network=setting.network,
        batch=setting.batch,
        segments=segments,
        idle_bytes=idle_bytes,
        working_set_bytes=peak_bytes - idle_bytes,
        process_peak_bytes=peak_bytes,
        step_s=tuple(step_s),
        time_per_sample_s=statistics.median(step_s) / setting.batch,
        parameters=sum(p.numel() for p in network.module.parameters()),
        loss=(losses[0], losses[-1]),
    )


def segment_sizes(units: int, segments: int) -> list[int]:
    """`units` in as equal parts as can be, the larger ones last, where resolution and so activations are smaller."""
    return [(units + index) // segments for index in range(segments)]


def checkpointed(network: Network, segments: int) -> Forward:
    """The network with only the inputs of its segments kept in the forward pass (Chen et al. 2016).

    The last segment, with the head, is not recomputed: its backward pass comes at once. The logits and gradients are
    those of plain back-propagation; the running statistics of batch norm are updated once more by the recomputation.

    Raises:
        UsageError: fewer than 2 segments or more than units.
    """
    modules = [unit.module for unit in network.units]
    if not 2 <= segments <= len(modules):
        raise UsageError(f"--segments is {segments}, expected 2 to {len(modules)}, the units of {network.name}")
    parts = iter(modules)
    *early, last = [
        nn.Sequential(*(next(parts) for _ in range(size))) for size in segment_sizes(len(modules), segments)
    ]

    def forward(x: Tensor) -> Tensor:
        for segment in early:
            x = checkpoint(segment, x, use_reentrant=False)
        logits: Tensor = network.head(last(x))
        return logits

    return forward


def _idle_bytes(threads: int) -> int:
    """Resident memory of an idle process, from which on the peak counts."""
    torch.set_num_threads(threads)
    for module in _LAZY:
        importlib.import_module(module)
    output_shapes([nn.Linear(1, 1)], (1,), "probe")  # loads what `load_network` checks the shapes with
    torch.ones(8).sum()
    if not reset_peak():
        raise UsageError(
            "this system does not set the peak of resident memory back (/proc/self/clear_refs), so a working set "
            "cannot be measured; run on Linux"
        )
    return rss_bytes()


def _train(network: Network, forward: Forward, setting: Setting) -> tuple[list[float], list[float]]:
    """Losses of all steps, seconds of the timed ones. Making the random batch is not timed."""
    network.module.train()
    parameters = list(network.module.parameters())
    optimizer = torch.optim.SGD(parameters, LR, momentum=0.9, weight_decay=1e-4, nesterov=True)
    generator = torch.Generator().manual_seed(setting.seed)
    losses, seconds = [], []
    for _ in range(WARM_UP_STEPS + setting.steps):
        x, y = _batch(network, setting.batch, generator)
        started = time.perf_counter()
        losses.append(_step(forward, optimizer, x, y))
        seconds.append(time.perf_counter() - started)
    return losses, seconds[WARM_UP_STEPS:]


def _step(forward: Forward, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor) -> float:
    optimizer.zero_grad()
    loss = functional.cross_entropy(forward(x), y)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return loss.item()


def _batch(network: Network, batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Random samples (batch, *input_shape), float32 or token ids 0 and 1, and labels (batch,), int64."""
    shape = (batch, *network.input_shape)
    if network.input_dtype == torch.int64:
        x = torch.randint(2, shape, generator=generator)
    else:
        x = torch.randn(shape, generator=generator)
    return x, torch.randint(network.classes, (batch,), generator=generator)


def _arguments(words: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure one variant of PyTorch training; prints one JSON object.")
    parser.add_argument("--network", required=True)
    parser.add_argument("--mode", choices=("bp", "checkpoint"), required=True)
    parser.add_argument("--segments", type=int, default=0)
    for field in dataclasses.fields(Setting):
        if field.name not in _NOT_OPTIONS:
            parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """The command line of the worker; returns the exit code."""
    given = _arguments(words)
    names = [field.name for field in dataclasses.fields(Setting) if field.name != "tuned"]
    setting = Setting(**{name: getattr(given, name) for name in names})
    try:
        if (given.mode == "checkpoint") != bool(given.segments):
            raise UsageError(
                f"--mode {given.mode} with --segments {given.segments}: 2 or more go with checkpoint, 0 with bp"
            )
        with guest(given.network):
            measurement = measure(setting, given.segments)
    except EdgelocalError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(json.dumps(dataclasses.asdict(measurement)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
