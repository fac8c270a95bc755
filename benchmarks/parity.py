"""Step graphs in ONNX Runtime against eager PyTorch: the same training, the same numbers, how far apart?

    python benchmarks/parity.py [--steps 20] [--networks resnet20,vit] [--optimizers adamw] [--json] [--write]

Every case trains with the same weights and batches three times: through the exported step graphs (float32), in eager
PyTorch in float32, and in eager PyTorch in float64, which is taken for the truth. Errors are relative, and those of
both float32 programs are given: two correct programs part by as much as either parts from the truth.

One step, several times, all three from the same state:
    gradients   ||a - b|| / ||b|| over the optimizer's slots of all parameters (momentum; m and v): of those steps the
                best, as one ReLU whose input is within rounding of zero turns a step's gradient by some 1e-3, while a
                wrong formula shows in every step
All steps, each program on its own:
    loss        largest |a - b| / |b| over all steps and blocks
    parameters  largest ||a - b|| / ||b|| of a tensor (parameters, running statistics) after the last step; a tensor
                smaller than 1e-4 (root mean square) counts as of that size, as it is rounding around zero
    movement    ||da - db|| / ||db|| of all parameters together, d being the way since the start
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch

from edgelocal.exporters import zoo
from edgelocal.exporters.onnx_step import ExportedGraph, step_graph
from edgelocal.exporters.optimizers import Optimizer, adamw, sgd
from edgelocal.exporters.oracle import Oracle
from edgelocal.exporters.partition import partition
from edgelocal.exporters.rules import LocalBlock, build_blocks
from edgelocal.exporters.units import load_network
from edgelocal.spec import RuleSpec, TaskSpec

Array = np.ndarray[Any, Any]
Arrays = dict[str, Array]
Sample = tuple[Array, Array]

PAGE = Path(__file__).parent.parent / "docs" / "parity.md"
TASK = TaskSpec("cross_entropy", 10, 0.0, ())
SHAPE, BATCH = (3, 32, 32), 8

# Name -> optimizer and a learning rate at which 20 steps from a fresh start do not diverge.
SLOTS = {"momentum": "momentum_buffer", "m": "exp_avg", "v": "exp_avg_sq"}  # our names, and PyTorch's
SINGLE_STEPS = 4

OPTIMIZERS: dict[str, tuple[Callable[[], Optimizer], float]] = {
    "sgd nesterov": (lambda: sgd(0.9, 5e-4, nesterov=True), 0.002),
    "sgd momentum": (lambda: sgd(0.9, 1e-4, nesterov=False), 0.002),
    "sgd": (lambda: sgd(0.0, 0.0, nesterov=False), 0.01),
    "adamw": (adamw, 1e-4),
}


@dataclass(frozen=True)
class Case:
    """`blocks` 1 is rule bp, more is auglocal of depth 1."""

    network: str
    optimizer: str
    blocks: int


@dataclass(frozen=True)
class Errors:
    """Relative errors against float64."""

    gradients: float
    loss: float
    parameters: float
    movement: float


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    case: Case
    steps: int
    graph: Errors
    eager: Errors
    seconds: float


@dataclass(frozen=True)
class Outcome:
    """Losses (steps, blocks), parameters at the start, and parameters and running statistics at the end."""

    losses: Array
    start: Arrays
    end: Arrays


class Graphs:
    """Blocks trained through their step graphs."""

    def __init__(self, blocks: Sequence[LocalBlock], optimizer: Optimizer, shape: Sequence[int]) -> None:
        self.optimizer = optimizer
        self.graphs: list[ExportedGraph] = []
        for block in blocks:
            self.graphs.append(step_graph(block, TASK, optimizer, tuple(shape), torch.float32))
            shape = [int(d) for d in self.graphs[-1].output("h").shape[1:]]
        self.sessions = [session(graph.model.SerializeToString()) for graph in self.graphs]
        self.state = [initial(block, graph) for block, graph in zip(blocks, self.graphs, strict=True)]

    def step(self, x: Array, y: Array, lr: float) -> list[Arrays]:
        """One training step; the outputs of every block."""
        results = []
        for k in range(len(self.graphs)):
            results.append(self.run(k, x, y, lr))
            x = results[-1]["h"]
            self.state[k] = {name: results[-1][f"new/{name}"] for name in self.state[k]}
        return results

    def run(self, k: int, x: Array, y: Array, lr: float) -> Arrays:
        """The step graph of block `k` on its present state, which stays as it is."""
        hyper = {"lr": lr, **self.optimizer.hyper}
        feeds = {"x": x, "y": y, **{name: np.asarray(v, np.float32) for name, v in hyper.items()}, **self.state[k]}
        values = self.sessions[k].run(None, feeds)
        return dict(zip([t.name for t in self.graphs[k].outputs], values, strict=True))


def session(model: bytes) -> onnxruntime.InferenceSession:
    """One thread, no memory pattern, as on a device."""
    options = onnxruntime.SessionOptions()
    options.enable_mem_pattern = False
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def initial(block: LocalBlock, graph: ExportedGraph) -> Arrays:
    """What the step graph of an untrained block is fed: its tensors, and zeros for the optimizer."""
    local = {name: key for key, name in block.tensor_names().items()}
    tensors = block.state_dict()
    state = {}
    for spec in graph.inputs:
        if spec.kind in ("param", "buf"):
            state[spec.name] = tensors[local[spec.name.partition("/")[2]]].numpy().copy()
        elif spec.kind == "opt":
            state[spec.name] = np.zeros(spec.resolve(1), dtype=spec.dtype)
    return state


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


def by_graphs(graphs: Graphs, data: Iterable[Sample], lr: float) -> Outcome:
    """Train through step graphs from their present state."""
    start = named(graphs.state, ("param",))
    losses = [[out["loss"] for out in graphs.step(x, y, lr)] for x, y in data]
    return Outcome(np.asarray(losses, np.float64), start, named(graphs.state, ("param", "buf")))


def by_eager(
    blocks: Sequence[LocalBlock], optimizer: Optimizer, data: Iterable[Sample], lr: float, dtype: torch.dtype
) -> Outcome:
    """Train a copy in eager PyTorch."""
    oracle = Oracle(copy.deepcopy(list(blocks)), TASK, optimizer.reference, dtype)
    start = {name: array for name, array in eager_state(oracle).items() if name.startswith("param/")}
    losses = [eager_step(oracle, x, y, lr) for x, y in data]
    return Outcome(np.asarray(losses), start, eager_state(oracle))


def eager_step(oracle: Oracle, x: Array, y: Array, lr: float) -> list[float]:
    """The losses of one step."""
    return [float(loss) for loss, _ in oracle.step(torch.from_numpy(x), torch.from_numpy(y), lr)]


def single_steps(
    blocks: Sequence[LocalBlock], graphs: Graphs, data: Iterable[Sample], lr: float
) -> tuple[list[float], list[float]]:
    """Errors of the gradients of the step graphs and of eager float32, step by step from the state of the truth."""
    make = graphs.optimizer.reference
    truth = Oracle(copy.deepcopy(list(blocks)), TASK, make, torch.float64)
    single = Oracle(copy.deepcopy(list(blocks)), TASK, make, torch.float32)
    found: tuple[list[float], list[float]] = ([], [])
    for x, y in data:
        share(truth, single, graphs)
        for oracle in (truth, single):
            eager_step(oracle, x, y, lr)
        graphs.step(x, y, lr)
        expected = slots(truth, graphs.optimizer)
        found[0].append(apart(named(graphs.state, ("opt",)), expected))
        found[1].append(apart(slots(single, graphs.optimizer), expected))
    return found


def share(truth: Oracle, single: Oracle, graphs: Graphs) -> None:
    """Round the state of the truth to float32, so that all can hold it, and give it to the others."""
    for block, other, optimizer, follower in zip(
        truth.blocks, single.blocks, truth.optimizers, single.optimizers, strict=True
    ):
        kept = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
        with torch.no_grad():
            for tensor in (*block.state_dict().values(), *kept):
                tensor.copy_(tensor.to(torch.float32) if tensor.is_floating_point() else tensor)
        other.load_state_dict(block.state_dict())
        follower.load_state_dict(optimizer.state_dict())
    values = {**eager_state(truth), **slots(truth, graphs.optimizer)}
    steps = max((float(s["step"]) for o in truth.optimizers for s in o.state.values() if "step" in s), default=0.0)
    for state in graphs.state:
        state.update({name: values[name].astype(np.float32) for name in state if name in values})
        state.update({name: np.asarray(steps, np.float32) for name in state if name == "opt/step"})


def slots(oracle: Oracle, optimizer: Optimizer) -> Arrays:
    """The optimizer's tensors under their names in the step graphs; without momentum the gradient is its slot."""
    found: Arrays = {}
    for block, own in zip(oracle.blocks, oracle.optimizers, strict=True):
        names = block.tensor_names()
        for local, parameter in block.named_parameters():
            for slot in optimizer.slots:
                value = own.state[parameter].get(SLOTS[slot], parameter.grad)
                value = torch.zeros_like(parameter) if value is None else value
                found[f"opt/{slot}/{names[local]}"] = value.detach().double().numpy().copy()
    return found


