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
from edgelocal.bundle.spec import AccumulationSpec, GraphSpec
from edgelocal.runtime.session import Graph, in_order
from edgelocal.runtime.tensor import HOST, Place, Tensor
from edgelocal.storage.tensors import Array


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
    model: Graph,
    spec: GraphSpec,
    data: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    second: AccumulationSpec,
    *,
    release: bool,
) -> Gradients:
    """Run the training model `model`, described by `spec`, on a batch; `second` says which gradients the update takes.

    Raises:
        BundleError: it wants what nobody knows, and as of `Graph.run`.
        OverBudgetError: as of `Graph.run`.
    """
    sums = zero_sums(second, HOST)
    feeds: dict[str, Tensor] = {**state, **data, **{gradient_buffer(name): tensor for name, tensor in sums.items()}}
    feeds[RESET] = Tensor(np.array([True]))  # what is in the buffers is overwritten
    own = {name: tensor.array() for name, tensor in state.items() if tensor.array().dtype != np.float32}
    for name, array in own.items():  # all state is float32 in the artifacts
        feeds[name] = Tensor(array.astype(np.float32))
    results = {t.name: Tensor.empty(t.resolve(data["x"].batch), t.dtype) for t in spec.outputs}
    model.run(in_order(spec, feeds), list(results.values()), release=release)
    whole = {name: _as_it_was(feeds[name].array(), array) for name, array in own.items()}
    metric = spec.outputs[2].name
    size = sum(tensor.array().nbytes for tensor in sums.values())
    return Gradients(results["h"], results["loss"].item(), results[metric].item(), {**state, **whole, **sums}, size)


def zero_sums(second: AccumulationSpec, place: Place) -> dict[str, Tensor]:
    """Where the gradients of the parameters add up, by the name that the update knows them by."""
    return {t.name: place.zeros(t.resolve(1), t.dtype) for t in second.apply.inputs if t.kind == "acc"}


def _as_it_was(found: Array, before: Array) -> Tensor:
    """In its own type what the model had as float32; what it did not change, or float32 cannot hold, bit by bit."""
    changed = not np.array_equal(found, before.astype(np.float32))
    return Tensor(found.astype(before.dtype) if changed else before)
