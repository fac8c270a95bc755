"""Accuracy, peak memory and time on all of CIFAR-10, by the recipe of AugLocal's authors; for a GPU.

    python benchmarks/learning_full.py cifar10.zip [--device cuda] [--epochs 30] [--minutes 8]
    python benchmarks/learning_full.py --write [docs/learning.md]     # only write what was reached into the page

DATA is CIFAR-10 in any format that `edgelocal train` reads. All 50,000 training images, reflected, cropped and
mirrored; batch 1024, SGD with Nesterov momentum 0.9, weight decay 1e-4, learning rate 0.8 with a warm-up and a cosine
to zero. The authors train for 400 epochs with 10 of warm-up; here there are as many as --epochs says, a tenth of them,
at most 10, of warm-up, the same for every candidate. Test accuracy is that after the last epoch.

A training is an `edgelocal train` into --work. When the --minutes are over it is interrupted, and goes on when the
command is given again; what is finished is not trained again. What was reached goes into --result at once.
"""

from __future__ import annotations

import argparse
import json
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cuda_result
from learning import GPU_SECTION, edgelocal, write_arrays
from page_sections import with_section

from edgelocal.errors import InterruptedRunError
from edgelocal.machine.budget import format_size

PAGE = Path("docs/learning.md")
BATCH, LR = 1024, 0.8
_AUGLOCAL = ("--rule", "auglocal", "--blocks")
CANDIDATES = {
    "bp": ("--rule", "bp"),
    **{f"auglocal per-unit, d = {d}": (*_AUGLOCAL, "per-unit", "--aux-depth", str(d)) for d in (2, 4, 6)},
    "auglocal 4 blocks, d = 2": (*_AUGLOCAL, "4", "--aux-depth", "2"),
    "linear per-unit": ("--rule", "linear", "--blocks", "per-unit"),
}
# Accuracies in percent after 400 epochs. ResNet-110: Ma et al., ICLR 2024 (arXiv 2402.17318), table 1; ResNet-32: the
# baseline of later papers with the same recipe. Both as quoted elsewhere: the tables themselves were not at hand.
PUBLISHED = {
    ("resnet110", "bp"): 94.61,
    ("resnet110", "auglocal per-unit, d = 6"): 93.96,
    ("resnet32", "bp"): 93.63,
}


@dataclass(frozen=True)
class Training:
    """One candidate on one network; `folder` has its bundle and its run."""

    network: str
    candidate: str
    folder: Path
    epochs: int
    device: str
    seed: int

    @property
    def warmup(self) -> int:
        """Epochs of warm-up."""
        return min(10, self.epochs // 10)

    def export(self) -> Path:
        """The bundle; exported now if it is not there."""
        bundle = self.folder / "bundle"
        more = ("--seed", str(self.seed), "--batch", str(BATCH), "--target", self.device)
        if not bundle.is_dir():
            edgelocal("export", self.network, str(bundle), *CANDIDATES[self.candidate], *more)
        return bundle

    def command(self, data: Path) -> list[str]:
        """What trains it, or goes on."""
        line = [sys.executable, "-m", "edgelocal", "train", str(self.export()), "--data", str(data), "--json"]
        line += ["--out", str(self.run), "--epochs", str(self.epochs), "--batch", str(BATCH), "--lr", str(LR)]
        line += ["--lr-schedule", "cosine", "--warmup-epochs", str(self.warmup), "--seed", str(self.seed)]
        budget = ["--memory-budget", "auto"] if self.device != "cpu" else []  # is what makes it small there
        return [*line, "--val-every", "0", "--device", self.device, *budget]

    @property
    def run(self) -> Path:
        """The run's folder."""
        return self.folder / "run"


def reached(training: Training) -> dict[str, Any] | None:
    """What a run has reached so far; None: it has not finished an epoch.

    `peak_bytes` of a GPU is all that the process took there but the context, else that of the process.
    """
    metrics = training.run / "metrics.jsonl"
    epochs = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.is_file() else []
    if not epochs:
        return None
    file = training.run / "report.json"
    report = json.loads(file.read_text()) if file.is_file() else {}
    device = report.get("device")
    peak = device["peak_bytes"] - (device["context_bytes"] or 0) if device else report.get("process_peak_bytes")
    return {
        "epochs": training.epochs,
        "epochs_done": len(epochs),
        "done": bool(report),
        "seed": training.seed,
        "test": report["validation"]["accuracy"] if report else None,
        "peak_bytes": peak,
        "epoch_s": statistics.median(epoch["seconds"] for epoch in epochs),
    }


def train(training: Training, data: Path, deadline: float) -> bool:
    """Train to the end or the deadline; whether it is at its end.

    Raises:
        SystemExit: the training failed; its own message is on stderr.
    """
    if (training.run / "report.json").is_file():
        return True
    process = subprocess.Popen(training.command(data), stdout=subprocess.DEVNULL)
    try:
        code = process.wait(timeout=max(0.0, deadline - time.monotonic()) if deadline < float("inf") else None)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)  # it commits after the step it is in
        code = process.wait()
    if code not in (0, InterruptedRunError.exit_code):
        sys.exit(f"{training.network}, {training.candidate}: training failed with exit code {code}")
    return code == 0