def apart(found: Mapping[str, Array], expected: Mapping[str, Array]) -> float:
    """||a - b|| / ||b|| over all tensors of `expected`; of several slots the worst."""
    groups: dict[str, list[str]] = {}
    for name in expected:
        groups.setdefault("/".join(name.split("/")[:2]) if name.startswith("opt/") else "", []).append(name)
    ratios = []
    for names in groups.values():
        difference = sum(float(np.sum((found[n] - expected[n]) ** 2)) for n in names)
        ratios.append((difference / sum(float(np.sum(expected[n] ** 2)) for n in names)) ** 0.5)
    return max(ratios)


def eager_state(oracle: Oracle) -> Arrays:
    """Parameters and floating buffers by their names in the step graphs, float64."""
    state = {}
    for block in oracle.blocks:
        trained = dict(block.named_parameters())
        for local, name in block.tensor_names().items():
            tensor = block.state_dict()[local]
            if tensor.is_floating_point():
                state[f"{'param' if local in trained else 'buf'}/{name}"] = tensor.double().numpy().copy()
    return state


def named(states: Iterable[Mapping[str, Array]], kinds: tuple[str, ...]) -> Arrays:
    """The floating tensors of these kinds, float64."""
    return {
        name: array.astype(np.float64)
        for state in states
        for name, array in state.items()
        if name.partition("/")[0] in kinds and array.dtype == np.float32
    }


