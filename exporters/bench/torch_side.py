"""The PyTorch side of the memory benchmark: every measurement in a fresh process (`worker_torch`).

The C library's malloc gives memory back as fragments allow, so the peak of one variant differs from process to process
(with checkpointing by a tenth and more). A caller that reports figures measures a variant in several rounds, in turn
with the others, and takes `result.combine` of them.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from math import sqrt

from edgelocal.errors import UsageError
from edgelocal.exporters.bench.result import LEAST_BATCH, Measurement, Setting, combine
from edgelocal.machine.budget import format_size
from edgelocal.storage.decode import decode, unique

Say = Callable[[str], None]
MeasureSegments = Callable[[Setting, int], Measurement]
MeasureBp = Callable[[Setting], Measurement]

SEARCH_STEPS = 3
SEARCH_ROUNDS = 3
FINALISTS = 3
_WORKER = "edgelocal.exporters.bench.worker_torch"
_MMAP_FROM = 128 << 10
_TUNING = ("MALLOC_", "GLIBC_TUNABLES", "PYTHONMALLOC", "PYTHONWARNINGS")
_LONGEST = 2000  # characters of the worker's stderr


def measure_bp(setting: Setting) -> Measurement:
    """Plain back-propagation through the network as it is.

    Raises:
        UsageError: the worker failed; the message holds what it wrote to stderr.
    """
    return _run(setting, ["--mode", "bp"])


def measure_checkpointed(setting: Setting, segments: int) -> Measurement:
    """Back-propagation that keeps only the inputs of `segments` equal runs of units.

    Raises:
        UsageError: as `measure_bp`; also fewer than 2 segments or more than units.
    """
    return _run(setting, ["--mode", "checkpoint", "--segments", str(segments)])


def measure_mode(setting: Setting, mode: str, *options: str) -> Measurement:
    """Any mode of the worker, see there; `options` as on its command line.

    Raises:
        UsageError: as `measure_bp`.
    """
    return _run(setting, ["--mode", mode, *options])


def best_checkpointing(setting: Setting, say: Say, measure: MeasureSegments = measure_checkpointed) -> Measurement:
    """Of `segment_candidates` the number of segments with the least working set, in short processes.

    Each candidate is measured once, the FINALISTS best ones SEARCH_ROUNDS times in all, of which the medians count. The
    result is that of the search (few steps, the least of several noisy figures, so rather too small): measure its
    `segments` again for figures to report.

    Raises:
        UsageError: as `measure_bp`; also a network of one unit, which has nothing to divide.
    """
    units = count_units(setting)
    candidates = segment_candidates(units)
    if not candidates:
        raise UsageError(f"{setting.network} has {units} unit, so there are no segments to checkpoint; leave it out")
    short = replace(setting, steps=min(SEARCH_STEPS, setting.steps))

    count = len(candidates) + min(FINALISTS, len(candidates)) * (SEARCH_ROUNDS - 1)
    tuned = ", allocator tuned" if setting.tuned else ""
    tries = itertools.count(1)

    def again(segments: int) -> Measurement:
        found = measure(short, segments)
        size = format_size(found.working_set_bytes)
        say(f"search for the best checkpointing{tuned}, {next(tries)} of {count}: {segments} segments, {size}")
        return found

    first = sorted((again(segments) for segments in candidates), key=_size)
    finals = [combine([m, *(again(m.segments) for _ in range(SEARCH_ROUNDS - 1))]) for m in first[:FINALISTS]]
    return min(finals, key=_size)


def batch_at_peak(
    setting: Setting, working_set_bytes: int, say: Say, measure: MeasureBp = measure_bp
) -> Measurement | None:
    """Plain back-propagation at the largest batch up to `setting.batch` whose working set is at most the given bytes.

    None where not even LEAST_BATCH fits. Bisection takes the working set to grow with the batch; it is one process a
    probe, so with noise the result is a batch that fitted, next to one that did not.

    Raises:
        UsageError: as `measure_bp`.
    """

    def fitting(batch: int) -> Measurement | None:
        found = measure(replace(setting, batch=batch))
        say(
            f"PyTorch back-propagation, batch {batch}: {format_size(found.working_set_bytes)} "
            f"of {format_size(working_set_bytes)}"
        )
        return found if found.working_set_bytes <= working_set_bytes else None

    whole = fitting(setting.batch)
    if whole is not None or setting.batch == LEAST_BATCH:
        return whole
    best = fitting(LEAST_BATCH)
    fits, too_large = LEAST_BATCH, setting.batch
    while best is not None and too_large - fits > 1:
        middle = (fits + too_large) // 2
        found = fitting(middle)
        if found is None:
            too_large = middle
        else:
            best, fits = found, middle
    return best


def segment_candidates(units: int) -> tuple[int, ...]:
    """Numbers of segments to try: all up to 8, those about sqrt(units) and twice that, and a segment a unit.

    With equal units, each of which keeps c times its input, K segments hold K + c units / K inputs: least at
    K = sqrt(c units). For a residual block c is about 4, for a single layer 1.
    """
    wanted = {*range(2, 9), units}
    for centre in (round(sqrt(units)), round(2 * sqrt(units))):
        wanted |= {centre - 1, centre, centre + 1}
    return tuple(sorted(k for k in wanted if 2 <= k <= units))


def count_units(setting: Setting) -> int:
    """Units of the network: the most segments there can be.

    Raises:
        ExportError: the network cannot be built.
    """
    import torch

    from edgelocal.exporters.guest import guest
    from edgelocal.exporters.request import parse_input
    from edgelocal.exporters.units import load_network

    shape, dtype = parse_input(setting.input)
    with guest(setting.network):
        return len(load_network(setting.network, shape, setting.classes, setting.seed, getattr(torch, dtype)).units)


def _size(found: Measurement) -> int:
    return found.working_set_bytes


def _run(setting: Setting, mode: list[str]) -> Measurement:
    options = [f"--{name}={value}" for name, value in asdict(setting).items() if name != "tuned"]
    tuning = {"MALLOC_MMAP_THRESHOLD_": str(_MMAP_FROM)} if setting.tuned else {}
    done = subprocess.run(
        [sys.executable, "-m", _WORKER, *mode, *options],
        capture_output=True,
        text=True,
        check=False,
        env=dict(_plain_environment()) | tuning,
    )
    if done.returncode != 0:
        said = done.stderr.strip()[-_LONGEST:] or "nothing on stderr"
        raise UsageError(
            f"measuring PyTorch ({' '.join(mode)}) on {setting.network} at batch {setting.batch} failed with "
            f"{_status(done.returncode)}: {said}"
        )
    result: Measurement = decode(Measurement, json.loads(done.stdout, object_pairs_hook=unique), _WORKER)
    return result


def _plain_environment() -> Iterator[tuple[str, str]]:
    """This process's environment without what tunes the allocator or the warnings of a child."""
    return ((name, value) for name, value in os.environ.items() if not name.startswith(_TUNING))


def _status(code: int) -> str:
    if code < 0:
        return f"signal {-code} (9: the system may have run out of memory; choose a smaller --batch)"
    return f"exit code {code}"
