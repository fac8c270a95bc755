"""The same blocks trained by step graphs in ONNX Runtime and in eager PyTorch, from one state; what parity.py measures.

Errors are relative, norm against norm, to eager PyTorch in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from edgelocal.bundle.spec import TaskSpec
from edgelocal.exporters.onnx_step import ExportedGraph, step_graph
from edgelocal.exporters.optimizers import Optimizer
from edgelocal.exporters.oracle import Oracle
from edgelocal.exporters.rules import LocalBlock
from edgelocal.runtime.provider import CPU, Provider

Array = np.ndarray[Any, Any]
Arrays = dict[str, Array]
Sample = tuple[Array, Array]
Export = Callable[[LocalBlock, TaskSpec, Optimizer, tuple[int, ...], torch.dtype], ExportedGraph]

TASK = TaskSpec("cross_entropy", 10, 0.0, ())
TINY = 1e-2  # a tensor smaller than this (root mean square) counts as of this size: AdamW moves noise by whole steps
SLOTS = {"momentum": "momentum_buffer", "m": "exp_avg", "v": "exp_avg_sq"}  # our names, and PyTorch's


@dataclass(frozen=True)
class Errors:
    """Relative errors of a float32 program against float64, see parity.py."""

    loss: float
    gradients: float
    worst_gradients: float
    state: float
    free_loss: float


class Graphs:
    """Blocks trained through their step graphs, in batches of `batch` samples where the provider wants them fixed.

    Sessions are those of the device side, one thread each; values come and go as arrays, wherever they are run.
    """

    def __init__(
        self,
        blocks: Sequence[LocalBlock],
        optimizer: Optimizer,
        shape: Sequence[int],
        provider: Provider = CPU,
        batch: int | None = None,
        export: Export = step_graph,
    ) -> None:
        self.optimizer = optimizer
        self.graphs: list[ExportedGraph] = []
        for block in blocks:
            self.graphs.append(export(block, TASK, optimizer, tuple(shape), torch.float32))
            shape = [int(d) for d in self.graphs[-1].output("h").shape[1:]]
        fixed = batch if provider.fixed_batch else None
        self.sessions = [provider.session(graph.model.SerializeToString(), 1, fixed) for graph in self.graphs]
        self.state = [initial(block, graph) for block, graph in zip(blocks, self.graphs, strict=True)]

    def step(self, x: Array, y: Array, lr: float) -> list[Arrays]:
        """One training step; the outputs of every block."""
        results = []
        for k in range(len(self.graphs)):
            results.append(self.run(k, x, y, lr))
            x = results[-1]["h"]
            self.state[k] = {name: results[-1][f"new/{name}"] for name in self.state[k]}
        return results

    def losses(self, x: Array, y: Array, lr: float) -> list[float]:
        """One training step; the losses of the blocks."""
        return [float(out["loss"]) for out in self.step(x, y, lr)]

    def twin(self) -> Graphs:
        """The same graphs in the same state, which from now on is the twin's own."""
        other = copy.copy(self)
        other.state = [dict(state) for state in self.state]
        return other

    def run(self, k: int, x: Array, y: Array, lr: float) -> Arrays:
        """The step graph of block `k` on its present state, which stays as it is."""
        hyper = {"lr": lr, **self.optimizer.hyper}
        feeds = {"x": x, "y": y, **{name: np.asarray(v, np.float32) for name, v in hyper.items()}, **self.state[k]}
        values = self.sessions[k].run(None, feeds)
        return dict(zip([t.name for t in self.graphs[k].outputs], values, strict=True))


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


def eager_step(oracle: Oracle, x: Array, y: Array, lr: float) -> list[float]:
    """The losses of one step."""
    return [float(loss) for loss, _ in oracle.step(torch.from_numpy(x), torch.from_numpy(y), lr)]


