"""Variants measured in turn, round after round, and the file that has the figures of every whole round."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

from edgelocal.errors import BudgetError, EdgelocalError, UsageError
from edgelocal.exporters.bench.result import Measurement, combine
from edgelocal.machine.budget import format_size
from edgelocal.storage.decode import decode
from edgelocal.storage.whole import atomic_write

Say = Callable[[str], None]


@dataclass(frozen=True)
class Variant:
    """Something to measure, once a round."""

    name: str
    run: Callable[[], Measurement]


class Figures:
    """What was measured so far, in `skipped` what was not and why, in `budgets` the bytes that variants were given.

    Variants that fail with one of `forgiven` are skipped, other errors end the benchmark.
    """

    def __init__(self, say: Say, forgiven: tuple[type[EdgelocalError], ...] = (BudgetError,)) -> None:
        self.skipped: list[dict[str, str]] = []
        self.budgets: dict[str, int] = {}
        self._say = say
        self._forgiven = forgiven
        self._found: dict[str, list[Measurement]] = {}
        self._failed: set[str] = set()

    def known(self) -> dict[str, Any]:
        """All measurements as JSON values, and what was skipped."""
        rounds = {name: [asdict(one) for one in found] for name, found in self._found.items()}
        return {"rounds": rounds, "skipped": list(self.skipped)}

    def learn(self, known: dict[str, Any]) -> None:
        """Take over what `known` gave before."""
        for name, rounds in known["rounds"].items():
            self._found[name] = [decode(Measurement, one, name) for one in rounds]
        self.skipped += known["skipped"]
        self._failed |= {skipped["name"] for skipped in known["skipped"]}

    def left(self, variant: Variant, number: int) -> bool:
        """Whether the variant is still to be measured in round `number`, counted from 1."""
        return variant.name not in self._failed and len(self._found.get(variant.name, ())) < number

    def skip(self, name: str, why: str) -> None:
        """Leave a variant out from now on."""
        self._say(f"{name}: {why}")
        self.skipped.append({"name": name, "why": why})
        self._failed.add(name)

    def measure(self, variants: Sequence[Variant], where: str) -> None:
        """Each variant once; one that does not fit its budget, or is forgiven, is left out from then on."""
        for number, variant in enumerate(variants, start=1):
            if variant.name in self._failed:
                continue
            try:
                result = variant.run()
            except self._forgiven as error:
                self.skip(variant.name, str(error))
                continue
            self._found.setdefault(variant.name, []).append(result)
            self._say(
                f"{where}, {number} of {len(variants)}, {variant.name}: {format_size(result.working_set_bytes)}, "
                f"{1000 * result.time_per_sample_s:.2f} ms a sample"
            )

    def times(self) -> dict[str, list[float]]:
        """Seconds a sample in every round, by the name of the variant."""
        return {name: [r.time_per_sample_s for r in rounds] for name, rounds in self._found.items()}

    def time_ratio(self, name: str, base: str) -> float:
        """The median over the rounds of a variant's time beside that of `base` in the same round: machines slow down
        and speed up, so median times do not compare."""
        times = self.times()
        return median(own / other for own, other in zip(times[name], times[base], strict=False))

    def results(self) -> dict[str, Measurement]:
        """Medians over the rounds, by the name of the variant."""
        return {name: combine(rounds) for name, rounds in self._found.items()}


def check_writable(path: Path) -> None:
    """That the figures can be written to `path` when there are any.

    Raises:
        UsageError: it is a folder, or its folder does not exist.
        StorageError: the system refuses to write there.
    """
    if path.is_dir():
        raise UsageError(f"--out {path} is a folder; give the name of a file")
    if not path.absolute().parent.is_dir():
        raise UsageError(f"--out {path}: the folder {path.absolute().parent} does not exist; make it first")
    probe = path.with_name(f".{path.name}.probe")
    atomic_write(probe, [b"{}"])
    probe.unlink()


def write_figures(path: Path, figures: dict[str, Any]) -> None:
    """Replace the file by these figures, whole or not at all.

    Raises:
        StorageError: the system refuses to write there.
    """
    atomic_write(path, [(json.dumps(figures, indent=1) + "\n").encode()])
