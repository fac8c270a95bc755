"""Model bytes -> something that runs. Every run gets its inputs and outputs in memory of ours; what lives only while it
runs comes from the arena (see `edgelocal.runtime.arena`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from edgelocal.bundle.onnx_scan import scan
from edgelocal.bundle.spec import BATCH, GraphSpec, TensorSpec
from edgelocal.errors import BundleError, OverBudgetError
from edgelocal.runtime.arena import UNPLANNED, empty_arena, releasing, reserve, session_options
from edgelocal.runtime.library import runtime, translated
from edgelocal.runtime.tensor import Tensor

TYPES = {"float32": "tensor(float)", "int64": "tensor(int64)", "bool": "tensor(bool)"}


class Graph:
    """A loaded ONNX graph of a bundle.

    Raises:
        BundleError: the model holds what no graph of a bundle has, the runtime cannot load it, or it is not the one
            the manifest describes.
        OverBudgetError: no memory to load it.
    """

    def __init__(self, spec: GraphSpec, model: bytes, threads: int, *, training: bool = False) -> None:
        self.spec = spec
        scan(model, spec.file, training=training)
        reserve(UNPLANNED)
        ort = runtime()
        try:
            # No fallback: it prints to stdout and tries the same once more.
            self._session = ort.InferenceSession(
                model, session_options(threads), providers=["CPUExecutionProvider"], enable_fallback=0
            )
        except Exception as error:
            raise translated(error, f"{spec.file} cannot be loaded") from error
        self._check_signature()

    def run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], *, release: bool = False) -> None:
        """Run on `inputs`, in the graph's order, into `outputs`; with `release` the arena is given back at the end.

        An output may be an input's memory where the bundle says so (`GraphSpec.in_place`).

        Raises:
            BundleError: the graph cannot be run on these.
            OverBudgetError: the runtime could not get the memory it needs; the outputs are not to be used.
        """
        binding = self._session.io_binding()
        try:
            for spec, tensor in zip(self.spec.inputs, inputs, strict=True):
                tensor.bind_input(binding, spec.name)
            for spec, tensor in zip(self.spec.outputs, outputs, strict=True):
                tensor.bind_output(binding, spec.name)
            self._session.run_with_iobinding(binding, releasing() if release else None)
        except Exception as error:
            found = translated(error, f"{self.spec.file} cannot be run")
            if isinstance(found, OverBudgetError):
                empty_arena()  # a run that fails does not give it back itself
            raise found from error

    def _check_signature(self) -> None:
        inputs = self._session.get_inputs(), self.spec.inputs
        outputs = self._session.get_outputs(), self.spec.outputs
        for found, expected in (inputs, outputs):
            if [argument.name for argument in found] != [tensor.name for tensor in expected]:
                raise BundleError(
                    f"{self.spec.file} has other inputs or outputs than the manifest says; export the bundle again"
                )
            for argument, tensor in zip(found, expected, strict=True):
                if not _fits(argument, tensor):
                    raise BundleError(
                        f"{self.spec.file}: {tensor.name} is {argument.type} {argument.shape}, the manifest says "
                        f"{tensor.dtype} {list(tensor.shape)}; export the bundle again"
                    )


def in_order(spec: GraphSpec, known: Mapping[str, Tensor]) -> list[Tensor]:
    """The inputs of a graph out of all that is known, in its order.

    Raises:
        BundleError: it wants one that is not known.
    """
    missing = [t.name for t in spec.inputs if t.name not in known]
    if missing:
        raise BundleError(
            f"{spec.file} wants {missing[0]!r}, which is not known here; upgrade edgelocal, or export again"
        )
    return [known[t.name] for t in spec.inputs]


def _fits(argument: Any, tensor: TensorSpec) -> bool:
    """Whether an input or output of a session is the tensor; the batch has any name there, or none."""
    shape = tuple(size if isinstance(size, int) else BATCH for size in argument.shape)
    return argument.type == TYPES[tensor.dtype] and shape == tensor.shape
