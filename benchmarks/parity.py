"""Step graphs in ONNX Runtime against eager PyTorch: the same training, the same numbers, how far apart?

    python benchmarks/parity.py [--steps 20] [--networks resnet20,vit] [--optimizers adamw] [--json] [--write]
    python benchmarks/parity.py --device cuda [--tf32 | --bf16] --result out/cuda/result.json

Every case trains in eager PyTorch in float64, which is taken for the truth. Before every step the same state is given
to the exported step graphs (float32) and to eager PyTorch in float32, and all three do the step on the same batch.
Errors are relative:

    loss        largest |a - b| / |b| over all steps and blocks
    gradients   ||a - b|| / ||b|| over the optimizer's slots of all parameters (momentum; m and v), median step and
                worst step. One ReLU whose input is within rounding of zero turns a step's gradient by some 1e-3; a
                wrong formula shows in every step
    state       largest ||a - b|| / ||b|| of a tensor (parameters, running statistics) after a step
    on its own  largest error of a loss when the program is never given the state of the truth. Training amplifies
                rounding: two correct programs part by as much as either parts from the truth

PyTorch stays on the CPU whatever the graphs run on. With --result every row is kept in that file as soon as it is
measured and is not measured again, and the golden bundle is trained too, 20 steps through the device side itself;
`benchmarks/cuda.py --write` draws the page of a GPU from that file.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import cuda_result
import numpy as np
import onnxruntime
import torch
from on_device import DEVICES, golden_error, make_provider
from parity_training import TASK, Errors, Export, Graphs, Sample, compare

from edgelocal.bundle.spec import RuleSpec, TaskSpec
from edgelocal.exporters import zoo
from edgelocal.exporters.bfloat16 import in_bfloat16
from edgelocal.exporters.forms import FORMS
from edgelocal.exporters.onnx_block import ExportedGraph
from edgelocal.exporters.onnx_step import step_graph
from edgelocal.exporters.optimizers import Optimizer, adamw, sgd
from edgelocal.exporters.partition import partition
from edgelocal.exporters.rules import LocalBlock, build_blocks
from edgelocal.exporters.units import load_network
from edgelocal.machine.device import describe
from edgelocal.runtime.provider import CPU, Provider

PAGE = Path(__file__).parent.parent / "docs" / "parity.md"
SHAPE, BATCH = (3, 32, 32), 8

# Name -> optimizer and a learning rate at which 20 steps from a fresh start do not diverge.
OPTIMIZERS: dict[str, tuple[Callable[[], Optimizer], float]] = {
    "sgd nesterov": (lambda: sgd(0.9, 5e-4, nesterov=True), 0.002),
    "sgd momentum": (lambda: sgd(0.9, 1e-4, nesterov=False), 0.002),
    "sgd": (lambda: sgd(0.0, 0.0, nesterov=False), 0.01),
    "adamw": (adamw, 1e-4),
}
# The variants of sgd differ in the update alone, which is the same for every network: three of them have all rows.
VARIANTS, VARIANTS_ON = ("sgd momentum", "sgd"), ("resnet20", "vit", "mlp")


@dataclass(frozen=True)
class Case:
    """`blocks` 1 is rule bp, more is auglocal of depth 1."""

    network: str
    optimizer: str
    blocks: int


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    case: Case
    steps: int
    graph: Errors
    eager: Errors
    seconds: float


def make_blocks(network: str, blocks: int, shape: tuple[int, ...] = SHAPE) -> tuple[LocalBlock, ...]:
    """The network, seed 0, in that many blocks."""
    made = load_network(network, shape, TASK.classes, seed=0)
    rule = RuleSpec("bp" if blocks == 1 else "auglocal", 1, 0.5, 1, "merge")
    cut = partition(made, blocks=blocks, rule=rule.name, depth=rule.depth, tail="merge")
    return build_blocks(made, rule, cut, seed=0)


def batches(steps: int, shape: tuple[int, ...] = SHAPE) -> list[Sample]:
    """The same random samples every time."""
    rng = np.random.default_rng(0)
    return [(rng.standard_normal((BATCH, *shape), dtype=np.float32), rng.integers(0, 10, BATCH)) for _ in range(steps)]


def graphs_for(device: str, bf16: bool) -> Export:
    """What exports step graphs in the forms of this device (exporters/forms.py), with matrix products in bfloat16."""

    def export(
        block: LocalBlock, task: TaskSpec, optimizer: Optimizer, shape: tuple[int, ...], dtype: torch.dtype
    ) -> ExportedGraph:
        found = step_graph(block, task, optimizer, shape, dtype, FORMS[device])
        return in_bfloat16(found) if bf16 else found

    return export


def measure(case: Case, steps: int, provider: Provider = CPU, export: Export = step_graph) -> Row:
    """One line of the table."""
    began = time.perf_counter()
    make, lr = OPTIMIZERS[case.optimizer]
    blocks = make_blocks(case.network, case.blocks)
    graphs = Graphs(blocks, make(), SHAPE, provider, BATCH, export)
    graph, eager = compare(blocks, graphs, batches(steps), lr)
    return Row(case, steps, graph, eager, time.perf_counter() - began)


def cases(networks: Sequence[str], optimizers: Sequence[str]) -> list[Case]:
    """Every network with every optimizer in three blocks, and with the first one as one block."""
    return [
        Case(network, optimizer, blocks)
        for network in networks
        for optimizer in optimizers
        if optimizer not in VARIANTS or network in VARIANTS_ON
        for blocks in ((3, 1) if optimizer == optimizers[0] else (3,))
    ]


def table(rows: Sequence[Row]) -> str:
    """Rows as Markdown."""
    names = "loss | gradients | worst | state | on its own"
    lines = [f"| network | optimizer | blocks | {names} | eager: {names} | s |", "|---|---|" + "--:|" * 12]
    for row in rows:
        figures = [f"{e:.1e}" for e in (*asdict(row.graph).values(), *asdict(row.eager).values())]
        cells = [row.case.network, row.case.optimizer, str(row.case.blocks), *figures, f"{row.seconds:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def page(rows: Sequence[Row], steps: int, command: str) -> str:
    """docs/parity.md."""
    versions = f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}, Python {platform.python_version()}"
    worst = {key: max(rows, key=lambda r: getattr(r.graph, key)) for key in ("loss", "gradients", "state")}
    largest = "; ".join(
        f"{key} {getattr(row.graph, key):.1e} ({label(row.case)}; eager float32: {getattr(row.eager, key):.1e})"
        for key, row in worst.items()
    )
    return f"""# Step graphs against eager PyTorch

