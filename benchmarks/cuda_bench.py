"""What benchmarks/cuda.py measures, and how: cases, variants, rounds that go on where they ended."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import cuda_page
import cuda_result

from edgelocal.bundle.folder import open_bundle
from edgelocal.bundle.manifest import render_manifest
from edgelocal.commands.export_options import ExportOptions
from edgelocal.errors import EdgelocalError
from edgelocal.exporters.bench.own_side import Bundle, export_request, export_variant, measure_own, write_samples
from edgelocal.exporters.bench.result import DEVICES, Measurement, Setting
from edgelocal.exporters.bench.rounds import Figures, Variant
from edgelocal.exporters.bench.torch_side import measure_bp, measure_checkpointed, measure_mode
from edgelocal.machine.device import describe
from edgelocal.machine.profiles import idle_process_bytes

Say = Callable[[str], None]
PAGE = Path("docs/cuda.md")
SHARE = 0.5  # of what one block needs above the idle process: the budget of the searched partition
INPUTS = {"resnet50": ("3x224x224", 1000)}  # others are of CIFAR-10
BATCHES = {"resnet50": (32,)}
DEFAULT_BATCHES = (128, 1024)
# The variant that is exported -> options of the export.
EXPORTED = {
    cuda_page.OWN_BP: {"rule": "bp"},
    cuda_page.OWN_UNITS: {"rule": "auglocal", "blocks": "per-unit"},
    cuda_page.OWN_PARTITION: {"rule": "auglocal"},
}
FOLDERS = {cuda_page.OWN_BP: "bp", cuda_page.OWN_UNITS: "units", cuda_page.OWN_PARTITION: "partition"}


@dataclass(frozen=True)
class Task:
    """One case and the folder of its bundles."""

    setting: Setting
    folder: Path

    @property
    def name(self) -> str:
        """Of the case in the result."""
        return f"{self.setting.network}, batch {self.setting.batch}"

    def exported(self, variant: str, say: Say, setting: Setting | None = None) -> Bundle:
        """The bundle of a variant of ours, exported now if it is not there; in the precision of `setting`.

        Raises:
            EdgelocalError: it cannot be exported.
        """
        setting = setting or self.setting
        folder = self.folder / (FOLDERS[variant] + ("-bf16" if setting.precision == "bf16" else ""))
        if folder.is_dir():
            return Bundle(variant, folder)
        options = dict(EXPORTED[variant])
        if variant == cuda_page.OWN_PARTITION:
            return export_variant(setting, folder, variant, say, **options, budget=str(self._budget(say)))
        return export_variant(setting, folder, variant, say, **options)

    def _budget(self, say: Say) -> int:
        """Bytes of a process on the CPU in which SHARE of what one block needs is left for blocks."""
        from edgelocal.exporters.search.trial import whole_batch_budget

        manifest = open_bundle(self.exported(cuda_page.OWN_BP, say).folder).manifest
        idle = idle_process_bytes(len(render_manifest(manifest)))
        return idle + int(SHARE * (whole_batch_budget(manifest.blocks, export_request(self.setting, rule="bp")) - idle))


def tasks(options: argparse.Namespace) -> list[Task]:
    """Every case of the networks asked for."""
    found = []
    for network in options.networks.split(","):
        shape, classes = INPUTS.get(network, ("3x32x32", 10))
        for batch in [options.batch] if options.batch else BATCHES.get(network, DEFAULT_BATCHES):
            setting = Setting(network, shape, classes, batch, options.steps, describe().cores, device=options.device)
            setting.check()
            found.append(Task(setting, options.result.parent / "bundles" / f"{network}-{batch}-{options.device}"))
    return found


def variants(task: Task, figures: Figures, scratch: Path, say: Say) -> list[Variant]:
    """All variants of a case, PyTorch's first."""
    found = _in_precision(task, task.setting, figures, scratch, say)
    if task.setting.device != "cpu":
        for precision in cuda_page.PRECISIONS:
            given = replace(task.setting, precision=precision)
            of_it = _in_precision(task, given, figures, scratch, say)
            chosen = (v for v in of_it if v.name in cuda_page.IN_PRECISIONS)
            found += [Variant(cuda_page.in_precision(v.name, precision), v.run) for v in chosen]
    return found


def _in_precision(task: Task, setting: Setting, figures: Figures, scratch: Path, say: Say) -> list[Variant]:
    local = ("local", "--blocks", "per-unit", "--depth", str(ExportOptions.aux_depth))
    found = [
        Variant(cuda_page.TORCH, lambda: measure_bp(setting)),
        Variant(cuda_page.COMPILED, lambda: measure_mode(setting, "compile")),
        Variant(cuda_page.CHECKPOINTED, lambda: _checkpointed(setting, figures)),
        Variant(cuda_page.LOCAL, lambda: measure_mode(setting, *local)),
    ]

    def own(name: str) -> Measurement:
        bundle, data = task.exported(name, say, setting), scratch / "data.npz"
        if not data.exists():
            write_samples(setting, data)
        with tempfile.TemporaryDirectory(dir=scratch) as run:
            return measure_own(setting, bundle, data, Path(run) / "run")

    return [*found, *(Variant(name, lambda name=name: own(name)) for name in EXPORTED)]


