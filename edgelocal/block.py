"""A block on the device: its state, and the graphs that run on it."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from edgelocal.augment import bernoulli_mask
from edgelocal.bundle import Bundle
from edgelocal.errors import DivergedError
from edgelocal.session import Graph, Tensor
from edgelocal.spec import BlockSpec
from edgelocal.tensors import Array


class Block:
    """State (parameters, optimizer slots, buffers) of one block, and its step, forward and head graphs.

    Graphs are loaded when they are first used; `release` drops them. The state is kept until the process ends.

    Raises:
        BundleError: the weights are not what the manifest says.
    """

    def __init__(self, bundle: Bundle, index: int, threads: int, state: Mapping[str, Array] | None = None) -> None:
        self.bundle = bundle
        self.index = index
        self.spec: BlockSpec = bundle.manifest.blocks[index]
        self._threads = threads
        self._graphs: dict[str, Graph] = {}
        self._state = {name: Tensor.of(array) for name, array in (state or self._initial()).items()}

    def step(self, x: Tensor, y: Tensor, hyper: Mapping[str, float], seed: int, number: int) -> StepResult:
        """One training step on a batch: forward, local loss, backward, update.

        Args:
            hyper: `lr` and the optimizer's hyper-parameters.
            number: the step's number in the run; with `seed` it fixes the random masks.

        Raises:
            DivergedError: the loss is not finite; the state is that before the step.
        """
        graph = self._graph("step")
        feeds = {"x": x, "y": y, **self._state}
        feeds |= {name: Tensor.of(np.asarray(value, dtype=np.float32)) for name, value in hyper.items()}
        feeds |= self._masks(graph, x.batch, seed, number)
        results = graph.run(feeds)
        loss = results["loss"].item()
        if not math.isfinite(loss):
            raise DivergedError(
                f"block {self.spec.name}: the loss became {loss} at step {number + 1}; the last checkpoint is kept. "
                "Use a smaller --lr or a warm-up"
            )
        self._state = {name: results[f"new/{name}"] for name in self._state}
        return StepResult(results["h"], loss, results[graph.spec.outputs[2].name].item())

    def forward(self, x: Tensor) -> Tensor:
        """The block's output in inference mode."""
        return self._graph("forward").run({"x": x, **self._state})["h"]

    def head(self, h: Tensor) -> Tensor:
        """Logits of the auxiliary network for the block's output; the last block's output are the logits."""
        if self.spec.head is None:
            return h
        return self._graph("head").run({"h": h, **self._state})["logits"]

    def state(self) -> dict[str, Array]:
        """The state as arrays, by graph input name."""
        return {name: tensor.array() for name, tensor in self._state.items()}

    def state_bytes(self) -> int:
        """Size of the state."""
        return sum(a.nbytes for a in self.state().values())

    def release(self) -> None:
        """Drop the loaded graphs and what memory they hold."""
        self._graphs.clear()

    def _initial(self) -> dict[str, Array]:
        weights = self.bundle.weights(self.spec)
        return {
            t.name: np.zeros(t.resolve(1), dtype=t.dtype) if t.kind == "opt" else weights[t.name]
            for t in self.spec.state()
        }

    def _graph(self, kind: str) -> Graph:
        if kind not in self._graphs:
            spec = {"step": self.spec.step, "forward": self.spec.forward, "head": self.spec.head}[kind]
            assert spec is not None, "head() has asked before"
            self._graphs[kind] = Graph(spec, self.bundle.read(spec.file), self._threads)
        return self._graphs[kind]

    def _masks(self, graph: Graph, batch: int, seed: int, number: int) -> dict[str, Tensor]:
        shapes = {t.name: t.resolve(batch) for t in graph.spec.inputs}
        return {
            mask.name: Tensor.of(bernoulli_mask(shapes[mask.name], mask.keep, seed, number, self.index << 16 | i))
            for i, mask in enumerate(self.spec.masks)
        }


class StepResult:
    """Output for the next block, mean local loss, and the metric sum of the batch."""

    def __init__(self, h: Tensor, loss: float, metric: float) -> None:
        self.h = h
        self.loss = loss
        self.metric = metric
