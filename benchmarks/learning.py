"""Accuracy, peak memory and time per step of bp, auglocal and linear on the same data, schedule and runtime.

    python benchmarks/learning.py DATA WORK [--epochs 8] [--seeds 0,1] [--write docs/learning.md]

DATA is CIFAR-10 in any format that `edgelocal train` reads. ResNet-32, the first 10,000 training images of a seeded
permutation, all test images. Every training is an `edgelocal train` into WORK and is continued, not repeated, when the
command is given again, so seeds can be added later; a training found there with other settings is an error. The costs
are measured apart, in one run: every candidate in a process of its own, in turn, several rounds; medians are reported.
Time is that of whole steps, reading and normalising the batch included; memory is the peak of the whole process.
`torch bp` is eager PyTorch.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from page_sections import section, with_section

from edgelocal.bundle.spec import InputSpec, TaskSpec
from edgelocal.data.augment import permutation
from edgelocal.data.pipeline import open_dataset
from edgelocal.machine.budget import format_size
from edgelocal.machine.device import describe
from edgelocal.storage.whole import staging

GPU_SECTION = "All of CIFAR-10, on a GPU"
IMAGES = 10_000
STEPS = 8
CANDIDATES = {
    "bp": ["--rule", "bp"],
    "auglocal per-unit": ["--rule", "auglocal", "--blocks", "per-unit", "--aux-depth", "2"],
    "auglocal 4 blocks": ["--rule", "auglocal", "--blocks", "4", "--aux-depth", "2"],
    "linear per-unit": ["--rule", "linear", "--blocks", "per-unit"],
}


def main() -> None:
    """Parse, run, print; see the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("work", type=Path)
    parser.add_argument("--network", default="resnet32")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--seeds", default="0")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--write", type=Path, help="Write the result as a page.")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    seeds = [int(s) for s in options.seeds.split(",")]
    prepare(options.data, options.work)
    accuracies: dict[str, list[dict[str, Any]]] = {name: [] for name in CANDIDATES}
    for seed in seeds:
        for name in CANDIDATES:
            accuracies[name].append(learn(name, seed, options))
    costs = measure(options)
    result = {
        "network": options.network,
        "images": IMAGES,
        "epochs": options.epochs,
        "batch": options.batch,
        "lr": options.lr,
        "seeds": seeds,
        "machine": f"{platform.machine()}, {describe().cores} cores",
        "accuracy": accuracies,
        "costs": costs,
    }
    print(json.dumps(result) if options.json else table(result))
    if options.write is not None:
        write_page(options.write, page(result))


def prepare(data: Path, work: Path) -> None:
    """The chosen images as arrays: `WORK/data` for learning, `WORK/few` for measuring a few steps."""
    if (work / "data").is_dir():
        return
    write_arrays(data, work / "few", IMAGES, keep=128 * STEPS)
    write_arrays(data, work / "data", IMAGES)


def write_arrays(data: Path, out: Path, images: int | None, keep: int | None = None) -> None:
    """The first `images` training images of a seeded permutation (None: all), in the order of the data, and all test
    images, as arrays; or of the training images the first `keep` alone."""
    spec = InputSpec((3, 32, 32), (0.0,), (1.0,))
    task = TaskSpec("cross_entropy", 10, 0.0, ())
    train, test = (open_dataset(data, split, spec, task) for split in ("train", "test"))
    chosen = np.sort(permutation(len(train), 0, 0)[:images])[:keep]
    with staging(out) as folder:
        np.save(folder / "x_train.npy", np.concatenate([train.read(part) for part in np.array_split(chosen, 20)]))
        np.save(folder / "y_train.npy", train.labels[chosen])
        if keep is None:
            everything = np.arange(len(test))
            np.save(folder / "x_test.npy", np.concatenate([test.read(p) for p in np.array_split(everything, 20)]))
            np.save(folder / "y_test.npy", test.labels)


def bundle(name: str, seed: int, options: argparse.Namespace) -> Path:
    """The exported candidate."""
    out: Path = options.work / f"{name.replace(' ', '-')}-{seed}" / "bundle"
    if not out.is_dir():
        edgelocal("export", options.network, str(out), *CANDIDATES[name], "--seed", str(seed))
    return out


def learn(name: str, seed: int, options: argparse.Namespace) -> dict[str, Any]:
    """Train a candidate to the end; what is already done is not done again."""
    place = bundle(name, seed, options)
    run = place.parent / "run"
    if not (run / "report.json").is_file():
        print(f"training {name}, seed {seed}", file=sys.stderr, flush=True)
        edgelocal(
            *("train", str(place), "--data", str(options.work / "data"), "--out", str(run), "--warmup-epochs", "1"),
            *("--val-every", "0"),
            *("--epochs", str(options.epochs), "--batch", str(options.batch), "--lr", str(options.lr)),
            *("--seed", str(seed)),
        )
    found = json.loads((run / "run.json").read_text())["config"]
    wanted = {"epochs": options.epochs, "batch": options.batch, "lr": options.lr, "seed": seed, "warmup_epochs": 1}
    other = {key: found[key] for key, value in wanted.items() if found[key] != value}
    report = json.loads((run / "report.json").read_text())
    if other or report["network"] != options.network:
        sys.exit(f"{run} was trained with {other or report['network']}; give another WORK folder, or these settings")
    return {
        "seed": seed,
        "test": report["validation"]["accuracy"],
        "train": report["blocks"][-1]["training"]["accuracy"],
    }


