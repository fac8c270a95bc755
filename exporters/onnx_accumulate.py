"""A training step in parts, for a batch that does not fit into the budget: grad.onnx and apply.onnx.

The batch is cut into micro-batches. The local losses are means over the samples, so the gradient of the batch is
sum_i share_i grad_i, where share_i is the part of the batch's samples that micro-batch i holds. grad.onnx adds one such
term to the accumulators, which start at zero; apply.onnx does the update of the step graph with the sum. The result is
that of the step graph up to the order of a float32 sum, wherever a sample's output does not depend on its neighbours.
Batch norm takes the statistics of each micro-batch, and moves its running statistics once for each.

Memory: the accumulators are one float32 more for each trained parameter. A gradient is added as soon as it exists; the
sum is made by one Add, element by element, whose result is the graph's output, so it may be written over the
accumulator it reads.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from edgelocal.bundle.spec import TaskSpec, TensorSpec
from edgelocal.exporters.forms import CPU, Forms
from edgelocal.exporters.onnx_block import ExportedGraph, finish
from edgelocal.exporters.onnx_graph import GraphBuilder
from edgelocal.exporters.onnx_step import Updates, new_tensor, scalar_specs, training_graph
from edgelocal.exporters.optimizers import Optimizer
from edgelocal.exporters.rules import LocalBlock


def gradient_graph(
    block: LocalBlock, task: TaskSpec, input_shape: Sequence[int], dtype: torch.dtype, forms: Forms = CPU
) -> ExportedGraph:
    """One micro-batch of `block` on inputs (N, *input_shape) of `dtype`; N is its number of samples. Its gradients are
    in these forms.

    Inputs: x, y, share () float32 (its samples / those of the batch), masks, then param/, acc/ (of trained parameters),
    buf/. Outputs: h, loss (its mean), the metric sum, then new/acc/ = acc + share * gradient, and new/buf/.

    Raises:
        ExportError: it cannot be written as ONNX; see `block_trace`.
    """
    return training_graph(block, task, input_shape, dtype, _Sums, forms)


def apply_graph(gradients: ExportedGraph, optimizer: Optimizer) -> ExportedGraph:
    """The update with the gradients that the graph `gradients` has summed up.

    Inputs: lr, hyper-parameters, param/ and acc/ of trained parameters, opt/. Outputs: new/param/ and new/opt/.
    """
    builder = GraphBuilder(batch_of="")  # no size here depends on a batch
    updates = Updates(builder, optimizer)
    sums = [t for t in gradients.inputs if t.kind == "acc"]
    trained = [TensorSpec(t.name.removeprefix("acc/"), t.shape, t.dtype) for t in sums]
    for tensor in trained:
        updates.take(tensor.name, f"acc/{tensor.name}")
    parameters = [TensorSpec(f"param/{t.name}", t.shape, t.dtype) for t in trained]
    slots = updates.state(trained)
    inputs = [*scalar_specs(updates.scalars), *parameters, *sums, *slots]
    return finish(builder, inputs, [new_tensor(t, updates.new) for t in (*parameters, *slots)])


class _Sums:
    """The use of gradients in a micro-batch: each is added to its accumulator."""

    scalars: tuple[str, ...] = ("share",)
    returned: tuple[str, ...] = ("acc", "buf")

    def __init__(self, builder: GraphBuilder) -> None:
        self.new: dict[str, str] = {}
        self._builder = builder

    def state(self, trained: Sequence[TensorSpec]) -> list[TensorSpec]:
        """acc/<name> of a parameter's shape."""
        return [TensorSpec(f"acc/{t.name}", t.shape, t.dtype) for t in trained]

    def take(self, name: str, gradient: str) -> None:
        """Emit the sum of one parameter."""
        part = self._builder.op("Mul", gradient, "share")
        self.new[f"acc/{name}"] = self._builder.op("Add", f"acc/{name}", part)