Every network of the zoo, {steps} training steps on batches of {BATCH} random images of {"x".join(map(str, SHAPE))},
through its exported step graphs in ONNX Runtime (float32), beside eager PyTorch in float32; all errors are relative,
against eager PyTorch in float64. The state of float64 is given to both before every step, so that each step is compared
by itself along a whole training.

- loss: largest error over the steps and blocks
- gradients: error of the optimizer's slots (momentum; m and v) over all parameters, median of the steps; worst: the
  worst step. A ReLU whose input is within rounding of zero turns a gradient by some 1e-3, in any float32 program
- state: largest error of a tensor (parameters, running statistics) after a step; one smaller than 0.01 counts as of
  that size, because AdamW makes whole steps of gradients that are only rounding
- on its own: largest error of a loss when the program goes on from its own state for all {steps} steps. Training
  amplifies rounding, most in deep networks that end in maps of one pixel, where batch norm divides by the deviation of
  {BATCH} values; the right half shows that eager PyTorch's float32 parts from float64 as far

**Largest errors:** {largest}.

{table(rows)}

Three blocks are rule auglocal of depth 1, one block is rule bp. Written by `{command}` on {platform.machine()}
with one thread; {versions}.
"""


def label(case: Case) -> str:
    """A case in words."""
    return f"{case.network}, {case.optimizer}, {case.blocks} block{'s' if case.blocks > 1 else ''}"


def measure_kept(wanted: Sequence[Case], arguments: argparse.Namespace) -> list[Row]:
    """The rows of these cases on the device asked for, those that the result has not being measured now."""
    precision = "tf32" if arguments.tf32 else "bf16" if arguments.bf16 else "float32"
    kept = cuda_result.read(arguments.result, arguments.device).get("parity", {}).get(precision, {})
    provider, rows = make_provider(arguments.device, tf32=arguments.tf32), []
    if arguments.result and not arguments.bf16 and "golden" not in kept:  # the golden bundle is float32
        kept["golden"] = golden_error(provider)
        cuda_result.put(arguments.result, arguments.device, ("parity", precision), kept)
        print(f"20 golden steps: largest relative error of a loss {kept['golden']:.1e}", file=sys.stderr, flush=True)
    export = graphs_for(arguments.device, arguments.bf16)
    deadline = time.monotonic() + 60 * arguments.minutes if arguments.minutes else float("inf")
    for case in wanted:
        name = f"{label(case)}, {arguments.steps} steps"
        if name not in kept and time.monotonic() > deadline:
            print("the time is up: give the same command again, and it goes on from here", file=sys.stderr)
            break
        if name not in kept:
            kept[name] = asdict(measure(case, arguments.steps, provider, export))
            if arguments.result:
                cuda_result.put(arguments.result, arguments.device, ("parity", precision), kept)
        rows.append(as_row(kept[name]))
        print(table(rows).splitlines()[-1], file=sys.stderr, flush=True)
    return rows


def as_row(values: dict[str, Any]) -> Row:
    """A row out of its JSON."""
    return Row(
        Case(**values["case"]), values["steps"], Errors(**values["graph"]), Errors(**values["eager"]), values["seconds"]
    )


def main() -> None:
    """Measure, print, and with --write replace the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--networks", default=",".join(zoo.names()))
    parser.add_argument("--optimizers", default=",".join(OPTIMIZERS))
    parser.add_argument("--device", choices=DEVICES, default="cpu", help="of the step graphs")
    parser.add_argument("--tf32", action="store_true", help="let the GPU round products to 10 bits")
    parser.add_argument("--bf16", action="store_true", help="matrix products in bfloat16, on a GPU")
    parser.add_argument("--result", type=Path, help="keep rows in this file, and take those that are there")
    parser.add_argument("--minutes", type=float, default=0, help="begin no row after these; 0: no limit")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--write", action="store_true", help=f"write docs/{PAGE.name}")
    arguments = parser.parse_args()
    if arguments.write and arguments.device != "cpu":
        parser.error(
            f"docs/{PAGE.name} is of the CPU: give --result, and draw docs/cuda.md by benchmarks/cuda.py --write"
        )
    if arguments.device == "cpu" and (arguments.tf32 or arguments.bf16):
        parser.error("--tf32 and --bf16 are for GPUs: give --device cuda with them")
    # One thread, as bits depend on it; beside a GPU the CPU only computes what is taken for the truth.
    torch.set_num_threads(1 if arguments.device == "cpu" else describe().cores)
    wanted = cases(arguments.networks.split(","), arguments.optimizers.split(","))
    rows = measure_kept(wanted, arguments)
    if arguments.write:
        PAGE.write_text(page(rows, arguments.steps, "python benchmarks/parity.py " + " ".join(sys.argv[1:])))
    print(json.dumps({"rows": [asdict(row) for row in rows]}) if arguments.json else table(rows))


if __name__ == "__main__":
    main()