def measure(options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Peak bytes and seconds a step of every candidate and of PyTorch, medians of interleaved rounds."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in ("torch bp", *CANDIDATES)}
    for number in range(options.rounds):
        for name, rounds in found.items():
            rounds.append(torch_steps(options) if name == "torch bp" else our_steps(name, number, options))
    return {
        name: {key: statistics.median(r[key] for r in rounds) for key in rounds[0]} for name, rounds in found.items()
    }


def our_steps(name: str, number: int, options: argparse.Namespace) -> dict[str, float]:
    """A few steps of `edgelocal train`."""
    place = bundle(name, 0, options)
    run = place.parent / f"steps-{number}"
    if run.is_dir():
        for path in sorted(run.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
    report = edgelocal(
        *("train", str(place), "--data", str(options.work / "few"), "--out", str(run), "--no-augment"),
        *("--epochs", "2", "--batch", str(options.batch), "--lr", "0.01", "--lr-schedule", "constant"),
    )
    seconds = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["seconds"]
    return {"peak_bytes": report["process_peak_bytes"], "step_s": seconds / STEPS}  # of the second epoch, all loaded


def torch_steps(options: argparse.Namespace) -> dict[str, float]:
    """The same steps in eager PyTorch, in a process of its own."""
    code = TORCH_STEPS.format(
        network=options.network, data=options.work / "few", batch=options.batch, threads=describe().cores
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    result: dict[str, float] = json.loads(done.stdout)
    return result


TORCH_STEPS = """
import json, time
import numpy as np, torch
from edgelocal.machine.budget import peak_rss_bytes
from edgelocal.exporters.units import load_network
torch.set_num_threads({threads})
module = load_network({network!r}, (3, 32, 32), 10, 0).module.train()
optimizer = torch.optim.SGD(module.parameters(), lr=0.01, momentum=0.9, weight_decay=1e-4, nesterov=True)
x = np.load("{data}/x_train.npy", mmap_mode="r")
y = np.load("{data}/y_train.npy")
seconds = []
for first in 2 * list(range(0, len(x), {batch})):
    started = time.perf_counter()
    images = torch.from_numpy(x[first : first + {batch}].astype(np.float32) / 255 - 0.5)
    loss = torch.nn.functional.cross_entropy(module(images), torch.from_numpy(y[first : first + {batch}]))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    seconds.append(time.perf_counter() - started)
print(json.dumps({{"peak_bytes": peak_rss_bytes(), "step_s": 2 * sum(seconds[len(seconds) // 2 :]) / len(seconds)}}))
"""


def edgelocal(*arguments: str) -> dict[str, Any]:
    """Run a command and return its JSON."""
    done = subprocess.run(
        [sys.executable, "-m", "edgelocal", *arguments, "--json"], stdout=subprocess.PIPE, text=True, check=True
    )
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def table(result: dict[str, Any]) -> str:
    """A Markdown table, a row a candidate."""
    base = result["costs"]["torch bp"]
    lines = [
        "| | test accuracy (mean; each seed) | process peak | of PyTorch | s a step | of PyTorch |",
        "|---|---|---|---|---|---|",
    ]
    for name, cost in result["costs"].items():
        runs = [100 * r["test"] for r in result["accuracy"].get(name, [])]
        shown = f"{statistics.mean(runs):.2f} % ({', '.join(f'{r:.2f}' for r in runs)})" if runs else "not trained"
        memory, seconds = cost["peak_bytes"], cost["step_s"]
        lines.append(
            f"| {name} | {shown} | {format_size(int(memory))} | {memory / base['peak_bytes']:.2f} "
            f"| {seconds:.2f} | {seconds / base['step_s']:.2f} |"
        )
    return "\n".join(lines)


def write_page(path: Path, text: str) -> None:
    """Replace the page but for its section of trainings on a GPU, which learning_full.py writes."""
    kept = section(path.read_text(), GPU_SECTION) if path.is_file() else None
    path.write_text(text if kept is None else with_section(text, GPU_SECTION, kept))


PAGE = """# Learning: what local learning costs and gains

{network}, {images:,} training images and all 10,000 test images of CIFAR-10, {epochs} epochs, batch {batch}, SGD with
Nesterov momentum 0.9, weight decay 1e-4, learning rate {lr} with one epoch of warm-up and a cosine to zero; the same
for every row; seeds {listed}. `torch bp` is eager PyTorch; the other rows run on ONNX Runtime, each in a process
without PyTorch. Memory is the peak of the whole process; time is that of a training step of a batch, reading and
normalising it included: medians of interleaved rounds on {machine}.

{table}

    python benchmarks/learning.py CIFAR10 WORK --epochs {epochs} --seeds {listed} --write docs/learning.md

{remarks}
"""

# What the figures of the committed page mean; a page of other settings is written without them.
REMARKS = """The images are JPEG-compressed copies of the originals, so accuracies can differ slightly from those on the
raw pixels. It is a short training on a fifth of the data; published accuracies are after 400 epochs on all of it.

AugLocal stays close to backpropagation, the closer the fewer the blocks; a linear auxiliary is far behind. Its exits
show why: the exit behind the first block classifies 30 % of the images, because a linear classifier asks early layers
for features that only late ones can have, and what they learn for it does not serve the blocks behind them.

That 14 blocks need more memory than 4 is the sum of what a process keeps loaded (14 sessions and their states) and of
an arena that is shared but not yet planned for; the working set of a single block is smaller."""


def page(result: dict[str, Any]) -> str:
    """docs/learning.md."""
    listed = ",".join(str(s) for s in result["seeds"])
    remarks = REMARKS if (result["network"], result["epochs"]) == ("resnet32", 6) else ""
    values = {k: v for k, v in result.items() if k != "seeds"}
    return PAGE.format(listed=listed, table=table(result), remarks=remarks, **values).rstrip() + "\n"


if __name__ == "__main__":
    main()
