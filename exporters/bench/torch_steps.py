"""The programs whose memory and time `worker_torch` measures: one step of training, each in one of its modes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from edgelocal.bundle.spec import RuleSpec
from edgelocal.commands.export_options import ExportOptions
from edgelocal.errors import UsageError
from edgelocal.exporters.bench.result import Setting
from edgelocal.exporters.partition import partition
from edgelocal.exporters.request import parse_blocks
from edgelocal.exporters.rules import LocalBlock, build_blocks
from edgelocal.exporters.units import Network

LR = 0.01  # small: random labels at a large rate would soon leave the finite numbers
MODES = ("bp", "compile", "checkpoint", "best", "local")

Forward = Callable[[Tensor], Tensor]
Step = Callable[[Tensor, Tensor], float]  # a batch and its labels -> the loss


@dataclass(frozen=True)
class Mode:
    """How it is trained; `blocks` and `depth` as `edgelocal export` has them, for mode "local"."""

    name: str = "bp"
    segments: int = 0
    blocks: str = "per-unit"
    depth: int = ExportOptions.aux_depth

    def check(self) -> None:
        """Raise UsageError where the number of segments does not go with the mode."""
        if self.name not in MODES:
            raise UsageError(f"--mode is {self.name!r}, expected one of {', '.join(MODES)}")
        if (self.name == "checkpoint") != bool(self.segments):
            raise UsageError(
                f"--mode {self.name} with --segments {self.segments}: 2 or more go with checkpoint, 0 with all others"
            )


def make_step(network: Network, setting: Setting, mode: Mode) -> Step:
    """What does one step of training."""
    if mode.name == "local":
        return local_step(_blocks(network, setting, mode), setting)
    forward: Forward = network.module
    if mode.segments:
        forward = checkpointed(network, mode.segments)
    if mode.name == "compile":
        forward = torch.compile(network.module)
    optimizer = _sgd(network.module)

    def step(x: Tensor, y: Tensor) -> float:
        optimizer.zero_grad()
        with _autocast(setting):
            loss = functional.cross_entropy(forward(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.item()

    return step


def local_step(blocks: Sequence[LocalBlock], setting: Setting) -> Step:
    """Forward, local loss, backward and update of one block after the other; the loss is that of the last.

    What a block needed is freed before the next one begins: its gradients with its update, its values with its
    backward pass but for its output, which is the next one's input.
    """
    optimizers = [_sgd(block) for block in blocks]

    def step(x: Tensor, y: Tensor) -> float:
        for block, optimizer in zip(blocks, optimizers, strict=True):
            x, loss = _block_step(block, optimizer, x, y, setting)
        return loss.item()

    return step


def _block_step(
    block: LocalBlock, optimizer: torch.optim.Optimizer, x: Tensor, y: Tensor, setting: Setting
) -> tuple[Tensor, Tensor]:
    with _autocast(setting):
        h, logits = block(x)
        loss = functional.cross_entropy(logits, y)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    optimizer.zero_grad()
    return h.detach(), loss.detach()


def _blocks(network: Network, setting: Setting, mode: Mode) -> tuple[LocalBlock, ...]:
    """The network as `edgelocal export --rule auglocal` cuts it, in training mode."""
    rule = RuleSpec("auglocal", mode.depth, ExportOptions.tau, ExportOptions.aux_depth_min, ExportOptions.tail)
    blocks = parse_blocks(mode.blocks)
    cut = partition(network, blocks=blocks, rule=rule.name, depth=rule.depth, tail="merge")
    return tuple(block.to(setting.device).train() for block in build_blocks(network, rule, cut, setting.seed))


def _sgd(module: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), LR, momentum=0.9, weight_decay=1e-4, nesterov=True)


def _autocast(setting: Setting) -> AbstractContextManager[object]:
    if setting.precision != "bf16":
        return nullcontext()
    return torch.autocast(setting.device, torch.bfloat16)


def segment_sizes(units: int, segments: int) -> list[int]:
    """`units` in as equal parts as can be, the larger ones last, where resolution and so activations are smaller."""
    return [(units + index) // segments for index in range(segments)]


def checkpointed(network: Network, segments: int) -> Forward:
    """The network with only the inputs of its segments kept in the forward pass (Chen et al. 2016).

    The last segment, with the head, is not recomputed: its backward pass comes at once. The logits and gradients are
    those of plain back-propagation; the running statistics of batch norm are updated once more by the recomputation.

    Raises:
        UsageError: fewer than 2 segments or more than units.
    """
    modules = [unit.module for unit in network.units]
    if not 2 <= segments <= len(modules):
        raise UsageError(f"--segments is {segments}, expected 2 to {len(modules)}, the units of {network.name}")
    parts = iter(modules)
    *early, last = [
        nn.Sequential(*(next(parts) for _ in range(size))) for size in segment_sizes(len(modules), segments)
    ]

    def forward(x: Tensor) -> Tensor:
        for segment in early:
            x = checkpoint(segment, x, use_reentrant=False)
        logits: Tensor = network.head(last(x))
        return logits

    return forward
