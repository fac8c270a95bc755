"""The same blocks trained by step graphs in ONNX Runtime and in eager PyTorch, from one state; what parity.py measures.

Errors are relative, norm against norm, to eager PyTorch in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnxruntime
import torch

from edgelocal.exporters.onnx_step import ExportedGraph, step_graph
from edgelocal.exporters.optimizers import Optimizer
from edgelocal.exporters.oracle import Oracle
from edgelocal.exporters.rules import LocalBlock
from edgelocal.spec import TaskSpec

Array = np.ndarray[Any, Any]
Arrays = dict[str, Array]
Sample = tuple[Array, Array]

TASK = TaskSpec("cross_entropy", 10, 0.0, ())
SLOTS = {"momentum": "momentum_buffer", "m": "exp_avg", "v": "exp_avg_sq"}  # our names, and PyTorch's


@dataclass(frozen=True)
class Errors:
    """Relative errors against float64."""

    gradients: float
    loss: float
    parameters: float
    movement: float


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
    return float(max(ratios))


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
