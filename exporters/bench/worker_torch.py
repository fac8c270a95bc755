"""One variant of PyTorch training, measured in a process of its own: prints one JSON object, a `Measurement`.

    python -m edgelocal.exporters.bench.worker_torch --network resnet32 --mode checkpoint --segments 6

It is the training loop of an ordinary program: SGD with Nesterov momentum, cross entropy, float32, PyTorch's own
allocator, nothing tuned; on a GPU cuDNN chooses its algorithms by trying them (`torch.backends.cudnn.benchmark`), as
training programs have it, and TF32 is off unless asked for. Modes:

    bp           back-propagation through the whole network
    compile      the same, by torch.compile
    checkpoint   with the inputs of --segments runs of units kept, the rest computed again
    best         that with the number of segments that takes least, found in the same process
    local        block after block, each with a loss of its own, as `edgelocal export` cuts the network

What only this project loads, and what PyTorch loads on first use,
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
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from edgelocal.errors import EdgelocalError, UsageError
from edgelocal.exporters.bench.meters import Meter, make_meter
from edgelocal.exporters.bench.result import Measurement, Setting
from edgelocal.exporters.bench.torch_side import segment_candidates
from edgelocal.exporters.bench.torch_steps import MODES, Mode, Step, make_step
from edgelocal.exporters.guest import guest, network_errors
from edgelocal.exporters.request import parse_input
from edgelocal.exporters.units import Network, load_network, output_shapes

WARM_UP_STEPS = 2
_LAZY = ("torch._dynamo", "edgelocal.exporters.zoo.custom")

_NOT_OPTIONS = ("network", "tuned")  # given apart; a matter of the environment


def measure(setting: Setting, mode: Mode) -> Measurement:
    """Train `setting.steps` steps after the warm-up.

    Raises:
        UsageError: a value out of range, or a system where the peak cannot be measured.
        ExportError: the network cannot be built or trained.
    """
    setting.check()
    mode.check()
    meter = _idle(setting)
    shape, dtype = parse_input(setting.input)
    network = load_network(setting.network, shape, setting.classes, setting.seed, getattr(torch, dtype))
    network.module.to(setting.device)
    with network_errors(f"{setting.network}: training at batch {setting.batch}"):
        if mode.name == "best":
            mode = Mode("checkpoint", _least_segments(network, setting, meter))
            meter.restart()
        losses, step_s = _train(network, make_step(network, setting, mode), setting, meter)
    peak = meter.read()
    return Measurement(
        variant=mode.name,
        network=setting.network,
        batch=setting.batch,
        segments=mode.segments,
        idle_bytes=peak.idle_bytes,
        working_set_bytes=peak.working_set_bytes,
        process_peak_bytes=peak.process_peak_bytes,
        step_s=tuple(step_s),
        time_per_sample_s=statistics.median(step_s) / setting.batch,
        parameters=sum(p.numel() for p in network.module.parameters()),
        loss=(losses[0], losses[-1]),
        reserved_bytes=peak.reserved_bytes,
    )


def _idle(setting: Setting) -> Meter:
    """Load what is loaded on first use, and begin to count."""
    torch.set_num_threads(setting.threads)
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = setting.precision == "tf32"
    for module in _LAZY:
        importlib.import_module(module)
    output_shapes([nn.Linear(1, 1)], (1,), "probe")  # loads what `load_network` checks the shapes with
    torch.ones(8).sum()
    return make_meter(setting)


def _least_segments(network: Network, setting: Setting, meter: Meter) -> int:
    """The number of segments with the least working set, each tried for the warm-up and one step.

    On a GPU the allocator counts exactly. On the CPU it is a rough choice (`torch_side.best_checkpointing` is the one
    that measures each in processes of its own).
    """
    short = dataclasses.replace(setting, steps=1)
    found = {}
    for segments in segment_candidates(len(network.units)):
        meter.restart()
        _train(network, make_step(network, short, Mode("checkpoint", segments)), short, meter)
        found[segments] = meter.read().working_set_bytes
    if not found:
        raise UsageError(f"{network.name} has one unit, so there are no segments to checkpoint; leave it out")
    return min(found, key=lambda segments: found[segments])


def _train(network: Network, step: Step, setting: Setting, meter: Meter) -> tuple[list[float], list[float]]:
    """Losses of all steps, seconds of the timed ones. Making the random batch is not timed."""
    network.module.train()
    generator = torch.Generator().manual_seed(setting.seed)
    losses, seconds = [], []
    for number in range(WARM_UP_STEPS + setting.steps):
        if number == WARM_UP_STEPS:
            meter.warmed()
        x, y = (value.to(setting.device) for value in _batch(network, setting.batch, generator))
        _wait(setting)
        started = time.perf_counter()
        losses.append(step(x, y))
        _wait(setting)
        seconds.append(time.perf_counter() - started)
    return losses, seconds[WARM_UP_STEPS:]


def _wait(setting: Setting) -> None:
    """Until the device has done what it was given."""
    if setting.device == "cuda":
        torch.cuda.synchronize()


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
    parser.add_argument("--mode", choices=MODES, required=True)
    parser.add_argument("--segments", type=int, default=Mode.segments)
    parser.add_argument("--blocks", default=Mode.blocks)
    parser.add_argument("--depth", type=int, default=Mode.depth)
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
        with guest(given.network):
            measurement = measure(setting, Mode(given.mode, given.segments, given.blocks, given.depth))
    except EdgelocalError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(json.dumps(dataclasses.asdict(measurement)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
