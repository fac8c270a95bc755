"""Manifests with invented memory models, for tests of the plan: every number is chosen, nothing was exported."""

from __future__ import annotations

from dataclasses import dataclass

from edgelocal.bundle.memory_spec import AffineSpec, MemorySpec, PeakSpec
from edgelocal.bundle.spec import (
    AccumulationSpec,
    AugmentSpec,
    BlockMemorySpec,
    BlockSpec,
    DefaultsSpec,
    GraphSpec,
    InputSpec,
    Manifest,
    OptimizerSpec,
    RuleSpec,
    TaskSpec,
    TensorSpec,
)


@dataclass(frozen=True)
class Invented:
    """A block by its numbers: float32 values of a weight, its momentum and a buffer, widths of input and output, bytes
    that live in a run (fixed, and for each sample), nodes of its step graph, and `spare`, what is needed of the arena's
    region beyond what is touched, in percent of that."""

    weight: int = 100
    buffer: int = 10
    width_in: int = 12
    width_out: int = 8
    fixed: int = 1000
    per_sample: int = 5000
    forward_per_sample: int = 500
    apply: int = 700
    nodes: int = 50
    in_place: bool = True
    known: tuple[int, ...] = (1, 2, 4, 8, 16)
    spare: int = 0


def memory(fixed: int, per_sample: int, known: tuple[int, ...], spare: int) -> MemorySpec:
    """Half of the bytes for each sample are activations, a quarter gradients; the arena wastes a tenth."""
    quarter = per_sample // 4
    zero = AffineSpec(0, 0)
    peak = PeakSpec(AffineSpec(0, 2 * quarter), AffineSpec(fixed, quarter), zero)
    touched = [(fixed + per_sample * n) * 11 // 10 for n in known]
    return MemorySpec((peak,), tuple((n, t, t * (100 + spare) // 100) for n, t in zip(known, touched, strict=True)))


def block(name: str, numbers: Invented, *, last: bool = False) -> BlockSpec:
    """A block with these numbers; the last has no head."""

    def tensor(key: str, *shape: int | str) -> TensorSpec:
        return TensorSpec(key, shape, "float32")

    n = numbers
    x, h, y = tensor("x", "N", n.width_in), tensor("h", "N", n.width_out), TensorSpec("y", ("N",), "int64")
    scalars = tensor("lr"), tensor("momentum")
    weight, slot, buffer = tensor("param/w", n.weight), tensor("opt/momentum/w", n.weight), tensor("buf/mean", n.buffer)
    acc = tensor("acc/w", n.weight)
    losses = tensor("loss"), tensor("correct")

    def new(*tensors: TensorSpec) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(f"new/{t.name}", t.shape, t.dtype) for t in tensors)

    def graph(
        kind: str, inputs: tuple[TensorSpec, ...], outputs: tuple[TensorSpec, ...], safe: tuple[str, ...], nodes: int
    ) -> GraphSpec:
        return GraphSpec(f"{name}/{kind}", inputs, outputs, f"{kind} {n}", safe if n.in_place else (), nodes)

    update = ("param/w", "opt/momentum/w")
    step = graph(
        "step", (x, y, *scalars, weight, slot, buffer), (h, *losses, *new(weight, slot, buffer)), update, n.nodes
    )
    gradient = graph(
        "gradient", (x, y, weight, buffer, acc), (h, *losses, *new(buffer, acc)), ("acc/w", "buf/mean"), n.nodes - 5
    )
    apply = graph("apply", (*scalars, weight, slot, acc), new(weight, slot), update, n.nodes // 5)
    forward = graph("forward", (x, weight, buffer), (h,), (), n.nodes // 4)
    head = None if last else graph("head", (h, weight), (tensor("logits", "N", 4),), (), n.nodes // 5)
    whole = memory(n.fixed, n.per_sample, n.known, n.spare)
    passing = memory(100, n.forward_per_sample, n.known, n.spare)
    return BlockSpec(
        name=name,
        units=(f"unit{name}",),
        step=step,
        forward=forward,
        head=head,
        weights=f"{name}/weights",
        masks=(),
        accumulation=AccumulationSpec(gradient, apply),
        memory=BlockMemorySpec(whole, whole, memory(n.apply, 0, n.known, 0), passing, None if last else passing),
    )


def manifest(*blocks: Invented) -> Manifest:
    """A network of these blocks."""
    specs = tuple(block(f"{i:02}", b, last=i == len(blocks) - 1) for i, b in enumerate(blocks))
    return Manifest(
        network="invented",
        seed=0,
        units=tuple(unit for spec in specs for unit in spec.units),
        rule=RuleSpec("auglocal", 1, 0.5, 1, "merge"),
        input=InputSpec((3, 2, 2), (0.0,), (1.0,)),
        task=TaskSpec("cross_entropy", 4, 0.0, ()),
        optimizer=OptimizerSpec("sgd", {"momentum": 0.9}),
        augment=AugmentSpec(0, "zero", False),
        defaults=DefaultsSpec(16, 1, 0.1, "constant"),
        blocks=specs,
        predict=specs[0].forward,
        versions={},
        files={},
    )
