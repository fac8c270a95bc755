"""A training step's gradients from ONNX Runtime's training artifacts, in an ordinary session of its training build.

The artifacts are plain ONNX with operators of that runtime, so they run in the arena and with the threads of all other
graphs, and parameters, slots and buffers stay where the portable runner keeps them. The runtime's own `Module` and
`Optimizer` would keep them behind its interface, in an arena of their own, without the optimizer's state for a
checkpoint, and have AdamW only (docs/decisions/0013).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from edgelocal.bundle.artifacts import RESET, gradient_buffer
from edgelocal.bundle.spec import AccumulationSpec
from edgelocal.runtime.session import Graph, Tensor


@dataclass(frozen=True)
class Gradients:
    """Output for the next block, mean loss and metric sum of a batch; the state with buffers as they are now and with
    `acc/...`, the gradients."""

    h: Tensor
    loss: float
    metric: float
    state: dict[str, Tensor]
    gradient_bytes: int


def run_artifacts(
    model: Graph, data: Mapping[str, Tensor], state: Mapping[str, Tensor], second: AccumulationSpec, *, release: bool
) -> Gradients:
    """Run the training model `model` on a batch; `second` says which gradients the update takes.

    Raises:
        BundleError, OverBudgetError: as of `Graph.run`.
    """
    sums = {t.name: Tensor.empty(t.resolve(1), t.dtype) for t in second.apply.inputs if t.kind == "acc"}
    feeds: dict[str, Tensor] = {**state, **data, **{gradient_buffer(name): tensor for name, tensor in sums.items()}}
    feeds[RESET] = Tensor(np.array([True]))  # what is in the buffers is overwritten
    counters = {name for name, tensor in state.items() if tensor.array().dtype != np.float32}
    for name in counters:  # all state is float32 in the artifacts
        feeds[name] = Tensor(state[name].array().astype(np.float32))
    batch = data["x"].batch
    results = {t.name: Tensor.empty(t.resolve(batch), t.dtype) for t in model.spec.outputs}
    model.run([feeds[t.name] for t in model.spec.inputs], list(results.values()), release=release)
    whole = {name: Tensor(feeds[name].array().astype(np.int64)) for name in counters}
    metric = model.spec.outputs[2].name
    size = sum(tensor.array().nbytes for tensor in sums.values())
    return Gradients(results["h"], results["loss"].item(), results[metric].item(), {**state, **whole, **sums}, size)
