"""(block, loss) -> one module whose outputs are what a step graph returns."""

from __future__ import annotations

import torch
from torch import nn

from edgelocal.bundle.spec import TaskSpec
from edgelocal.exporters.losses import loss, metrics
from edgelocal.exporters.rules import LocalBlock


class LocalStep(nn.Module):
    """Forward pass and local loss of a block: (x, y) -> (loss, h, *metric sums), h detached."""

    def __init__(self, block: LocalBlock, task: TaskSpec) -> None:
        super().__init__()
        self.block = block
        self.task = task

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> tuple[torch.Tensor, ...]:
        h, logits = self.block(x)
        sums = metrics(logits.detach(), y, self.task)
        return loss(logits, y, self.task), h.detach(), *sums.values()


class Forward(nn.Module):
    """The block without its auxiliary: x -> (h,)."""

    def __init__(self, block: LocalBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        h: torch.Tensor = self.block.body(x)
        return (h if self.block.head is None else self.block.head(h),)


class Head(nn.Module):
    """The auxiliary network alone: h -> (logits,)."""

    def __init__(self, block: LocalBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, h: torch.Tensor) -> tuple[torch.Tensor]:
        assert self.block.auxiliary is not None, "only blocks with an auxiliary have a head"
        return (self.block.auxiliary(h),)
