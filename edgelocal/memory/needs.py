"""What one block of a bundle needs: sums over its manifest, made once, so that a plan is a few hundred additions.

A batch goes through a block whole, or in micro-batches whose gradients add up. The two ways run other graphs, so they
differ in what the arena takes, in what a step writes anew, and in the graphs that are loaded.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache

from edgelocal.bundle.memory_spec import AffineSpec, ArenaBytes, MemorySpec
from edgelocal.bundle.spec import BlockMemorySpec, BlockSpec, GraphSpec, TensorSpec, graph_bytes

ITEM_BYTES = {"float32": 4, "int64": 8, "bool": 1}
DEVICE_ALIGNMENT = 256  # bytes; what a device's arena hands out is of whole multiples
_OTHER_TENSORS = 256  # inputs, outputs, masks, hyper-parameters
THREAD_BYTES = 60 << 10  # what a thread touches; a loaded graph has one for each of --threads beyond the first
KIND_OF = {"param": "parameters", "opt": "optimizer", "buf": "buffers"}
# Code and tables of the runtime that its first steps touch, and what convolutions add (measured, docs/promises.md).
RUNTIME_BYTES, CONVOLUTION_BYTES = 13 << 18, 9 << 18


@dataclass(frozen=True)
class DeviceNeeds:
    """A device with a provider of its own, in bytes: what the process holds there before it plans (`context`, part of
    the idle process), what it may take there in all (`most`; None: no more is known than the budget), what kernels take
    of the arena besides tensors (`workspace`), and what every loaded graph brings of handles, outside of the arena.
    `shared` says whether its memory is the host's; where not, `host` is what the process may take there."""

    context: int
    most: int | None
    workspace: int
    handles: int
    shared: bool
    host: int | None = None


@dataclass(frozen=True)
class PipelineBytes:
    """What the data pipeline holds: all the time, and besides at most while a batch is made."""

    resident: int
    making: int

    @property
    def total(self) -> int:
        """All of it, at its most."""
        return self.resident + self.making


@dataclass(frozen=True)
class Way:
    """One way of a batch through a block: the model of its larger graph, the graphs it runs, and `written`, the bytes
    by kind of what it keeps outside of the arena besides the state."""

    model: MemorySpec
    floor: ArenaBytes  # what the update needs that follows the micro-batches
    graphs: tuple[GraphSpec, ...]
    written: dict[str, int]

    def arena(self, samples: int) -> ArenaBytes:
        """What it needs of the arena with so many samples at a time."""
        return self.model.arena_at(samples).joined(self.floor)


@dataclass(frozen=True)
class BlockNeeds:
    """A block's sums in bytes; `source` and `input` and `output` grow with the batch, `source` being x alone."""

    spec: BlockSpec
    memory: BlockMemorySpec
    state: dict[str, int]
    state_bytes: int
    source: AffineSpec
    input: AffineSpec
    output: AffineSpec
    whole: Way
    parts: Way

    @property
    def passes(self) -> tuple[GraphSpec, ...]:
        """The graphs of inference mode."""
        return (self.spec.forward,) if self.spec.head is None else (self.spec.forward, self.spec.head)

    def forward_arena(self, batch: int) -> ArenaBytes:
        """What a batch that passes through the block in inference mode needs of the arena."""
        return self.memory.forward.arena_at(batch)

    def exit_arena(self, batch: int) -> ArenaBytes:
        """The same, through its head too where it has one."""
        passing, head = self.forward_arena(batch), self.memory.head
        return passing if head is None else passing.joined(head.arena_at(batch))


def block_needs(spec: BlockSpec) -> BlockNeeds:
    """The sums of a block that has a memory model."""
    assert spec.memory is not None, "plans are for bundles with a memory model"
    assert spec.accumulation is not None, "as above"
    memory, second = spec.memory, spec.accumulation
    inputs = [(t.kind, t) for t in spec.step.inputs]
    state = _by_kind((kind, t) for kind, t in inputs if kind in KIND_OF)
    sums = sum(tensor_bytes(t) for t in second.gradient.inputs if t.kind == "acc")
    copies = max(_copies(second.gradient), _copies(second.apply), key=lambda kinds: sum(kinds.values()))
    return BlockNeeds(
        spec=spec,
        memory=memory,
        state=state,
        state_bytes=sum(state.values()),
        source=_affine((spec.step.inputs[0],)),
        input=_affine(t for kind, t in inputs if kind in ("", "rand")),
        output=_affine((spec.step.outputs[0],)),
        whole=Way(memory.step, ArenaBytes(0, 0), (spec.step,), _copies(spec.step)),
        parts=Way(
            memory.gradient,
            memory.apply.arena_at(1),
            (second.gradient, second.apply),
            copies | {"gradients": copies.get("gradients", 0) + sums},
        ),
    )


def rounding_bytes(needs: Iterable[BlockNeeds]) -> int:
    """What tensors of a device lie apart at most: all states, and the few others that are there at a time."""
    return DEVICE_ALIGNMENT * (_OTHER_TENSORS + sum(len(n.spec.state()) for n in needs))


def loaded_bytes(graph: GraphSpec, threads: int) -> int:
    """Bytes of a loaded graph with the threads it runs on."""
    return graph_bytes(graph) + THREAD_BYTES * (threads - 1)


def tensor_bytes(tensor: TensorSpec, batch: int = 1) -> int:
    """Bytes of a tensor with `batch` samples."""
    return _tensor_affine(tensor.shape, tensor.dtype).at(batch)


def _copies(graph: GraphSpec) -> dict[str, int]:
    """New values that a run writes beside the old ones, by kind."""
    overwriting = graph.overwriting
    new = (t for t in graph.outputs if t.name.startswith("new/") and t.name not in overwriting)
    return _by_kind((t.name.split("/")[1], t) for t in new)


def _by_kind(tensors: Iterable[tuple[str, TensorSpec]]) -> dict[str, int]:
    found: dict[str, int] = {}
    for kind, tensor in tensors:
        name = KIND_OF.get(kind, "gradients")  # sums of gradients are new/acc/...
        found[name] = found.get(name, 0) + tensor_bytes(tensor)
    return found


def _affine(tensors: Iterable[TensorSpec]) -> AffineSpec:
    each = [_tensor_affine(t.shape, t.dtype) for t in tensors]
    return AffineSpec(sum(a.fixed for a in each), sum(a.per_sample for a in each))


@cache
def _tensor_affine(shape: tuple[int | str, ...], dtype: str) -> AffineSpec:
    """The batch occurs once in a shape, or not at all."""
    size = math.prod(d for d in shape if isinstance(d, int)) * ITEM_BYTES[dtype]
    return AffineSpec(0, size) if any(isinstance(d, str) for d in shape) else AffineSpec(size, 0)


def has_convolutions(blocks: Iterable[BlockSpec]) -> bool:
    """Whether any weight has three dimensions or more, as those of convolutions have."""
    return any(t.kind == "param" and len(t.shape) >= 3 for block in blocks for t in block.step.inputs)


def runtime_bytes(convolves: bool) -> int:
    """What the runtime takes besides graphs and arena, for networks with or without convolutions."""
    return RUNTIME_BYTES + convolves * CONVOLUTION_BYTES
