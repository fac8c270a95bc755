"""What a benchmark asks of a worker process and what the worker answers: plain values, no PyTorch."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

from edgelocal.errors import UsageError

LEAST_BATCH = 2  # batch norm has no variance over one sample
DEVICES = ("cpu", "cuda")
PRECISIONS = ("float32", "tf32", "bf16")  # bf16: PyTorch's autocast, on our side the matrix products alone


@dataclass(frozen=True)
class Setting:
    """One training task to measure. `input` is the text of --input; `steps` are timed, warm-up steps come on top.

    `tuned` measures PyTorch with glibc's MALLOC_MMAP_THRESHOLD_ set, so that freed memory goes back to the system.
    `precision` is that of matrix products and convolutions on a GPU.
    """

    network: str
    input: str = "3x32x32"
    classes: int = 10
    batch: int = 128
    steps: int = 10
    threads: int = 2
    seed: int = 0
    tuned: bool = False
    device: str = "cpu"
    precision: str = "float32"

    def check(self) -> None:
        """Raise UsageError for the first value out of range."""
        for name, found, least in (
            ("batch", self.batch, LEAST_BATCH),
            ("steps", self.steps, 1),
            ("threads", self.threads, 1),
            ("seed", self.seed, 0),
        ):
            if found < least:
                raise UsageError(f"--{name} is {found}, expected at least {least}")
        for name, word, known in (("device", self.device, DEVICES), ("precision", self.precision, PRECISIONS)):
            if word not in known:
                raise UsageError(f"--{name} is {word!r}, expected one of {', '.join(known)}")
        if self.device == "cpu" and self.precision != "float32":
            raise UsageError(f"--precision {self.precision} is a matter of GPUs: give --device cuda with it")


@dataclass(frozen=True)
class Measurement:
    """What one worker process measured of one variant.

    Bytes are resident memory: `idle_bytes` with the libraries loaded and one trivial operation done, before the network
    is built; `process_peak_bytes` the highest from then on, over building, warm-up and timed steps;
    `working_set_bytes` the difference.

    On a GPU they are of its memory: `idle_bytes` the context, `process_peak_bytes` all that the process takes,
    `reserved_bytes` what its allocator held at most (None on the CPU). `working_set_bytes` is for PyTorch the most that
    its allocator had given out in the timed steps, so neither what it keeps for later nor the libraries' own memory;
    for edgelocal all that the process takes but the context. The comparison is to PyTorch's advantage.

    `step_s` are the seconds of each timed step, `time_per_sample_s` their median
    over the batch. `segments` is 0 without checkpointing, `parameters` a number of elements, `loss` that of the first
    step (a warm-up) and of the last.
    """

    variant: str
    network: str
    batch: int
    segments: int
    idle_bytes: int
    working_set_bytes: int
    process_peak_bytes: int
    step_s: tuple[float, ...]
    time_per_sample_s: float
    parameters: int
    loss: tuple[float, ...]
    reserved_bytes: int | None = None


def combine(rounds: Sequence[Measurement]) -> Measurement:
    """One variant over its rounds (at least one): medians of the bytes, and of the time over the steps of all rounds.

    The loss is that of the first round. Since each is a median of its own, working set and idle need not add up to the
    peak.
    """
    first = rounds[0]
    kinds = {(r.variant, r.network, r.batch, r.segments) for r in rounds}
    assert len(kinds) == 1, f"rounds of different variants: {sorted(kinds)}"
    step_s = tuple(s for r in rounds for s in r.step_s)
    reserved = [r.reserved_bytes for r in rounds if r.reserved_bytes is not None]
    return replace(
        first,
        idle_bytes=int(statistics.median(r.idle_bytes for r in rounds)),
        working_set_bytes=int(statistics.median(r.working_set_bytes for r in rounds)),
        process_peak_bytes=int(statistics.median(r.process_peak_bytes for r in rounds)),
        step_s=step_s,
        time_per_sample_s=statistics.median(step_s) / first.batch,
        reserved_bytes=int(statistics.median(reserved)) if reserved else None,
    )
