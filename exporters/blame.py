"""Which module of the user's network cannot be exported, and because of which operator."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from edgelocal.errors import ExportError
from edgelocal.exporters.lowering import UnsupportedOperatorError, decompositions, lower
from edgelocal.exporters.lowering.registry import REGISTRY
from edgelocal.exporters.onnx_graph import GraphBuilder
from edgelocal.exporters.rules import LocalBlock
from edgelocal.exporters.trace import Batch, TraceError, trace, tracing

Failure = TraceError | UnsupportedOperatorError
Tensors = tuple[torch.Tensor, ...]

PROBE_BATCH = 4


def blame(error: Failure, module: nn.Module, inputs: Sequence[torch.Tensor], block: LocalBlock) -> ExportError:
    """The error as the user should read it: operator and path of the module it came from.

    `module` holds `block` under the name block. Every submodule is traced alone, innermost first; the first one that
    fails in the same way is it.
    """
    path, culprit, arguments = _culprit(module, inputs, partial(_fails_alike, error))
    where = _where(path, culprit, block)
    if isinstance(error, UnsupportedOperatorError):
        return ExportError(
            f"{where} uses {error}, which has no form in standard ONNX operators here; replace it in the network, or "
            "keep that module out of the trained part"
        )
    operator = _operator(culprit, arguments)
    return ExportError(f"{where} cannot be exported{f', at {operator}' if operator else ''}: {error}")


def blame_operator(
    target: str,
    operator: str,
    module: nn.Module,
    inputs: Sequence[torch.Tensor],
    block: LocalBlock,
    *,
    backward: bool = False,
    dtype: torch.dtype | None = None,
) -> str:
    """The innermost submodule of `module` in whose forward pass, or with `backward` in both passes, the ATen operator
    `target` becomes the ONNX operator `operator`, in words; with `dtype` one that has an operand of it."""
    path, culprit, _ = _culprit(module, inputs, partial(_has, target, operator, backward, dtype))
    return _where(path, culprit, block)


def _where(path: str, culprit: nn.Module, block: LocalBlock) -> str:
    if path.startswith("block.") and block.module_name(path.removeprefix("block.")):
        return f"module {block.module_name(path.removeprefix('block.'))} ({type(culprit).__name__})"
    return f"block {block.name} ({', '.join(block.unit_names)})"


def _culprit(
    module: nn.Module, inputs: Sequence[torch.Tensor], guilty: Callable[[nn.Module, Tensors], bool]
) -> tuple[str, nn.Module, Tensors]:
    """Path, module and the arguments it is called with; the module itself where no submodule is guilty alone."""
    arguments = tuple(_example([PROBE_BATCH, *(int(d) for d in x.shape[1:])], x.dtype) for x in inputs)
    seen = _calls(module, arguments)
    for path in sorted(seen, key=lambda p: -p.count(".")):
        child, given = seen[path]
        if guilty(child, given):
            return path, child, given
    return "", module, arguments


def _example(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, dtype=dtype) if dtype.is_floating_point else torch.zeros(shape, dtype=dtype)


def _calls(module: nn.Module, arguments: Tensors) -> dict[str, tuple[nn.Module, Tensors]]:
    """Every submodule that is called with tensors, and with which, when the module runs."""
    module = copy.deepcopy(module)  # a run in training mode changes buffers
    seen: dict[str, tuple[nn.Module, Tensors]] = {}
    for path, child in module.named_modules():

        def remember(child: nn.Module, given: tuple[Any, ...], path: str = path) -> None:
            if all(isinstance(a, torch.Tensor) for a in given):
                seen[path] = (child, tuple(a.detach() for a in given))

        if path:
            child.register_forward_pre_hook(remember)
    # Should it fail on these numbers, what was called until then is still worth asking.
    with contextlib.suppress(Exception), torch.no_grad():
        module(*arguments)
    return seen


def _fails_alike(error: Failure, child: nn.Module, arguments: Tensors) -> bool:
    batch = Batch()
    fakes = [batch.tensor(a.shape[1:], a.dtype) for a in arguments]
    try:
        traced = trace(_Probe(child), fakes, batch, joint=child.training)
        builder = GraphBuilder(batch_of=traced.user_inputs[0])
        lower(traced.graph, builder, {n.name: n.name for n in traced.graph.nodes if n.op == "placeholder"})
    except UnsupportedOperatorError as found:
        return isinstance(error, UnsupportedOperatorError) and found.target == error.target
    except TraceError:
        return isinstance(error, TraceError)
    return False


def _has(
    target: str, operator: str, backward: bool, dtype: torch.dtype | None, child: nn.Module, arguments: Tensors
) -> bool:
    batch = Batch()
    fakes = [batch.tensor(a.shape[1:], a.dtype) for a in arguments]
    try:
        with torch.set_grad_enabled(backward):
            traced = trace(_Probe(child), fakes, batch, joint=backward)
            builder = GraphBuilder(batch_of=traced.user_inputs[0], derived=not backward)
            lower(traced.graph, builder, {n.name: n.name for n in traced.graph.nodes if n.op == "placeholder"})
    except (TraceError, UnsupportedOperatorError):
        return False
    if dtype is not None and dtype not in _operands(traced.graph, target):
        return False
    return any(node.op_type == operator and builder.origins.get(node.name) == target for node in builder.nodes)


def _operands(graph: torch.fx.Graph, target: str) -> set[torch.dtype]:
    """The types of all tensors that an ATen operator is given."""
    calls = (node for node in graph.nodes if node.op == "call_function" and str(node.target) == target)
    values = (given.meta.get("val") for node in calls for given in node.all_input_nodes)
    return {value.dtype for value in values if isinstance(value, torch.Tensor)}


class _Probe(nn.Module):
    """A loss of one module's output, so that its own backward pass is traced, its input's gradient included."""

    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.child = child
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor]:
        scaled = [x * self.scale if x.is_floating_point() else x for x in inputs]
        outputs = [o for o in tree_leaves(self.child(*scaled)) if isinstance(o, torch.Tensor)]
        return (sum((o.float().sum() for o in outputs), self.scale * 0),)


def _operator(module: nn.Module, arguments: Tensors) -> str:
    """The operator at which a forward pass with a free batch stops or fixes the batch, else the first without an ONNX
    form, whose derivative may be what fails; empty if it is none."""
    batch = Batch()
    fakes = [batch.tensor(a.shape[1:], a.dtype) for a in arguments]
    watch = _Watch(batch)
    # That it fails is known; here only where.
    with contextlib.suppress(Exception), tracing(), batch.mode, watch:
        module(*fakes)
    return watch.found or watch.running or watch.unknown


class _Watch(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch does not type it
    """Remembers the operator that is running, and the first after which the batch is no longer free."""

    def __init__(self, batch: Batch) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.batch = batch
        self.running = ""
        self.found = ""
        self.unknown = ""
        self.known = {*REGISTRY, *decompositions()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.running = str(func)
        result = func(*args, **(kwargs or {}))
        if not self.unknown and func not in self.known and func.namespace == "aten" and not func.is_view:
            self.unknown = str(func)
        if not self.found and not self.batch.holds():
            self.found = str(func)
        if func is not torch.ops.aten._local_scalar_dense.default:  # what follows it, a branch, is no operator
            self.running = ""
        return result
