"""Multiply-accumulates (MACs) of pieces of a network, counted on fake tensors: nothing is computed.

Products of matrices, convolutions and attention count; additions, norms and activations do not. Training is the forward
pass, the gradients of the weights and those of the inputs, of which one is left out: nobody asks for the gradient of a
block's input, so the first module of a block that has weights does not compute it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from edgelocal.bundle.spec import MacsSpec
from edgelocal.exporters.guest import network_errors
from edgelocal.exporters.rules import LocalBlock
from edgelocal.exporters.structure import structure

_PROBE_BATCH = 2  # batch norm over a map of one pixel refuses a batch of one
_FLOPS_PER_MAC = 2

aten = torch.ops.aten


@dataclass(frozen=True)
class Work:
    """MACs of a piece for one sample.

    `forward` alone; forward and backward with the gradient of the input (`inner`) and without it (`first`). `trains`
    says whether it has weights to train, so that what follows it in a block must hand a gradient back.
    """

    forward: int
    first: int
    inner: int
    trains: bool


@dataclass(frozen=True)
class Counted:
    """A piece, what it computes, and what it puts out: shape without the batch, dtype.

    Pieces of equal `kind` are the same but for the values of their weights, and read inputs of the same shape.
    """

    work: Work
    shape: tuple[int, ...]
    dtype: torch.dtype
    kind: int


NOTHING = Work(0, 0, 0, trains=False)


def chain(pieces: Iterable[Work]) -> Work:
    """Pieces one after the other, as one. Empty: no work at all."""
    whole = NOTHING
    for piece in pieces:
        rest = piece.inner if whole.trains else piece.first
        whole = Work(
            whole.forward + piece.forward, whole.first + rest, whole.inner + piece.inner, whole.trains or piece.trains
        )
    return whole


class Counter:
    """Counts pieces, each structure on each input shape once. Their weights may be on the meta device, for speed."""

    def __init__(self) -> None:
        self._known: dict[Any, Counted] = {}

    def piece(self, module: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> Counted:
        """Count `module`, in its present mode, on input (N, *shape).

        Raises:
            ExportError: it does not run, or has no backward.
        """
        looks = structure([module])
        key = object() if looks is None else (looks, shape, dtype)
        if key not in self._known:
            work, y = _count(module, shape, dtype)
            self._known[key] = Counted(work, tuple(y.shape[1:]), y.dtype, len(self._known))
        return self._known[key]

    def pieces(self, modules: Iterable[nn.Module], shape: tuple[int, ...], dtype: torch.dtype) -> list[Counted]:
        """Count modules that run in sequence, the first on input (N, *shape)."""
        found: list[Counted] = []
        for module in modules:
            found.append(self.piece(module, shape, dtype))
            shape, dtype = found[-1].shape, found[-1].dtype
        return found

    def parts(self, module: nn.Module) -> Sequence[nn.Module]:
        """What `module` runs in sequence: itself, or its children if it is a plain nn.Sequential.

        Auxiliary networks differ in the order of a few equal parts, which are counted once each.
        """
        return list(module) if type(module) is nn.Sequential and len(module) else [module]


def block_macs(
    block: LocalBlock, input_shape: tuple[int, ...], dtype: torch.dtype, counter: Counter | None = None
) -> MacsSpec:
    """MACs of `block` for one sample of `input_shape` (without the batch), its own part and its auxiliary network.

    A `counter` shared by the blocks of a network counts what they have in common once.

    Raises:
        ExportError: a module does not run on its input, or has no backward.
    """
    counter = counter or Counter()
    body = counter.pieces(block.body, input_shape, dtype)
    if block.head is not None:
        body += counter.pieces([block.head], body[-1].shape, body[-1].dtype)
    own = chain(piece.work for piece in body)
    behind = NOTHING
    if block.auxiliary is not None:
        parts = counter.pieces(counter.parts(block.auxiliary), body[-1].shape, body[-1].dtype)
        behind = chain(piece.work for piece in parts)
    return MacsSpec(own.forward, behind.forward, own.first, behind.inner if own.trains else behind.first)


def _count(module: nn.Module, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Work, Tensor]:
    where = f"counting the operations of {type(module).__name__} on input (N, {', '.join(map(str, shape))})"
    with network_errors(where), FakeTensorMode(allow_non_fake_inputs=True) as mode:
        x = torch.empty(_PROBE_BATCH, *shape, dtype=dtype)
        forward, first, y = _run(mode, module, x)
        inner = first
        if x.is_floating_point():
            _, inner, _ = _run(mode, module, x.detach().requires_grad_())
    trains = any(p.requires_grad for p in module.parameters())
    return Work(forward, first, inner, trains), y


def _run(mode: FakeTensorMode, module: nn.Module, x: Tensor) -> tuple[int, int, Tensor]:
    """(MACs of the forward, of forward and backward, output)"""
    state = {name: _fake(mode, tensor) for name, tensor in (*module.named_parameters(), *module.named_buffers())}
    counter = FlopCounterMode(display=False, custom_mapping=_FORMULAS)
    with counter, torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the one whose products are there to be counted
        y = torch.func.functional_call(module, state, (x,))
        forward = counter.get_total_flops()
        if y.requires_grad:
            y.backward(torch.empty_like(y))
    scale = _FLOPS_PER_MAC * _PROBE_BATCH
    return forward // scale, counter.get_total_flops() // scale, y.detach()


def _fake(mode: FakeTensorMode, tensor: Tensor) -> Tensor:
    """A fake leaf for `tensor`, which stays as it is: batch norm counts its batches in place."""
    fake = torch.empty_like(tensor, device="cpu") if tensor.is_meta else mode.from_tensor(tensor).detach().clone()
    return fake.requires_grad_(tensor.requires_grad)


def _convolution_backward(
    gradient: Sequence[int], x: Sequence[int], weight: Sequence[int], *rest: Any, out_shape: Any = None, **_: Any
) -> int:
    """Either gradient multiplies as often as the forward pass; PyTorch's own formula errs for grouped convolutions."""
    transposed, wanted = rest[4], rest[7]
    forward = int(conv_flop_count(list(x), list(weight), list(gradient), transposed=transposed))
    return forward * sum(map(bool, wanted[:2]))


def _mv(matrix: Sequence[int], vector: Sequence[int], *_: Any, **__: Any) -> int:
    return _FLOPS_PER_MAC * matrix[0] * matrix[1]


def _dot(left: Sequence[int], right: Sequence[int], *_: Any, **__: Any) -> int:
    return _FLOPS_PER_MAC * left[0]


_FORMULAS = {aten.convolution_backward: _convolution_backward, aten.mv: _mv, aten.dot: _dot}
