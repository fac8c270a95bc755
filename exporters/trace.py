"""nn.Module -> functional ATen graph with a symbolic batch.

PyTorch's ahead-of-time autograd traces the module and, for training, its backward pass into one graph without
side effects: running statistics become outputs, dropout becomes an operator, gradients are those of eager PyTorch
because they come from the same autograd formulas.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import sympy
import torch
from torch import fx, nn
from torch._functorch.aot_autograd import aot_export_module
from torch._subclasses import FakeTensorMode
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.fx.experimental.symbolic_shapes import (
    DimDynamic,
    GuardOnDataDependentSymNode,
    ShapeEnv,
    StatelessSymbolicContext,
)
from torch.nn.attention import SDPBackend, sdpa_kernel

from edgelocal.exporters.lowering import decompositions
from edgelocal.exporters.onnx_graph import expression

EXAMPLE_BATCH = 13  # the graph does not depend on it; a prime, so that no reshape divides it by accident
OTHER_BATCHES = (*range(2, 129), 256, 512, 1000)
PYTORCH = str(Path(torch.__file__).parent)


class TraceError(Exception):
    """PyTorch cannot trace a module, or its graph would not hold for every batch size."""


@dataclass(frozen=True)
class Traced:
    """A functional graph.

    `user_inputs` are the placeholders of the inputs. `parameters` and `buffers` map the module's tensor names to
    placeholders, `new_buffers` and `gradients` to the nodes that compute them.
    """

    graph: fx.Graph
    user_inputs: tuple[str, ...]
    parameters: dict[str, str]
    buffers: dict[str, str]
    user_outputs: tuple[fx.Node, ...]
    new_buffers: dict[str, fx.Node]
    gradients: dict[str, fx.Node]


class Batch:
    """Fake tensors that share one symbolic batch size."""

    def __init__(self) -> None:
        self.environment = ShapeEnv(duck_shape=False)
        self.mode = FakeTensorMode(shape_env=self.environment, allow_non_fake_inputs=True)
        context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
        self.size = self.mode.from_tensor(torch.empty(EXAMPLE_BATCH), symbolic_context=context).shape[0]
        self.symbol = expression(self.size)  # kept: once specialised, the size itself no longer shows it

    def tensor(self, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        """A fake tensor of shape (batch, *shape)."""
        with self.mode:
            return torch.zeros((self.size, *shape), dtype=dtype)

    def holds(self) -> bool:
        """Whether `check` would pass."""
        try:
            self.check()
        except TraceError:
            return False
        return True

    def check(self) -> None:
        """Refuse a graph that does not hold for every batch size.

        Of the conditions that the trace took for granted those from PyTorch's own code choose a kernel, not a result;
        those from elsewhere are branches that the graph does not have.

        Raises:
            TraceError: the code branched on the batch size or fixed it.
        """
        found = self.environment.replace(self.symbol)
        if found != self.symbol:
            raise TraceError(f"the batch size becomes {found}: let it be free, as in x.reshape(x.shape[0], -1)")
        for guard in self.environment.guards:
            place = guard.sloc.framework_loc
            if place is None or isinstance(place, str) or place.filename.startswith(PYTORCH):
                continue
            broken = [n for n in OTHER_BATCHES if guard.expr.subs(self.symbol, n) is sympy.false]
            if broken:
                condition = str(guard.expr).replace(str(self.symbol), "N")
                where = f"{place.filename}:{place.lineno}"
                raise TraceError(f"{where} branches on the batch size (N = {broken[0]} is not {condition})")


def trace(module: nn.Module, inputs: Sequence[torch.Tensor], batch: Batch, *, joint: bool) -> Traced:
    """Trace `module(*inputs)`; with `joint` its first output is a loss and the gradients are traced too.

    The module's mode (train or eval) is kept. Tensors of `inputs` come from `batch`.

    Raises:
        TraceError: PyTorch cannot trace the module (it branches on data, say).
    """
    module = copy.deepcopy(module)
    parameters = [name for name, p in module.named_parameters() if p.requires_grad]
    try:
        with tracing(), batch.mode:
            traced = aot_export_module(
                module,
                tuple(inputs),
                trace_joint=joint,
                output_loss_index=0 if joint else None,
                decompositions=decompositions(),
            )
    except (GuardOnDataDependentSymNode, DataDependentOutputException, DynamicOutputShapeException) as error:
        raise TraceError("its code branches on the values of a tensor, or makes sizes of them") from error
    except Exception as error:
        raise TraceError(f"PyTorch cannot trace it: {_first_lines(error)}") from error
    batch.check()
    exported: Any = traced[0]  # typed as a callable, is a GraphModule
    signature = traced[1]
    outputs = list(next(n for n in exported.graph.nodes if n.op == "output").args[0])
    buffers = list(signature.buffers_to_mutate.values())
    split = len(outputs) - (len(parameters) if joint else 0)
    return Traced(
        graph=exported.graph,
        user_inputs=tuple(signature.user_inputs),
        parameters={fqn: placeholder for placeholder, fqn in signature.inputs_to_parameters.items()},
        buffers={fqn: placeholder for placeholder, fqn in signature.inputs_to_buffers.items()},
        user_outputs=tuple(outputs[len(buffers) : split]),
        new_buffers=dict(zip(buffers, outputs, strict=False)),
        gradients={n: g for n, g in zip(parameters, outputs[split:], strict=True) if g is not None} if joint else {},
    )


@contextlib.contextmanager
def tracing() -> Iterator[None]:
    """Attention as plain matrix products (the fused kernels have no portable form); PyTorch's own warnings off."""
    fastpath = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
            warnings.simplefilter("ignore")
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fastpath)


def _first_lines(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