def errors(found: Outcome, truth: Outcome, gradients: Sequence[float]) -> Errors:
    """See the module."""
    if found.end.keys() != truth.end.keys():
        raise ValueError(f"different tensors: {sorted(found.end.keys() ^ truth.end.keys())}")
    norm = np.linalg.norm
    tensors = [norm(found.end[n] - b) / max(norm(b), 1e-4 * b.size**0.5) for n, b in truth.end.items()]
    ways = [{n: run.end[n] - start for n, start in run.start.items()} for run in (found, truth)]
    losses = np.abs(found.losses - truth.losses) / np.abs(truth.losses)
    return Errors(min(gradients), float(losses.max()), float(max(tensors)), apart(*ways))


def measure(case: Case, steps: int) -> Row:
    """One line of the table."""
    began = time.perf_counter()
    make, lr = OPTIMIZERS[case.optimizer]
    blocks, data = make_blocks(case.network, case.blocks), batches(steps)
    graphs = Graphs(blocks, make(), SHAPE)
    truth = by_eager(blocks, make(), data, lr, torch.float64)
    runs = by_graphs(graphs, data, lr), by_eager(blocks, make(), data, lr, torch.float32)
    gradients = single_steps(blocks, graphs, data[:SINGLE_STEPS], lr)
    graph, eager = (errors(run, truth, own) for run, own in zip(runs, gradients, strict=True))
    return Row(case, steps, graph, eager, time.perf_counter() - began)


