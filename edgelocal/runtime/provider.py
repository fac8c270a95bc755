"""What graphs run on: the CPU, or a device with an execution provider of its own, and how a session is made there."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from edgelocal.bundle.spec import BATCH
from edgelocal.errors import RuntimeMissingError
from edgelocal.runtime.arena import releasing, session_options
from edgelocal.runtime.library import CPU_PROVIDER, runtime
from edgelocal.runtime.tensor import HOST, Place, Tensor
from edgelocal.runtime.tiny import tiny_model

# Of the runtime's passes over a graph, all but the folding of constants: they reorder, fuse, and undo recomputation.
_OTHER_PASSES = (
    *("ConstantSharing", "CommonSubexpressionElimination", "MatMulAddFusion", "ReshapeFusion", "GeluFusionL1"),
    *("LayerNormFusionL1", "SimplifiedLayerNormFusion", "QDQPropagationTransformer", "EnsureUniqueDQForNodeUnit"),
    *("TransposeOptimizer", "Level1_RuleBasedTransformer", "DoubleQDQPairsRemover", "MatmulTransposeFusion"),
    *("ClipQuantRewrite", "WhereDummyDq", "PreShapeNodeElimination"),
)
_RECORD = "session.record_ep_graph_assignment_info"
_REFUSE = "session.disable_cpu_ep_fallback"


@dataclass(frozen=True)
class Provider:
    """An execution provider of the runtime.

    `arena` names its arena in run options. With `fixed_batch` every session is for one size of the batch, and what only
    depends on sizes is computed when it is loaded: a graph that asks for the shape of a tensor does so on the CPU, and
    the runtime would bring other nodes there with it. `may_fall_back`: whether nodes may run on the CPU; `strays`
    counts those that do, by operator, as far as the runtime says (`tells`). `one_arena`: whether tensors that are made
    outside of a run come from the arena that runs use.
    """

    name: str = CPU_PROVIDER
    place: Place = HOST
    options: Mapping[str, str] = field(default_factory=dict)
    arena: str = "cpu:0"
    fixed_batch: bool = False
    may_fall_back: bool = True
    one_arena: bool = True
    strays: Counter[str] = field(default_factory=Counter, compare=False)

    @property
    def tells(self) -> bool:
        """Whether the runtime says which provider a node was given; from 1.24.1 on it does."""
        return hasattr(runtime().InferenceSession, "get_provider_graph_assignment_info")

    def session(self, model: bytes, threads: int, batch: int | None) -> Any:
        """A session of the runtime, for this batch where it is fixed.

        Raises:
            RuntimeMissingError: nodes would run on the CPU, and may not; or the runtime left the provider out.
            Exception: whatever the runtime raises.
        """
        ort = runtime()
        options = session_options(threads)
        disabled = None
        if batch is not None:
            options.add_free_dimension_override_by_name(BATCH, batch)
            options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
            disabled = list(_OTHER_PASSES)
        elsewhere = self.name != CPU_PROVIDER
        if elsewhere and (self.tells or not self.may_fall_back):
            options.add_session_config_entry(_RECORD if self.tells else _REFUSE, "1")
        # No fallback: it prints to stdout and tries the same once more.
        session = ort.InferenceSession(
            model,
            options,
            providers=[(self.name, dict(self.options))] if elsewhere else [self.name],
            disabled_optimizers=disabled,
            enable_fallback=0,
        )
        if elsewhere:
            self._check(session)
        return session

    def give_back(self) -> None:
        """Free what the arena holds and no tensor uses, by way of a run that needs next to nothing of it.

        The run has no input, whose copy on the device would lie in the arena and keep its region there.
        """
        session = self.session(tiny_model([("Exp", ("c",), "y")], {}, ("y", (1,)), ["c"]), 1, None)
        binding = session.io_binding()
        y = Tensor(np.empty(1, np.float32))
        y.bind_output(binding, "y")
        session.run_with_iobinding(binding, releasing(self.arena))

    def _check(self, session: Any) -> None:
        """That the session is one of this provider, and its nodes are."""
        if self.name not in session.get_providers():
            raise RuntimeMissingError(
                f"the runtime left {self.name} out of a session and would go on with the CPU: `edgelocal doctor` says "
                "what is missing; or train with --device cpu"
            )
        if self.tells:
            found = stray_nodes(session, self.name)
            if not self.may_fall_back:
                refuse_strays(found, self.name)
            self.strays.update(found)


CPU = Provider()


def stray_nodes(session: Any, provider: str) -> Counter[str]:
    """How many nodes, by operator, another provider than this was given."""
    parts = session.get_provider_graph_assignment_info()
    return Counter(node.op_type for part in parts if part.ep_name != provider for node in part.get_nodes())


def refuse_strays(found: Counter[str], provider: str) -> None:
    """Raise RuntimeMissingError if there are any."""
    if found:
        listed = ", ".join(f"{count} {name}" for name, count in found.most_common())
        raise RuntimeMissingError(
            f"{provider} has no kernel for {found.total()} nodes, which would run on the CPU ({listed}): use a newer "
            "onnxruntime-gpu, --device cpu, or --allow-cpu-fallback"
        )
