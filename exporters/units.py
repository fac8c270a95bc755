"""A network as a sequence of units: the value every later stage of the export works on.

`load_network` makes it from a reference, `check_composition` shows that nothing was lost on the way. A unit holds the
very module objects of the plain network, so parameter names and weights stay those of the original.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from edgelocal.errors import ExportError
from edgelocal.exporters.guest import network_errors

Fresh = Callable[[int, int, int], nn.Module]
AuxHead = Callable[[int, int, int], nn.Module]

COMPOSITION_TOLERANCE = 1e-6
_PROBE_BATCH = 2


@dataclass(frozen=True)
class Unit:
    """The smallest piece a network may be cut into.

    `width` is the base width the selection of auxiliary layers reasons with; the output has `width * expansion`
    channels (bottleneck residual blocks widen fourfold). `fresh(in_channels, width, stride)` builds a new, untrained
    unit of the same type whose output again has `width * expansion` channels.
    """

    name: str
    module: nn.Module
    width: int
    fresh: Fresh
    expansion: int = 1

    @property
    def channels(self) -> int:
        """Channels (or features) of the unit's output."""
        return self.width * self.expansion


@dataclass(frozen=True)
class Network:
    """A plain module and the same module as units and a head.

    `head` maps the last unit's output to logits (N, classes). `aux_head(channels, classes, depth)` builds the end of an
    auxiliary network of `depth` layers. `input_shape` is one sample without the batch, of `input_dtype`: float32, or
    int64 for token ids. `downsampling` says when a
    fresh unit inside an auxiliary halves the resolution: "ratio", once for every doubling of the width; "change",
    whenever the width changes.
    """

    name: str
    module: nn.Module
    units: tuple[Unit, ...]
    head: nn.Module
    aux_head: AuxHead
    input_shape: tuple[int, ...]
    classes: int
    downsampling: Literal["ratio", "change"] = "ratio"
    input_dtype: torch.dtype = torch.float32


class GlobalMean(nn.Module):
    """Mean over everything but batch and channels: (N, C, H, W) and (N, T, C) -> (N, C); (N, C) stays."""

    def forward(self, x: Tensor) -> Tensor:
        """See the class; any other rank is an `ExportError`."""
        if x.dim() == 4:
            return x.mean((2, 3))
        if x.dim() == 3:
            return x.mean(1)
        if x.dim() == 2:
            return x
        raise ExportError(f"a unit's output has {x.dim()} dimensions, expected (N, C, H, W), (N, T, C) or (N, C)")


def pooled_linear(channels: int, classes: int, depth: int = 0) -> nn.Module:
    """The plainest classifier behind any unit: `GlobalMean`, then Linear. `depth` is not used."""
    return nn.Sequential(GlobalMean(), nn.Linear(channels, classes))


def load_network(
    reference: str, input_shape: Sequence[int], classes: int, seed: int, dtype: torch.dtype = torch.float32
) -> Network:
    """Zoo name, `package.module:callable` or `file.py:callable` -> checked Network, initialised from `seed`.

    A module from elsewhere names its units by being an `nn.Sequential` or by a method `edgelocal_units()`
    (see `edgelocal.exporters.zoo.custom`).

    Raises:
        ExportError: the reference, the module it leads to, or its shapes cannot be used.
    """
    from edgelocal.exporters.zoo import build, custom

    shape = tuple(input_shape)
    if not shape or min(shape) < 1 or classes < 1:
        raise ExportError(f"found input shape {shape} and {classes} classes, expected positive numbers")
    with seeded(seed, "network"):
        own = ":" in reference or reference.endswith(".py")
        if not own and dtype != torch.float32:
            raise ExportError(f"{reference} takes float32 inputs, --input asks for {dtype}; leave the dtype out")
        network = custom.build(reference, shape, classes, dtype) if own else build(reference, shape, classes)
    _check_output(network)
    _check_ownership(network)
    return network


def check_composition(network: Network) -> None:
    """Run units and head one after the other against the plain module, in inference mode on random input.

    Raises:
        ExportError: the network does not run, its output is not float32 or not finite, or the largest difference
            exceeds 1e-6 of the largest output.
    """
    where = f"{network.name}: a run on input ({_PROBE_BATCH}, {_join(network.input_shape)})"
    with network_errors(where), evaluating(network.module, *pieces(network)), torch.no_grad():
        x = torch.randn(_PROBE_BATCH, *network.input_shape, generator=torch.Generator().manual_seed(0))
        x = x.to(network.input_dtype).clamp_min(0) if network.input_dtype == torch.int64 else x
        whole = network.module(x)
        parts = x
        for piece in pieces(network):
            parts = piece(parts)
    if whole.dtype != torch.float32:
        raise ExportError(f"{network.name} puts out {whole.dtype}, expected torch.float32; convert in forward()")
    if whole.shape != parts.shape:
        raise ExportError(
            f"{network.name}: the units in sequence give {tuple(parts.shape)}, the module gives {tuple(whole.shape)}; "
            "name every step of forward() in the units"
        )
    error = float((whole - parts).abs().max() / whole.abs().max().clamp_min(torch.finfo(whole.dtype).tiny))
    if not error <= COMPOSITION_TOLERANCE:
        raise ExportError(
            f"{network.name}: the units in sequence differ from the module by {error:.3g} of the largest output, "
            f"expected at most {COMPOSITION_TOLERANCE:g}; the units must do all that forward() does, in the same order"
        )


