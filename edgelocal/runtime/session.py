"""Model bytes -> something that runs. Every run gets its inputs and outputs in memory of ours; what lives only while it
runs comes from the arena (see `edgelocal.runtime.arena`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from edgelocal.bundle.onnx_scan import scan
from edgelocal.bundle.spec import BATCH, GraphSpec, TensorSpec
from edgelocal.errors import BundleError, EdgelocalError, OverBudgetError
from edgelocal.memory.peaks import SESSIONS
from edgelocal.runtime.arena import UNPLANNED, empty_arena, releasing, reserve
from edgelocal.runtime.library import translated
from edgelocal.runtime.provider import CPU, Provider
from edgelocal.runtime.tensor import Tensor

TYPES = {"float32": "tensor(float)", "int64": "tensor(int64)", "bool": "tensor(bool)"}


class Graph:
    """A loaded ONNX graph of a bundle.

    Raises:
        BundleError: the model holds what no graph of a bundle has, the runtime cannot load it, or it is not the one
            the manifest describes.
        OverBudgetError: no memory to load it.
    """

    def __init__(
        self, spec: GraphSpec, model: bytes, threads: int, *, provider: Provider = CPU, training: bool = False
    ) -> None:
        self.spec = spec
        scan(model, spec.file, training=training)
        reserve(UNPLANNED)
        self._open = partial(provider.session, model, threads)
        self._provider = provider
        self._sessions: dict[int | None, Any] = {}
        if not provider.fixed_batch:
            self._session(None)

    def run(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], *, release: bool = False) -> None:
        """Run on `inputs`, in the graph's order, into `outputs`; with `release` the arena is given back at the end.

        An output may be an input's memory where the bundle says so (`GraphSpec.in_place`).

        Raises:
            BundleError: the graph cannot be run on these.
            OverBudgetError: the runtime could not get the memory it needs; the outputs are not to be used.
        """
        session = self._session(self._batch(inputs) if self._provider.fixed_batch else None)
        binding = session.io_binding()
        try:
            for spec, tensor in zip(self.spec.inputs, inputs, strict=True):
                tensor.bind_input(binding, spec.name)
            for spec, tensor in zip(self.spec.outputs, outputs, strict=True):
                tensor.bind_output(binding, spec.name)
            session.run_with_iobinding(binding, releasing(self._provider.arena) if release else None)
        except Exception as error:
            found = translated(error, f"{self.spec.file} cannot be run")
            if isinstance(found, OverBudgetError):
                empty_arena()  # a run that fails does not give it back itself
            raise found from error

    def _batch(self, inputs: Sequence[Tensor]) -> int:
        """The number of samples that the inputs hold; 1 for a graph that takes none."""
        sizes = (
            t.shape[s.shape.index(BATCH)] for s, t in zip(self.spec.inputs, inputs, strict=True) if BATCH in s.shape
        )
        return next(sizes, 1)

    def _session(self, batch: int | None) -> Any:
        """The session for this size of the batch; None: for all."""
        if batch not in self._sessions:
            try:
                session = self._open(batch)
            except EdgelocalError:
                raise
            except Exception as error:
                raise translated(error, f"{self.spec.file} cannot be loaded") from error
            self._check_signature(session, batch)
            if len(self._sessions) == SESSIONS:
                del self._sessions[next(iter(self._sessions))]
            self._sessions[batch] = session
        self._sessions[batch] = self._sessions.pop(batch)  # the last used is dropped last
        return self._sessions[batch]

    def _check_signature(self, session: Any, batch: int | None) -> None:
        inputs = session.get_inputs(), self.spec.inputs
        outputs = session.get_outputs(), self.spec.outputs
        for found, expected in (inputs, outputs):
            if [argument.name for argument in found] != [tensor.name for tensor in expected]:
                raise BundleError(
                    f"{self.spec.file} has other inputs or outputs than the manifest says; export the bundle again"
                )
            for argument, tensor in zip(found, expected, strict=True):
                if not _fits(argument, tensor, batch):
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


def _fits(argument: Any, tensor: TensorSpec, batch: int | None) -> bool:
    """Whether an input or output of a session is the tensor; the batch has any name there, or none, or is fixed."""
    found = tuple(size if isinstance(size, int) else BATCH for size in argument.shape)
    shapes = (tensor.shape, tensor.shape if batch is None else tensor.resolve(batch))
    return argument.type == TYPES[tensor.dtype] and found in shapes
