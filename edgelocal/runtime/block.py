"""A block on the device: its state, and the steps and passes that run on it."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from edgelocal.bundle.folder import Bundle
from edgelocal.bundle.spec import BlockSpec, GraphSpec, MaskSpec, OrtTrainingSpec
from edgelocal.data.augment import bernoulli_mask
from edgelocal.errors import DivergedError, UsageError
from edgelocal.runtime.arena import give_back
from edgelocal.runtime.graphs import GraphPool
from edgelocal.runtime.ort_step import run_artifacts, zero_sums
from edgelocal.runtime.pages import Page
from edgelocal.runtime.provider import Provider
from edgelocal.runtime.session import in_order
from edgelocal.runtime.tensor import HOST, Place, Tensor
from edgelocal.storage.tensors import Array

Values = Mapping[str, Tensor]
Numbers = Mapping[str, float]


class Block:
    """State (parameters, optimizer slots, buffers) of one block; its graphs come from a pool when they are used.

    With a `page` the state waits there whenever the block does not work. With `artifacts` the gradients are
    those of ONNX Runtime's training artifacts (ort_step.py), and the whole batch is taken at once.

    Raises:
        BundleError: the weights are not what the manifest says.
    """

    def __init__(
        self,
        bundle: Bundle,
        index: int,
        graphs: GraphPool,
        state: Mapping[str, Array] | None = None,
        page: Page | None = None,
        *,
        artifacts: bool = False,
    ) -> None:
        self.bundle = bundle
        self.index = index
        self.spec: BlockSpec = bundle.manifest.blocks[index]
        self._graphs = graphs
        self._artifacts = self.spec.ort_training if artifacts else None
        arrays = state or self._initial()
        self._page = page
        self._state: dict[str, Tensor] = {}
        if self._page is None:
            # A copy: a step writes over the state, and these may be views of a file's bytes.
            self._state = {name: graphs.place.of(np.array(arrays[name], order="C")) for name in arrays}
        else:
            self._page.write(arrays)

    @property
    def paged_bytes(self) -> int:
        """Bytes read from and written to the page file so far."""
        return self._page.moved_bytes if self._page else 0

    def step(
        self,
        x: Tensor,
        y: Tensor,
        hyper: Mapping[str, float],
        seed: int,
        number: int,
        micro_batch: int | None = None,
        *,
        release: bool = False,
    ) -> StepResult:
        """One training step on a batch: forward, local loss, backward, update.

        Args:
            hyper: `lr` and the optimizer's hyper-parameters.
            number: the step's number in the run; with `seed` it fixes the random masks.
            micro_batch: samples at a time, whose gradients add up to those of the batch; None takes it whole.
            release: whether the memory it worked in is given back to the system afterwards.

        Raises:
            DivergedError: the loss is not finite; the state is not to be used any more.
            BundleError: the graph wants what nobody knows.
            OverBudgetError, MemoryError: no memory; the state is not to be used any more.
        """
        second = self.spec.accumulation
        # Before the state is read: what must make room for the graph goes first.
        if self._artifacts is None:
            self._graphs.get(self.spec.step if micro_batch is None or second is None else second.gradient)
        state = self._load()
        batch: Values = {"x": x, "y": y, **self._masks(x.batch, seed, number)}
        if self._artifacts is not None:
            result = self._by_artifacts(self._artifacts, batch, hyper, state, release)
        elif micro_batch is None:
            result = self._whole(batch, hyper, state, release)
        else:
            result = self._in_parts(micro_batch, batch, hyper, state, release)
        if not math.isfinite(result.loss):
            raise DivergedError(
                f"block {self.spec.name}: the loss became {result.loss} at step {number + 1}; the last checkpoint is "
                "kept. Use a smaller --lr or a warm-up"
            )
        self._store(state)
        if self._page is not None:
            result.written_bytes += sum(tensor.nbytes for tensor in state.values())
        if release:
            give_back()  # what it replaced in small pieces; or the next block would seem to hold it
        return result

    @property
    def place(self) -> Place:
        """Where its tensors lie."""
        return self._graphs.place

    @property
    def provider(self) -> Provider:
        """What runs its graphs."""
        return self._graphs.provider

    def forward(self, x: Tensor, *, release: bool = False) -> Tensor:
        """The block's output in inference mode."""
        return self._infer(self.spec.forward, x, release)

    def head(self, h: Tensor) -> Tensor:
        """Logits of the auxiliary network for the block's output; the last block's output are the logits."""
        return h if self.spec.head is None else self._infer(self.spec.head, h, False)

    def state(self) -> dict[str, Array]:
        """The state as arrays, by graph input name; they change with the next step."""
        return {name: tensor.array() for name, tensor in self._load().items()}

    def release(self) -> None:
        """Drop the graphs and what memory they hold."""
        self._graphs.release()

    def start_anew(self) -> None:
        """Drop the graphs where not all are kept, see `GraphPool.start_anew`."""
        self._graphs.start_anew()

    def close(self) -> None:
        """Drop the state, and the page."""
        self._state = {}
        if self._page is not None:
            self._page.remove()

    def _whole(self, batch: Values, hyper: Numbers, state: dict[str, Tensor], release: bool) -> StepResult:
        """The step graph on the whole batch."""
        spec = self.spec.step
        results = self._run(spec, {**batch, **_scalars(hyper)}, state, {}, release)
        overwriting = spec.overwriting
        written = sum(t.nbytes for name, t in results.items() if name not in overwriting)
        return StepResult(results["h"], results["loss"].item(), results[spec.outputs[2].name].item(), written)

    def _in_parts(
        self, size: int, batch: Values, hyper: Numbers, state: dict[str, Tensor], release: bool
    ) -> StepResult:
        """Gradients of micro-batches add up, weighted by their share of the samples; then one update."""
        second = self.spec.accumulation
        if second is None:
            raise UsageError("this bundle cannot accumulate gradients: export it again, or give a smaller --batch")
        sums = zero_sums(second, self.place)
        state |= sums
        samples = batch["x"].batch
        h = self.place.empty(second.gradient.outputs[0].resolve(samples), second.gradient.outputs[0].dtype)
        loss = metric = 0.0
        for start in range(0, samples, size):
            stop = min(start + size, samples)
            share = (stop - start) / samples
            feeds = {name: tensor.rows(start, stop) for name, tensor in batch.items()} | _scalars({"share": share})
            results = self._run(second.gradient, feeds, state, {"h": h.rows(start, stop)}, release)
            loss += share * results["loss"].item()
            metric += results[second.gradient.outputs[2].name].item()
        self._run(second.apply, _scalars(hyper), state, {}, release)
        for name in sums:
            del state[name]
        written = h.nbytes + sum(t.nbytes for t in sums.values())
        return StepResult(h, loss, metric, written)

    def _by_artifacts(
        self, artifacts: OrtTrainingSpec, batch: Values, hyper: Numbers, state: dict[str, Tensor], release: bool
    ) -> StepResult:
        """The gradients of the runtime's training model, then the update of the second form of a step."""
        second = self.spec.accumulation
        assert second is not None, "bundles with artifacts have a second form"
        model = self._graphs.get(artifacts.training, training=True)
        found = run_artifacts(model, artifacts.training, batch, state, second, release=release)
        self._run(second.apply, _scalars(hyper), found.state, {}, release)
        state |= {name: tensor for name, tensor in found.state.items() if name in state}
        written = found.h.nbytes + found.gradient_bytes
        return StepResult(found.h, found.loss, found.metric, written)

    def _run(
        self, spec: GraphSpec, feeds: Values, state: dict[str, Tensor], given: Values, release: bool
    ) -> dict[str, Tensor]:
        """Run a graph and put the new state into `state`; `given` is memory for some of the outputs."""
        inputs = in_order(spec, {**state, **feeds})
        batch = feeds["x"].batch if "x" in feeds else 1
        results: dict[str, Tensor] = {}
        overwriting = spec.overwriting
        for tensor in spec.outputs:
            old = tensor.name.removeprefix("new/")
            if tensor.name in given:
                results[tensor.name] = given[tensor.name]
            elif tensor.name in overwriting:
                results[tensor.name] = state[old]
            else:
                # Numbers come down, states and all else stay there.
                place = HOST if tensor.shape == () and old == tensor.name else self.place
                results[tensor.name] = place.empty(tensor.resolve(batch), tensor.dtype)
        self._graphs.get(spec).run(inputs, list(results.values()), release=release)
        state |= {n.removeprefix("new/"): value for n, value in results.items() if n.startswith("new/")}
        return results

    def _infer(self, spec: GraphSpec, x: Tensor, release: bool) -> Tensor:
        graph = self._graphs.get(spec)
        state = self._load()
        inputs = [x, *(state[t.name] for t in spec.inputs[1:])]
        output = self.place.empty(spec.outputs[0].resolve(x.batch), spec.outputs[0].dtype)
        graph.run(inputs, [output], release=release)
        return output

    def _load(self) -> dict[str, Tensor]:
        if self._page is None:
            return dict(self._state)
        return {name: self.place.of(array) for name, array in self._page.read().items()}

    def _store(self, state: dict[str, Tensor]) -> None:
        if self._page is None:
            self._state = state
        else:
            self._page.write({name: tensor.array() for name, tensor in state.items()})

    def _initial(self) -> dict[str, Array]:
        weights = self.bundle.weights(self.spec)
        return {
            t.name: np.zeros(t.resolve(1), dtype=t.dtype) if t.kind == "opt" else weights[t.name]
            for t in self.spec.state()
        }

    def _masks(self, batch: int, seed: int, number: int) -> dict[str, Tensor]:
        shapes = {t.name: t.resolve(batch) for t in self.spec.step.inputs if t.kind == "rand"}

        def mask(index: int, spec: MaskSpec) -> Tensor:
            drawn = bernoulli_mask(shapes[spec.name], spec.keep, seed, number, self.index << 16 | index)
            return self.place.of(drawn)

        return {spec.name: mask(index, spec) for index, spec in enumerate(self.spec.masks)}


def _scalars(values: Mapping[str, float]) -> dict[str, Tensor]:
    return {name: Tensor(np.asarray(value, dtype=np.float32)) for name, value in values.items()}


class StepResult:
    """Output for the next block, mean local loss, the metric sum of the batch, and the bytes of what the step wrote
    outside of the runtime's own memory, the state it read from disk included."""

    def __init__(self, h: Tensor, loss: float, metric: float, written_bytes: int) -> None:
        self.h = h
        self.loss = loss
        self.metric = metric
        self.written_bytes = written_bytes
