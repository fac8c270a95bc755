"""The same training in eager PyTorch: what every exported graph is compared with.

One sweep over the blocks: forward, local loss, backward, update, and the next block gets the detached output. As a
block sees only detached input, updating at once equals updating all blocks at the end of the sweep.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from edgelocal.bundle.spec import TaskSpec
from edgelocal.exporters import losses
from edgelocal.exporters.rules import LocalBlock

MakeOptimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]


class Oracle:
    """Trains `blocks` in place, in `dtype`, each with an optimizer of its own from `make_optimizer(parameters)`.

    Works on the blocks' current modes: call `.train()` or `.eval()` on them as needed (new ones are in training mode).
    """

    def __init__(
        self, blocks: Sequence[LocalBlock], task: TaskSpec, make_optimizer: MakeOptimizer, dtype: torch.dtype
    ) -> None:
        self.blocks = tuple(block.to(dtype) for block in blocks)
        self.optimizers = tuple(make_optimizer(list(block.parameters())) for block in self.blocks)
        self.task = task
        self.dtype = dtype

    def step(self, x: Tensor, y: Tensor, lr: float) -> list[tuple[Tensor, dict[str, Tensor]]]:
        """One training step on inputs (N, ...) and targets (N, ...): (loss (), metric sums) of every block, in order.

        The gradients of the step stay in `.grad` until the next one.
        """
        results = []
        h = x.to(self.dtype)
        for block, optimizer in zip(self.blocks, self.optimizers, strict=True):
            output, logits = block(h)
            value = losses.loss(logits, y, self.task)
            optimizer.zero_grad()
            value.backward()  # type: ignore[no-untyped-call]  # torch does not type it
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            results.append((value.detach(), losses.metrics(logits.detach(), y, self.task)))
            h = output.detach()
        return results