def _checkpointed(setting: Setting, figures: Figures) -> Measurement:
    """The best number of segments, found in the first round and measured again in the others."""
    known = figures.results().get(cuda_page.CHECKPOINTED)
    return measure_mode(setting, "best") if known is None else measure_checkpointed(setting, known.segments)


class TimeIsUpError(Exception):
    """The rest is for the next call."""


def measure_case(task: Task, options: argparse.Namespace, deadline: float, say: Say) -> None:
    """All rounds of a case, what the result has left out; every measurement is kept as soon as it is made.

    Raises:
        TimeIsUpError: the deadline is over and something is left.
    """
    figures = Figures(say, forgiven=(EdgelocalError,))
    kept = cuda_result.read(options.result, options.device).get("speed", {}).get(task.name)
    if kept and not options.again:
        figures.learn(kept if not options.retry else {**kept, "skipped": []})
    with tempfile.TemporaryDirectory(prefix="edgelocal-cuda-") as folder:
        chosen = variants(task, figures, Path(folder), say)
        if options.variants:
            wanted = [name.strip() for name in options.variants.split(";")]
            chosen = [variant for variant in chosen if variant.name in wanted]
        for number in range(1, options.rounds + 1):
            for variant in chosen:
                if figures.left(variant, number):
                    if time.monotonic() > deadline:
                        raise TimeIsUpError
                    figures.measure([variant], f"{task.name}, round {number} of {options.rounds}")
                    kept = {"setting": asdict(task.setting), **figures.known()}
                    cuda_result.put(options.result, options.device, ("speed", task.name), kept)


def measure(found: Sequence[Task], options: argparse.Namespace) -> bool:
    """All cases; whether all is done."""
    began = time.monotonic()
    deadline = began + 60 * options.minutes if options.minutes else float("inf")

    def say(text: str) -> None:
        left = f", {(deadline - time.monotonic()) / 60:.1f} minutes left" if options.minutes else ""
        print(f"[{(time.monotonic() - began) / 60:.1f} min{left}] {text}", file=sys.stderr, flush=True)

    try:
        for task in found:
            measure_case(task, options, deadline, say)
    except TimeIsUpError:
        say("the time is up: give the same command again, and it goes on from here")
        return False
    return True


def prepare(found: Sequence[Task]) -> None:
    """Export the bundles of all cases; what cannot be exported is said."""
    for task in found:
        reduced = [(name, "bf16") for name in EXPORTED if name in cuda_page.IN_PRECISIONS]
        for name, precision in [*((name, "float32") for name in EXPORTED), *reduced]:
            if precision != "float32" and task.setting.device == "cpu":
                continue
            try:
                say = partial(print, file=sys.stderr, flush=True)
                task.exported(name, say, replace(task.setting, precision=precision))
            except EdgelocalError as error:
                print(f"{task.name}, {name}, {precision}: {error}", file=sys.stderr, flush=True)


def main(description: str | None, words: Sequence[str] | None = None) -> None:
    """The command line of benchmarks/cuda.py."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=DEVICES, default="cuda", help="cpu: a rehearsal")
    parser.add_argument("--networks", default="resnet32,resnet110,resnet50")
    parser.add_argument("--batch", type=int, help="of all networks, instead of their own")
    parser.add_argument("--variants", help="only these, by name, with ; between them")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--minutes", type=float, default=0, help="begin nothing after these; 0: no limit")
    parser.add_argument("--result", type=Path, default=cuda_result.FILE)
    parser.add_argument("--again", action="store_true", help="forget what was measured of these cases")
    parser.add_argument("--retry", action="store_true", help="measure what was skipped before, too")
    parser.add_argument("--prepare", action="store_true", help="only export the bundles")
    parser.add_argument("--write", type=Path, nargs="?", const=PAGE, help=f"only draw the page  [{PAGE}]")
    parser.add_argument("--json", action="store_true", help="print the result instead of tables")
    options = parser.parse_args(words)
    if options.write is None:
        found = tasks(options)
        if options.prepare:
            prepare(found)
            return
        measure(found, options)
    result = json.loads(options.result.read_text()) if options.result.is_file() else {}
    if options.write is not None:
        options.write.write_text(cuda_page.page(result))
    print(json.dumps(result) if options.json else cuda_page.speed(result))