def compare(blocks: Sequence[LocalBlock], graphs: Graphs, data: Iterable[Sample], lr: float) -> tuple[Errors, Errors]:
    """Errors of the step graphs and of eager float32 while eager float64 trains on `data`.

    Before every step both are given the state of float64; copies of both go their own way from the start.
    """
    oracles = [Oracle(copy.deepcopy(list(blocks)), TASK, graphs.optimizer.reference, d) for d in PRECISIONS]
    truth, near, free = oracles
    programs = _Record(), _Record()
    free_graphs = graphs.twin()
    for x, y in data:
        share(truth, near, graphs)
        losses = eager_step(truth, x, y, lr)
        expected = Step(losses, eager_slots(truth, graphs.optimizer), eager_state(truth))
        found = graphs.losses(x, y, lr)
        step = Step(found, named(graphs.state, ("opt",)), named(graphs.state, ("param", "buf")))
        programs[0].add(step, expected, free_graphs.losses(x, y, lr))
        found = eager_step(near, x, y, lr)
        step = Step(found, eager_slots(near, graphs.optimizer), eager_state(near))
        programs[1].add(step, expected, eager_step(free, x, y, lr))
    return programs[0].errors(), programs[1].errors()


PRECISIONS = (torch.float64, torch.float32, torch.float32)


@dataclass(frozen=True)
class Step:
    """What a step left: the losses of the blocks, the optimizer's slots, parameters and running statistics."""

    losses: Sequence[float]
    slots: Arrays
    state: Arrays


class _Record:
    """Errors of a program step by step."""

    def __init__(self) -> None:
        self.rows: list[tuple[float, float, float, float]] = []

    def add(self, found: Step, expected: Step, free: Sequence[float]) -> None:
        if found.state.keys() != expected.state.keys():
            raise ValueError(f"different tensors: {sorted(found.state.keys() ^ expected.state.keys())}")
        losses, own = (relative(values, expected.losses) for values in (found.losses, free))
        self.rows.append((losses, apart(found.slots, expected.slots), worst(found.state, expected.state), own))

    def errors(self) -> Errors:
        losses, gradients, tensors, own = (list(column) for column in zip(*self.rows, strict=True))
        return Errors(max(losses), float(np.median(gradients)), max(gradients), max(tensors), max(own))


def worst(found: Arrays, expected: Arrays) -> float:
    """Largest ||a - b|| / ||b|| of a tensor; one smaller than TINY counts as of that size."""
    norm = np.linalg.norm
    return max(float(norm(found[n] - b) / max(norm(b), TINY * b.size**0.5)) for n, b in expected.items())


def relative(found: Sequence[float], expected: Sequence[float]) -> float:
    """Largest |a - b| / |b|."""
    a, b = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    return float(np.max(np.abs(a - b) / np.abs(b)))


def share(truth: Oracle, single: Oracle, graphs: Graphs) -> None:
    """Round the state of the truth to float32, so that all can hold it, and give it to the others."""
    adopt(truth, single)
    values = {**eager_state(truth), **eager_slots(truth, graphs.optimizer)}
    steps = max((float(s["step"]) for o in truth.optimizers for s in o.state.values() if "step" in s), default=0.0)
    for state in graphs.state:
        state.update({name: values[name].astype(np.float32) for name in state if name in values})
        state.update({name: np.asarray(steps, np.float32) for name in state if name == "opt/step"})


def adopt(truth: Oracle, single: Oracle) -> None:
    """Round the state of the truth to float32, and give it to the other one."""
    for block, other, optimizer, follower in zip(
        truth.blocks, single.blocks, truth.optimizers, single.optimizers, strict=True
    ):
        kept = [t for state in optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
        with torch.no_grad():
            for tensor in (*block.state_dict().values(), *kept):
                tensor.copy_(tensor.to(torch.float32) if tensor.is_floating_point() else tensor)
        other.load_state_dict(block.state_dict())
        follower.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # or both would count the same steps


def eager_slots(oracle: Oracle, optimizer: Optimizer) -> Arrays:
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