def cases(networks: Sequence[str], optimizers: Sequence[str]) -> list[Case]:
    """Every network with every optimizer in three blocks, and with the first one as one block."""
    return [
        Case(network, optimizer, blocks)
        for network in networks
        for optimizer in optimizers
        for blocks in ((3, 1) if optimizer == optimizers[0] else (3,))
    ]


def table(rows: Sequence[Row]) -> str:
    """Rows as Markdown."""
    names = "gradients | loss | parameters | movement"
    lines = [f"| network | optimizer | blocks | {names} | eager: {names} | s |", "|---|---|" + "--:|" * 10]
    for row in rows:
        figures = [f"{e:.1e}" for e in (*asdict(row.graph).values(), *asdict(row.eager).values())]
        cells = [row.case.network, row.case.optimizer, str(row.case.blocks), *figures, f"{row.seconds:.0f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def page(rows: Sequence[Row], steps: int, command: str) -> str:
    """docs/parity.md."""
    versions = f"torch {torch.__version__}, onnxruntime {onnxruntime.__version__}, Python {platform.python_version()}"
    gradient, loss = (max(rows, key=lambda r: getattr(r.graph, key)) for key in ("gradients", "loss"))
    return f"""# Step graphs against eager PyTorch

Every network of the zoo, trained {steps} steps on batches of {BATCH} random images of {"x".join(map(str, SHAPE))} from
the same weights: through its exported step graphs in ONNX Runtime (float32), and in eager PyTorch in float32. All
errors are relative, against eager PyTorch in float64. The right half is eager PyTorch's own error in float32: training
amplifies rounding, and no float32 program can be expected to do better. Deep networks on such small images end in maps
of one pixel, where batch norm divides by the deviation of {BATCH} values: there both programs are far from float64
after a few steps, and only the gradients of single steps can be compared.

- gradients: of {SINGLE_STEPS} single steps, each from one common state, the error of the optimizer's slots (momentum;
  m and v) over all parameters; the best of the steps, because a ReLU whose input is within rounding of zero turns a
  gradient by some 1e-3, while a wrong formula shows in every step
- loss: largest error over {steps} steps and all blocks, each program on its own
- parameters: largest error of a tensor (parameters, running statistics; norm against norm) after the last step
- movement: error of the way that all parameters together have gone since the start

Largest error of a gradient: {gradient.graph.gradients:.1e} ({label(gradient.case)}; eager float32:
{gradient.eager.gradients:.1e}). Largest error of a loss: {loss.graph.loss:.1e} ({label(loss.case)}; eager float32:
{loss.eager.loss:.1e}).

{table(rows)}

Three blocks are rule auglocal of depth 1, one block is rule bp. Written by `{command}` on {platform.machine()}
with one thread; {versions}.
"""


def label(case: Case) -> str:
    """A case in words."""
    return f"{case.network}, {case.optimizer}, {case.blocks} block{'s' if case.blocks > 1 else ''}"


def main() -> None:
    """Measure, print, and with --write replace the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else "")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--networks", default=",".join(zoo.names()))
    parser.add_argument("--optimizers", default=",".join(OPTIMIZERS))
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of the table")
    parser.add_argument("--write", action="store_true", help=f"write docs/{PAGE.name}")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = []
    for case in cases(arguments.networks.split(","), arguments.optimizers.split(",")):
        rows.append(measure(case, arguments.steps))
        print(table(rows).splitlines()[-1], file=sys.stderr, flush=True)
    if arguments.write:
        PAGE.write_text(page(rows, arguments.steps, "python benchmarks/parity.py " + " ".join(sys.argv[1:])))
    print(json.dumps({"rows": [asdict(row) for row in rows]}) if arguments.json else table(rows))


if __name__ == "__main__":
    main()