def table(runs: dict[str, dict[str, Any]], network: str) -> str:
    """The candidates of a network."""
    names = "test accuracy | published, 400 epochs | peak memory | of bp | s an epoch | of bp | epochs"
    base = runs.get("bp") or {}
    lines = [f"| {network} | {names} |", "|---|" + "--:|" * 7]
    for name in CANDIDATES:
        known = PUBLISHED.get((network, name))
        published = "" if known is None else f"{known:.2f} %"
        if name not in runs:
            lines.append(f"| {name} | not trained | {published} | | | | | |")
            continue
        run = runs[name]
        test = f"{100 * run['test']:.2f} %" if run["done"] else "not at its end"
        peak = "" if run["peak_bytes"] is None else format_size(run["peak_bytes"])
        cells = (test, published, peak, _share(run, base, "peak_bytes"), f"{run['epoch_s']:.1f}")
        cells += (_share(run, base, "epoch_s"), f"{run['epochs_done']} of {run['epochs']}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _share(run: dict[str, Any], base: dict[str, Any], key: str) -> str:
    return f"{run[key] / base[key]:.2f}" if run[key] and base.get(key) else ""


def body(result: dict[str, Any]) -> str:
    """The section of docs/learning.md."""
    learned = result.get("learning", {})
    if not learned:
        return NOT_RUN + RECIPE
    found = result["machine"]
    driver = f", driver {found['driver']}" if "driver" in found else ""
    tables = "\n\n".join(table(runs, network) for network, runs in learned.items())
    return f"On {found['name']}{driver}, host {found['host']}.\n\n{tables}\n\n{RECIPE}"


NOT_RUN = "**Not run yet: this needs an NVIDIA GPU.**\n\n"
RECIPE = """    make gpu-learning CIFAR=cifar10.zip

All 50,000 training images with reflected crops and mirroring, batch 1024, SGD with Nesterov momentum 0.9, weight decay
1e-4, learning rate 0.8 with a warm-up of a tenth of the epochs (at most 10) and a cosine to zero; one seed; the same
for every row. Accuracy is that of the test images after the last epoch. Memory is all that the process takes of the
GPU but the context. Published accuracies are those of the authors' recipe, the same but for its 400 epochs: 94.61 % for
back-propagation and 93.96 % for AugLocal with d = 6 on ResNet-110 (arXiv 2402.17318, table 1), 93.63 % for
back-propagation on ResNet-32 (later papers by the same recipe); all quoted at second hand, others were not found."""


def main(words: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path, nargs="?")
    parser.add_argument("--work", type=Path, default=Path("out/cuda/learning"))
    parser.add_argument("--result", type=Path, default=cuda_result.FILE)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda", help="cpu: a rehearsal")
    parser.add_argument("--networks", default="resnet32,resnet110")
    parser.add_argument("--candidates", help="only these, by name, with ; between them")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, default=0, help="train for these; 0: to the end")
    parser.add_argument("--prepare", action="store_true", help="only export the bundles and unpack the data")
    parser.add_argument("--write", type=Path, nargs="?", const=PAGE, help=f"only write the page  [{PAGE}]")
    options = parser.parse_args(words)
    if options.write is not None:
        result = json.loads(options.result.read_text()) if options.result.is_file() else {}
        options.write.write_text(with_section(options.write.read_text(), GPU_SECTION, body(result)))
        return
    if options.data is None:
        parser.error("give CIFAR-10: make gpu-learning CIFAR=cifar10.zip")
    run_all(options, time.monotonic() + 60 * options.minutes if options.minutes else float("inf"))


def run_all(options: argparse.Namespace, deadline: float) -> None:
    """Every candidate of every network, what is left of it, until the deadline."""
    data = options.work / "data"
    if not data.is_dir():
        data.parent.mkdir(parents=True, exist_ok=True)
        write_arrays(options.data, data, None)
    for training in trainings(options):
        if options.prepare:
            training.export()
            continue
        if time.monotonic() > deadline:
            print("the time is up: give the same command again, and it goes on from here", file=sys.stderr)
            return
        print(f"{training.network}, {training.candidate}", file=sys.stderr, flush=True)
        train(training, data, deadline)
        found = reached(training)
        if found is not None:
            where = ("learning", training.network, training.candidate)
            cuda_result.put(options.result, options.device, where, found)


def trainings(options: argparse.Namespace) -> list[Training]:
    """What is asked for, network by network."""
    wanted = [name.strip() for name in options.candidates.split(";")] if options.candidates else list(CANDIDATES)
    unknown = [name for name in wanted if name not in CANDIDATES]
    if unknown:
        sys.exit(f"no candidate is called {unknown[0]!r}; there are {'; '.join(CANDIDATES)}")
    return [
        Training(network, name, options.work / _folder(network, name, options), *_rest(options))
        for network in options.networks.split(",")
        for name in wanted
    ]


def _rest(options: argparse.Namespace) -> tuple[int, str, int]:
    return options.epochs, options.device, options.seed


def _folder(network: str, name: str, options: argparse.Namespace) -> str:
    slug = name.replace(", d = ", "-d").replace(" ", "-")
    return f"{network}-{slug}-{options.device}-{options.epochs}-epochs-seed-{options.seed}"


if __name__ == "__main__":
    main()
