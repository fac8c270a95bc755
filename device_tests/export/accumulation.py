"""A block in both forms of its training, and the same in eager PyTorch: what the tests of accumulation share."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn

from device_tests.export import helpers
from device_tests.export.helpers import Array, Arrays, relative_errors
from edgelocal.bundle.spec import RuleSpec, TaskSpec
from edgelocal.exporters import losses
from edgelocal.exporters.onnx_accumulate import apply_graph, gradient_graph
from edgelocal.exporters.onnx_block import ExportedGraph
from edgelocal.exporters.onnx_step import step_graph
from edgelocal.exporters.optimizers import Optimizer, adamw, sgd
from edgelocal.exporters.oracle import Oracle
from edgelocal.exporters.partition import partition
from edgelocal.exporters.rules import LocalBlock, build_blocks
from edgelocal.exporters.units import GlobalMean, Network, load_network
from edgelocal.exporters.zoo.custom import from_module

SHAPE = (3, 16, 16)
TASK = TaskSpec("cross_entropy", 10, 0.0, ())
BATCH = 12
LR = 0.5  # large, so that the rounding of the new parameters does not hide the errors of the updates
SLOTS = {"momentum": "momentum_buffer", "m": "exp_avg", "v": "exp_avg_sq"}  # our names, and PyTorch's

# With AdamW's usual eps a gradient that is nothing but rounding (a key's bias in attention) moves by whole steps.
OPTIMIZERS: dict[str, Callable[[], Optimizer]] = {"nesterov": sgd, "adamw": lambda: adamw(eps=1e-3)}


def smooth_convolutions() -> nn.Module:
    """A convolutional network without batch norm, and without ReLU's kinks."""
    first = [nn.Conv2d(3, 6, 3, padding=1), nn.GroupNorm(2, 6), nn.SiLU()]
    second = [nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.Tanh(), nn.MaxPool2d(2)]
    return nn.Sequential(*first, *second, nn.Conv2d(8, 8, 1), nn.SiLU(), GlobalMean(), nn.Linear(8, 10))


def smooth_batch_norms() -> nn.Module:
    """As smooth, with batch norm."""
    first = [nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), nn.SiLU()]
    second = [nn.Conv2d(6, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8), nn.Tanh()]
    return nn.Sequential(*first, *second, GlobalMean(), nn.Linear(8, 10))


CUSTOM = {"convolutions": smooth_convolutions, "batch norms": smooth_batch_norms}
APART = ["mlp", "vit", "convolutions"]  # a sample's output does not depend on its neighbours
JOINED = ["resnet8", "batch norms"]  # batch norm


def build(network: Network, blocks: int, rule: str) -> tuple[LocalBlock, ...]:
    spec = RuleSpec(rule, 1, 0.5, 1, "merge")
    return build_blocks(network, spec, partition(network, blocks=blocks, rule=rule, depth=1, tail="merge"), seed=0)


@functools.cache
def blocks_of(name: str) -> tuple[LocalBlock, ...]:
    """Untrained blocks, not to be changed; behind convolutions the auxiliary without batch norm."""
    torch.manual_seed(0)
    if name in CUSTOM:
        return build(from_module(CUSTOM[name](), name, SHAPE, 10), 2, "linear")
    return build(load_network(name, SHAPE, 10, seed=0), 2, "auglocal")


@dataclass(frozen=True)
class Runnable:
    """A graph with its session."""

    graph: ExportedGraph
    session: onnxruntime.InferenceSession

    @classmethod
    def of(cls, graph: ExportedGraph) -> Runnable:
        return cls(graph, helpers.session(graph.model))

    def __call__(self, feeds: Mapping[str, Array]) -> Arrays:
        values = self.session.run(None, {t.name: feeds[t.name] for t in self.graph.inputs})
        return dict(zip([t.name for t in self.graph.outputs], values, strict=True))


@dataclass(frozen=True)
class Forms:
    """One block in both forms."""

    block: LocalBlock
    optimizer: Optimizer
    step: Runnable
    grad: Runnable
    apply: Runnable

    def numbers(self) -> Arrays:
        """What besides data and state a graph of the step takes."""
        return {name: np.asarray(v, np.float32) for name, v in {"lr": LR, **self.optimizer.hyper}.items()}

    def initial(self) -> Arrays:
        """The untrained state; slots that are not zero, as in the middle of a training."""
        rng = np.random.default_rng(3)
        local = {name: key for key, name in self.block.tensor_names().items()}
        state = {}
        for t in self.step.graph.inputs:
            if t.kind in ("param", "buf"):
                state[t.name] = self.block.state_dict()[local[t.name.partition("/")[2]]].numpy().copy()
            elif t.kind == "opt":
                state[t.name] = (1e-4 * rng.random(t.resolve(1))).astype(np.float32)
        return state | ({"opt/step": np.asarray(4, np.float32)} if self.optimizer.counts_steps else {})

    def whole(self, data: Arrays, state: Arrays) -> Arrays:
        """The step graph on a batch."""
        return self.step({**data, **state, **self.numbers()})

    def parts(self, data: Arrays, state: Arrays, split: Sequence[int]) -> Arrays:
        """The same results from micro-batches of these sizes, and grad/<name>."""
        sums = {t.name: np.zeros(t.resolve(1), np.float32) for t in self.grad.graph.inputs if t.kind == "acc"}
        results, now = [], state | sums
        for start, size in zip(itertools.accumulate(split, initial=0), split, strict=False):
            rows = {name: array[start : start + size] for name, array in data.items()}
            results.append(self.grad({**now, **rows, "share": np.asarray(size / sum(split), np.float32)}))
            now = now | renewed(results[-1])
        found = {f"new/{name}": array for name, array in state.items() if name.startswith("param/")}  # frozen ones stay
        found |= self.apply({**now, **self.numbers()})
        found |= {f"grad/{name.partition('/')[2]}": now[name] for name in sums}
        found |= {f"new/{name}": array for name, array in now.items() if name.startswith("buf/")}
        found["h"] = np.concatenate([r["h"] for r in results])
        found["loss"] = np.asarray(sum(n * r["loss"] for n, r in zip(split, results, strict=True)) / sum(split))
        metric = self.step.graph.outputs[2].name
        return found | {metric: np.asarray(sum(r[metric] for r in results))}


