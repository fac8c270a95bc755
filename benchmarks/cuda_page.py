"""docs/cuda.md out of the result file (cuda_result.py): goals, tables, and what has not been measured. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgelocal.exporters.bench.result import Measurement
from edgelocal.exporters.bench.rounds import Figures

Result = dict[str, Any]
MIB = 1 << 20

TORCH = "PyTorch"
COMPILED = "PyTorch, torch.compile"
CHECKPOINTED = "PyTorch, best checkpointing"
LOCAL = "PyTorch, the same blocks"
OWN_BP = "edgelocal, bp"
OWN_UNITS = "edgelocal, a block for every unit"
OWN_PARTITION = "edgelocal, searched partition"
PRECISIONS = ("tf32", "bf16")
IN_PRECISIONS = (TORCH, LOCAL, OWN_BP, OWN_UNITS)  # what is measured in these, too

NOT_YET = "Not measured yet."


def in_precision(name: str, precision: str) -> str:
    """The name of a variant in another precision than float32."""
    return f"{name}, {precision}"


@dataclass(frozen=True)
class Goal:
    """Something to reach: `found` at most `limit`; None: not measured."""

    what: str
    limit: float
    found: float | None

    def row(self) -> str:
        """A row of the table."""
        if self.found is None:
            return f"| {self.what} | <= {self.limit:g} | | not measured |"
        verdict = "reached" if self.found <= self.limit else "**not reached**"
        return f"| {self.what} | <= {self.limit:g} | {self.found:.3f} | {verdict} |"


def goals(result: Result) -> list[Goal]:
    """What the project set out to reach on a GPU."""
    found = [
        Goal(
            f"{network}, batch 1024: memory of a block for every unit, of PyTorch's", limit, _memory_share(result, case)
        )
        for network, limit in (("ResNet-32", 0.20), ("ResNet-110", 0.06))
        for case in [f"{network.replace('-', '').lower()}, batch 1024"]
    ]
    for case in result.get("speed", {}) or ("every case",):
        found.append(Goal(f"{case}: time of a step, of PyTorch's on the same blocks", 1.2, _time_share(result, case)))
    return [*found, Goal("ResNet-110, auglocal d = 6: points of accuracy below bp", 1.0, _points(result))]


def _figures(result: Result, case: str) -> Figures:
    figures = Figures(lambda text: None)
    if case in result.get("speed", {}):
        known = result["speed"][case]
        figures.learn({"rounds": known["rounds"], "skipped": known["skipped"]})
    return figures


def _memory_share(result: Result, case: str) -> float | None:
    """All that we take but the context, of what PyTorch's allocator gave out at most."""
    found = _figures(result, case).results()
    if not {TORCH, OWN_UNITS} <= found.keys():
        return None
    return found[OWN_UNITS].working_set_bytes / found[TORCH].working_set_bytes


def _time_share(result: Result, case: str) -> float | None:
    figures = _figures(result, case)
    return figures.time_ratio(OWN_UNITS, LOCAL) if {LOCAL, OWN_UNITS} <= figures.results().keys() else None


def _points(result: Result) -> float | None:
    runs = result.get("learning", {}).get("resnet110", {})
    own, bp = runs.get("auglocal per-unit, d = 6"), runs.get("bp")
    # Of the same number of epochs, and both at the end; else there is nothing to compare.
    if own is None or bp is None or own["epochs"] != bp["epochs"] or not (own["done"] and bp["done"]):
        return None
    return float(100 * (bp["test"] - own["test"]))


def speed(result: Result) -> str:
    """A table a case."""
    return "\n\n".join(_case(result, case) for case in result.get("speed", {})) or NOT_YET


def _case(result: Result, case: str) -> str:
    figures = _figures(result, case)
    found, setting = figures.results(), result["speed"][case]["setting"]
    names = "working set, MiB | of PyTorch's | held by the allocator, MiB | process, MiB | context, MiB"
    lines = [
        f"**{case}**, {setting['input']}, {max(map(len, figures.times().values()), default=0)} rounds of "
        f"{setting['steps']} steps",
        "",
        f"| | {names} | ms a step | of PyTorch's |",
        "|---|" + "--:|" * 7,
        *(_row(name, one, found.get(TORCH), figures) for name, one in found.items()),
    ]
    skipped = [f"\n{one['name']}: {' '.join(one['why'].split())[:300]}" for one in figures.skipped]
    return "\n".join([*lines, *skipped])


def _row(name: str, own: Measurement, base: Measurement | None, figures: Figures) -> str:
    held = "" if own.reserved_bytes is None else f"{own.reserved_bytes / MIB:.0f}"
    share = f"{own.working_set_bytes / base.working_set_bytes:.3f}" if base else ""
    ratio = f"{figures.time_ratio(name, TORCH):.2f}" if base else ""
    label = f"{name} ({own.segments} segments)" if own.segments else name
    cells = (
        *(label, f"{own.working_set_bytes / MIB:.0f}", share, held),
        *(f"{own.process_peak_bytes / MIB:.0f}", f"{own.idle_bytes / MIB:.0f}"),
        *(f"{1000 * own.time_per_sample_s * own.batch:.1f}", ratio),
    )
    return "| " + " | ".join(cells) + " |"