def check_dtypes(module: nn.Module, name: str) -> None:
    """Parameters and buffers with a fraction must be float32, the one such type a bundle holds.

    Raises:
        ExportError: one is not; the message names it.
    """
    for key, tensor in module.state_dict().items():
        fractional = isinstance(tensor, Tensor) and (tensor.is_floating_point() or tensor.is_complex())
        if fractional and tensor.dtype != torch.float32:
            raise ExportError(
                f"{name}: {key} is {tensor.dtype}, expected torch.float32; leave out .double(), .half() and the like, "
                "or call .float() on the module"
            )


def pieces(network: Network) -> tuple[nn.Module, ...]:
    """The modules that in sequence make the network: every unit, then the head."""
    return (*(unit.module for unit in network.units), network.head)


def output_shapes(
    modules: Sequence[nn.Module], input_shape: tuple[int, ...], name: str, dtype: torch.dtype = torch.float32
) -> list[tuple[int, ...]]:
    """Output shape of each of `modules` run in sequence, without the batch; nothing is computed.

    Raises:
        ExportError: a module does not run on its input, or returns something else than one batch of tensors.
    """
    shapes: list[tuple[int, ...]] = []
    with evaluating(*modules), _silent_probe(), torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True):
        x = torch.empty(_PROBE_BATCH, *input_shape, dtype=dtype)
        for index, module in enumerate(modules):
            where = f"{name}: piece {index} ({type(module).__name__}) on input {tuple(x.shape)}"
            x = _probe(module, x, where)
            shapes.append(tuple(x.shape[1:]))
    return shapes


@contextlib.contextmanager
def evaluating(*modules: nn.Module) -> Iterator[None]:
    """Inference mode for `modules`; on leaving, every submodule has its own mode back."""
    modes = {part: part.training for module in modules for part in module.modules()}
    for module in modules:
        module.eval()
    try:
        yield
    finally:
        for part, mode in modes.items():
            part.training = mode


@contextlib.contextmanager
def seeded(seed: int, label: str) -> Iterator[None]:
    """PyTorch's CPU generator seeded by sha256 of `seed` and `label`; the outer state returns afterwards.

    Distinct labels give unrelated streams, so an auxiliary never starts as a copy of the network's weights.
    """
    digest = hashlib.sha256(f"{seed}/{label}".encode()).digest()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(digest[-4:], "big"))
        yield


@contextlib.contextmanager
def _silent_probe() -> Iterator[None]:
    """A probe that fails is told by our error; PyTorch would log its traceback as well."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _probe(module: nn.Module, x: Tensor, where: str) -> Tensor:
    with network_errors(where):
        y = module(x)
    if not isinstance(y, Tensor) or y.dim() < 2 or y.shape[0] != _PROBE_BATCH:
        found = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise ExportError(f"{where} returned {found}, expected one tensor ({_PROBE_BATCH}, ...)")
    return y


def _check_output(network: Network) -> None:
    (shape,) = output_shapes([network.module], network.input_shape, network.name, network.input_dtype)
    if shape != (network.classes,):
        raise ExportError(
            f"{network.name}: input (N, {_join(network.input_shape)}) gives output (N, {_join(shape)}), expected "
            f"(N, {network.classes}); set --classes or --input, or end the module in {network.classes} outputs"
        )


def _check_ownership(network: Network) -> None:
    """Every parameter of the module belongs to exactly one piece, and no piece has others."""
    names = {id(p): name for name, p in network.module.named_parameters()}
    owner: dict[int, str] = {}
    for label, piece in zip([*(u.name for u in network.units), "head"], pieces(network), strict=True):
        for inner, parameter in piece.named_parameters():
            if id(parameter) not in names:
                raise ExportError(f"{network.name}: {inner} of {label} is no parameter of the module itself")
            first = owner.setdefault(id(parameter), label)
            if first != label:
                raise ExportError(
                    f"{network.name}: parameter {names[id(parameter)]} is shared by {first} and {label}; blocks train "
                    "apart, so give each its own copy, or join both into one unit"
                )
    missing = [name for key, name in names.items() if key not in owner]
    if missing:
        raise ExportError(f"{network.name}: parameters {missing[:5]} are in no unit; name every module in the units")


def _join(shape: tuple[int, ...]) -> str:
    return ", ".join(map(str, shape))