def renewed(outputs: Arrays) -> Arrays:
    """The state that a graph put out."""
    return {name.removeprefix("new/"): array for name, array in outputs.items() if name.startswith("new/")}


def forms(block: LocalBlock, task: TaskSpec, optimizer: Optimizer, shape: tuple[int, ...]) -> Forms:
    grad = gradient_graph(block, task, shape, torch.float32)
    step = step_graph(block, task, optimizer, shape, torch.float32)
    return Forms(block, optimizer, *map(Runnable.of, (step, grad, apply_graph(grad, optimizer))))


@functools.cache
def forms_of(name: str, optimizer: str) -> tuple[Forms, ...]:
    found: list[Forms] = []
    shape = SHAPE
    for block in blocks_of(name):
        found.append(forms(block, TASK, OPTIMIZERS[optimizer](), shape))
        shape = found[-1].step.graph.output("h").shape[1:]
    return tuple(found)


def sample(batch: int = BATCH) -> tuple[Array, Array]:
    rng = np.random.default_rng(0)
    return rng.standard_normal((batch, *SHAPE), dtype=np.float32), rng.integers(0, 10, batch)


def changes(found: Arrays, state: Arrays) -> Arrays:
    """All that a step computes of the gradients, under names for which `relative_errors` knows a floor."""
    result = {f"grad/{n}": array for n, array in found.items() if n.startswith(("grad/", "new/opt/"))}
    for name, array in found.items():
        if name.startswith("new/param/"):
            result[f"grad/{name}"] = array.astype(np.float64) - state[name.removeprefix("new/")]
    return result


def worst(found: Arrays, expected: Arrays, state: Arrays) -> float:
    """The largest error of gradients, slots, and changes of parameters, of what `expected` holds."""
    new, old = changes(found, state), changes(expected, state)
    errors = []
    for kind in ("grad/grad/", "grad/new/opt/m", "grad/new/opt/v", "grad/new/param/"):  # each has a scale of its own
        errors += relative_errors(new, {n: a for n, a in old.items() if n.startswith(kind)}).values()
    return max(errors)


def with_slots(oracle: Oracle, state: Arrays, slots: Sequence[str]) -> None:
    """Give the oracle's only block the optimizer's state of the graphs."""
    ((block,), (optimizer,)) = oracle.blocks, oracle.optimizers
    for local, parameter in block.named_parameters():
        own = optimizer.state[parameter]
        for slot in slots:
            own[SLOTS[slot]] = torch.from_numpy(state[f"opt/{slot}/{block.tensor_names()[local]}"]).to(oracle.dtype)
        if "opt/step" in state:
            own["step"] = torch.tensor(float(state["opt/step"]))


def eager(own: Forms, data: Arrays, split: Sequence[int], dtype: torch.dtype) -> Arrays:
    """Eager PyTorch from the same state, accumulating over micro-batches; with one of them it is the oracle's step."""
    oracle = Oracle([copy.deepcopy(own.block)], TASK, own.optimizer.reference, dtype)
    ((block,), (optimizer,)) = oracle.blocks, oracle.optimizers
    with_slots(oracle, own.initial(), own.optimizer.slots)
    x, y = (torch.from_numpy(data[name]) for name in "xy")
    if len(split) == 1:
        oracle.step(x, y, LR)
    else:
        for part, target in zip(x.to(dtype).split(list(split)), y.split(list(split)), strict=True):
            value = losses.loss(block(part)[1], target, TASK)
            (value * (len(part) / len(x))).backward()
        optimizer.param_groups[0]["lr"] = LR
        optimizer.step()
    return dict(eager_results(block, optimizer, own.optimizer.slots))


def eager_results(
    block: LocalBlock, optimizer: torch.optim.Optimizer, slots: Sequence[str]
) -> Iterator[tuple[str, Array]]:
    names = block.tensor_names()
    for local, parameter in block.named_parameters():
        assert parameter.grad is not None
        yield f"grad/{names[local]}", parameter.grad.numpy()
        yield f"new/param/{names[local]}", parameter.detach().numpy()
        for slot in slots:
            yield f"new/opt/{slot}/{names[local]}", optimizer.state[parameter][SLOTS[slot]].numpy()
    for local, buffer in block.named_buffers():
        yield f"new/buf/{names[local]}", buffer.numpy()


class Dropping(nn.Module):
    """Two dropouts, one parameter that is frozen, one that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 6)
        self.drop = nn.Dropout(0.25)
        self.last = nn.Linear(6, 4)
        self.last.bias.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """(N, 6) -> (N, 4)."""
        for _ in range(2):
            x = self.drop(torch.tanh(self.first(x)))
        out: Tensor = self.last(x)
        return out


TASKS = {kind: TaskSpec(kind, 4, 0.1 if kind == "cross_entropy" else 0.0, ()) for kind in losses.LOSSES}


@functools.cache
def dropping(kind: str) -> Forms:
    torch.manual_seed(0)
    (block,) = build(from_module(Dropping(), "dropping", (6,), 4), 1, "bp")
    return forms(block, TASKS[kind], OPTIMIZERS["adamw"](), (6,))