def parity(result: Result) -> str:
    """The largest errors in each precision, and all rows of float32."""
    found = result.get("parity", {})
    if not found:
        return NOT_YET
    lines = ["| | golden bundle, 20 steps: loss | loss | gradients | state | cases |", "|---|" + "--:|" * 5]
    for precision, kept in found.items():
        rows = [row for name, row in kept.items() if name != "golden"]
        worst = [
            max((row["graph"][key] for row in rows), default=float("nan")) for key in ("loss", "gradients", "state")
        ]
        lines.append(f"| {precision} | {_golden(kept)} | {' | '.join(f'{v:.1e}' for v in worst)} | {len(rows)} |")
    return "\n".join([*lines, "", *_parity_rows(found)])


def _golden(kept: Result) -> str:
    return f"{kept['golden']:.1e}" if "golden" in kept else ""


def _parity_rows(found: Result) -> list[str]:
    lines = ["| network | optimizer | blocks | precision | loss | gradients | worst | state | eager: loss | state |"]
    lines.append("|---|---|--:|---|" + "--:|" * 6)
    for precision, kept in found.items():
        for name, row in kept.items():
            if name != "golden":
                own, eager, case = row["graph"], row["eager"], row["case"]
                figures = [own[key] for key in ("loss", "gradients", "worst_gradients", "state")]
                figures += [eager["loss"], eager["state"]]
                cells = [case["network"], case["optimizer"], str(case["blocks"]), precision]
                lines.append("| " + " | ".join([*cells, *(f"{value:.1e}" for value in figures)]) + " |")
    return lines


def machine(result: Result) -> str:
    """Which machine, in a sentence."""
    if not result:
        return (
            "**Nothing on this page has been run on a GPU yet.** What follows says what will be measured and how; no "
            "figure here is estimated."
        )
    found = result["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in found["packages"].items())
    driver = f", driver {found['driver']}, {found['memory']}" if "driver" in found else ""
    rehearsal = "" if found["device"] == "cuda" else " **A rehearsal on the CPU: no figure here is of a GPU.**"
    return (
        f"Measured on {found['name']}{driver}, host {found['host']}; Python {found['python']}, {versions}.{rehearsal}"
    )


def page(result: Result) -> str:
    """docs/cuda.md."""
    reached = "\n".join(goal.row() for goal in goals(result))
    gradients = result.get("gradients", {}).get("markdown", NOT_YET)
    return TEMPLATE.format(
        machine=machine(result),
        goals=f"| goal | limit | found | |\n|---|--:|--:|---|\n{reached}",
        parity=parity(result),
        speed=speed(result),
        gradients=gradients,
    )


TEMPLATE = """\
# On an NVIDIA GPU

{machine}

    make gpu CIFAR=cifar10.zip     # all of it, in .venv-gpu; or with GPU_PYTHON=python3, if it has all packages
    make gpu-suite                 # training on CUDA, whole and in parts; without a GPU it fails
    make gpu-runtime               # the device suite on the CPU of the same runtime
    make gpu-parity                # step graphs against eager PyTorch in float64; gpu-parity-tf32, gpu-parity-bf16
    make gpu-gradients             # forms of the gradients (benchmarks/cuda_gradients.py)
    make gpu-bench                 # memory and time (benchmarks/cuda.py)
    make gpu-learning CIFAR=...    # all of CIFAR-10 (benchmarks/learning_full.py); the table is in learning.md

Every stage keeps what it measured in `out/cuda/result.json` and goes on from there when it is called again, so that a
GPU can be had for minutes at a time (`MINUTES=8` a call). This page is drawn from that file by
`python benchmarks/cuda.py --write`. `make gpu-prepare` exports all bundles beforehand and needs no GPU. Another Python
needs PyTorch, onnx, onnxruntime-gpu and the packages of the extras `export`, `image` and `test`; the exports
were only tried with PyTorch 2.13. CI has no GPU: there the same tests run with the CPU as the device, and what only a
GPU can show is skipped, with its reason.

## Goals

{goals}

Memory: all that our process takes of the device but the context, in which libraries are loaded and have worked once,
against what PyTorch's allocator had given out at most once it was warm. Ours train with `--memory-budget auto`.

## Parity

{parity}

Relative errors against eager PyTorch in float64 on the CPU, as in [parity](parity.md); TF32 rounds the factors of
products and convolutions to 11 significant bits, bf16 (`export --precision bfloat16`) those of products to 8.

## Memory and time

{speed}

- Working set: PyTorch's `max_memory_allocated` after the warm-up; ours all that the process takes but the context.
  Held by the allocator: PyTorch's `max_memory_reserved`, our arena. Process: all that it takes of the device, by NVML,
  or without that what the device became fuller by. Context: PyTorch's with one tensor there; ours with the libraries
  loaded and one convolution and product done.
- PyTorch: eager back-propagation, SGD with Nesterov momentum, `torch.backends.cudnn.benchmark` on. TF32 is off on both
  sides but in rows that say otherwise. Best checkpointing: the number of segments with the least working set.
- The same blocks: the blocks, auxiliary networks (d = 2) and losses that `edgelocal export` makes, in eager PyTorch,
  one block after the other, each freed before the next.
- Searched partition: found for half of what one block needs. Time: a step without reading data, median of the rounds;
  ratios are taken within a round.
- bf16: PyTorch's autocast, convolutions too; ours `export --precision bfloat16`, matrix products alone, since ONNX
  Runtime's CUDA provider has no convolution in bfloat16.

## Forms of the gradients

{gradients}
"""
