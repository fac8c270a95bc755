"""The memory model of a graph: what lives at its peak, by kind, as a function of the batch."""

from __future__ import annotations

from collections.abc import Iterable

from edgelocal.bundle.memory_spec import AffineSpec, MemorySpec, PeakSpec
from edgelocal.exporters.memory.liveness import Graph, Op, buffers
from edgelocal.exporters.memory.recompute import AGAIN
from edgelocal.exporters.memory.shapes import Size
from edgelocal.exporters.memory.simulate import arena_after

KINDS = ("activations", "gradients", "workspace")
_LAYOUT = frozenset(("Pad", "Slice", "Transpose", "Concat", "Unsqueeze", "Expand"))
_CONV_BUFFER_BYTES = 128 << 10  # a thread's share of the unrolled input, in the runtime's convolution
_CONV_THREADS = 4
_BATCHES = (*range(1, 17), 20, 24, 28, 32, 40, 48, 56, 64, 80, 96, 112, 128, 160, 192, 224, 256, 384, 512)


def memory_model(graph: Graph, batch: int, loss: str | None) -> MemorySpec:
    """The peaks of a run as functions of the batch; `loss` names the value that ends the forward pass, if there is a
    backward pass.

    A moment is kept if it is the peak for some batch.
    """
    moments = _moments(graph, loss)
    batches = sorted({*_BATCHES, batch})
    return MemorySpec(tuple(_envelope(moments, batches)), tuple((n, *_need(graph, n)) for n in batches))


def _need(graph: Graph, batch: int) -> tuple[int, int]:
    """Bytes that a run touches, and those of the arena's region. What kernels take from the system is counted in both,
    which makes the region a little larger than need be."""
    arena = arena_after(graph, batch, scratch)
    touched = arena.peak + max((_beside(op, graph).at(batch) for op in graph.ops), default=0)
    return touched, max(touched, arena.room)


def scratch(op: Op) -> int:
    """Bytes that the runtime's kernel takes while it runs, besides inputs and outputs."""
    return _CONV_BUFFER_BYTES * _CONV_THREADS if op.kind in ("Conv", "ConvTranspose") else 0


def _beside(op: Op, graph: Graph) -> Size:
    """Bytes that the runtime's kernel takes while it runs from the system's memory, not from the arena: a scatter that
    adds copies its indices (found by running every kind of node of the zoo's step graphs alone)."""
    return graph.types[op.inputs[1]].size if op.kind == "ScatterElements" else Size(0, 0)


def _moments(graph: Graph, loss: str | None) -> list[PeakSpec]:
    """What lives while each node runs."""
    end = next((i for i, op in enumerate(graph.ops) if loss in op.outputs), len(graph.ops))
    live: dict[str, tuple[str, Size]] = {}
    moments = []
    for number, new, dead in buffers(graph):
        op = graph.ops[number]
        for name in new:
            forward = number <= end or name.endswith(AGAIN)
            kind = "activations" if forward else "workspace" if op.kind in _LAYOUT else "gradients"
            live[name] = kind, graph.types[name].size
        beside = _beside(op, graph)
        moments.append(_peak(live.values(), Size(beside.fixed + scratch(op), beside.per_sample)))
        for name in dead:
            live.pop(name, None)
    return moments


def _peak(live: Iterable[tuple[str, Size]], extra: Size) -> PeakSpec:
    fixed = dict.fromkeys(KINDS, 0)
    per_sample = dict.fromkeys(KINDS, 0)
    for kind, size in live:
        fixed[kind] += size.fixed
        per_sample[kind] += size.per_sample
    fixed["workspace"] += extra.fixed
    per_sample["workspace"] += extra.per_sample
    return PeakSpec(*(AffineSpec(fixed[kind], per_sample[kind]) for kind in KINDS))


def _envelope(moments: list[PeakSpec], batches: Iterable[int]) -> list[PeakSpec]:
    """The moments that are the largest for some batch."""
    best = [max(moments, key=lambda m: m.at(n)) for n in batches]
    return list(dict.fromkeys(best))
