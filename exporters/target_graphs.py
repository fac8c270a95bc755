"""The graphs of a block's training for a target, and that none of its nodes would run elsewhere."""

from __future__ import annotations

from collections.abc import Mapping

import onnx
import torch

from edgelocal.errors import ExportError
from edgelocal.exporters.bfloat16 import in_bfloat16
from edgelocal.exporters.blame import blame_operator
from edgelocal.exporters.coverage import Stray, strays
from edgelocal.exporters.forms import FORMS
from edgelocal.exporters.memory.recompute import AGAIN
from edgelocal.exporters.onnx_accumulate import gradient_graph
from edgelocal.exporters.onnx_block import ExportedGraph, examples
from edgelocal.exporters.onnx_graph import ONNX_DTYPES
from edgelocal.exporters.onnx_step import step_graph, target_spec
from edgelocal.exporters.request import ExportRequest
from edgelocal.exporters.rules import LocalBlock
from edgelocal.exporters.step import LocalStep


def training_graph(
    kind: str, block: LocalBlock, request: ExportRequest, shape: tuple[int, ...], dtype: torch.dtype, target: str
) -> ExportedGraph:
    """The graph "step" or "gradient" of a block for "cpu" or "cuda", inputs (N, *shape) of `dtype`.

    Raises:
        ExportError: it cannot be written as ONNX; see `onnx_block.block_trace`.
    """
    forms = FORMS[target]
    if kind == "step":
        found = step_graph(block, request.task, request.optimizer, shape, dtype, forms)
    else:
        found = gradient_graph(block, request.task, shape, dtype, forms)
    return in_bfloat16(found) if request.precision == "bfloat16" else found


class Guard:
    """Refuses graphs of a block of which a CUDA device could not run every node."""

    def __init__(self, block: LocalBlock, request: ExportRequest, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        self._block, self._request = block, request
        self._inputs = (shape, dtype), target_spec(request.task)

    def check(self, kind: str, model: onnx.ModelProto, origins: Mapping[str, str]) -> None:
        """`model` is the graph `kind` as the bundle will have it; `origins` are those of `ExportedGraph`.

        Raises:
            ExportError: a node would need the CPU; the message names operator and module.
        """
        found = strays(model, self._request.defaults.batch)
        if found:
            raise ExportError(
                f"{self._where(found[0], origins)}: in {kind}.onnx the ONNX operator {found[0].operator} "
                f"{found[0].reason} in ONNX Runtime's CUDA provider, so it would run on the CPU"
                f"{_others(len(found) - 1)}; replace it in the network, or export with --target cpu"
            )

    def _where(self, stray: Stray, origins: Mapping[str, str]) -> str:
        target = _origin(stray.output, origins)
        module = LocalStep(self._block, self._request.task).train()
        if target is None:
            return f"block {self._block.name}"
        dtype = next((own for own, number in ONNX_DTYPES.items() if number == stray.dtype), None)
        inputs = examples(self._inputs)
        where = blame_operator(target, stray.operator, module, inputs, self._block, backward=True, dtype=dtype)
        return f"{where} uses {target}"


def _origin(value: str, origins: Mapping[str, str]) -> str | None:
    """The ATen operator of a value, which may be one computed again, or a half (exporters/memory)."""
    while value.endswith(AGAIN):
        value = value.removesuffix(AGAIN)
    return origins.get(value) or origins.get(value.partition("/")[0])


def _others(count: int) -> str:
    return f" (and {count} more nodes)" if count else ""
