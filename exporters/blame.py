"""Which module of the user's network an operator without an ONNX form came from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from edgelocal.errors import ExportError
from edgelocal.exporters.lowering import UnsupportedOperatorError, lower
from edgelocal.exporters.onnx_graph import GraphBuilder
from edgelocal.exporters.rules import LocalBlock
from edgelocal.exporters.trace import Batch, trace


def blame(
    error: UnsupportedOperatorError, module: nn.Module, inputs: Sequence[torch.Tensor], block: LocalBlock
) -> ExportError:
    """The error as the user should read it: operator and path of the module it came from.

    Every submodule is traced alone, innermost first; the first one whose own graph fails on the same operator is it.
    """
    path = _culprit(error.target, module, inputs) or ""
    where = f"module {_user_path(path, block)}" if path else f"block {block.name} ({', '.join(block.unit_names)})"
    return ExportError(
        f"{where} uses {error}, which has no form in standard ONNX operators here; replace it in the network, or keep "
        "that module out of the trained part"
    )


def _culprit(target: str, module: nn.Module, inputs: Sequence[torch.Tensor]) -> str | None:
    seen: dict[str, tuple[tuple[torch.Tensor, ...], nn.Module]] = {}
    hooks = []
    for path, child in module.named_modules():
        if path:

            def remember(child: nn.Module, arguments: tuple[Any, ...], path: str = path) -> None:
                if all(isinstance(a, torch.Tensor) for a in arguments):
                    seen[path] = (arguments, child)

            hooks.append(child.register_forward_pre_hook(remember))
    try:
        module(*(torch.zeros([4 if i == 0 else int(d) for i, d in enumerate(x.shape)], dtype=x.dtype) for x in inputs))
    finally:
        for hook in hooks:
            hook.remove()
    for path in sorted(seen, key=lambda p: -p.count(".")):
        arguments, child = seen[path]
        if _fails_on(target, child, arguments):
            return path
    return None


def _fails_on(target: str, child: nn.Module, arguments: Sequence[torch.Tensor]) -> bool:
    batch = Batch()
    fakes = [batch.tensor(a.shape[1:], a.dtype) for a in arguments]
    probe = _Probe(child)
    try:
        traced = trace(probe, fakes, batch, joint=child.training and any(p.requires_grad for p in probe.parameters()))
        builder = GraphBuilder(batch_of=traced.user_inputs[0])
        names = {n.name: n.name for n in traced.graph.nodes if n.op == "placeholder"}
        lower(traced.graph, builder, names)
    except UnsupportedOperatorError as error:
        return error.target == target
    except ExportError:
        return False  # it cannot be traced alone, so its children or its parent are asked
    return False


class _Probe(nn.Module):
    """A loss of one module's output, so that its own backward pass is traced, its input's gradient included."""

    def __init__(self, child: nn.Module) -> None:
        super().__init__()
        self.child = child
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor]:
        scaled = [x * self.scale if x.is_floating_point() else x for x in inputs]
        output: torch.Tensor = self.child(*scaled)
        return (output.float().sum(),)
