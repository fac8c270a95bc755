"""Local losses and metric sums as pure functions of logits and targets.

Everything here is traced into the step graphs: the operators are elementary, and the flow depends on the task alone.

    cross_entropy   y (N,) int64 class numbers      metric "correct", int64: right predictions
    bce             y (N, classes), 0 or 1          metric "correct", int64: right decisions, N * classes at most
    mse             y (N, classes)                  metric "absolute_error", float32: sum over all outputs
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from edgelocal.bundle.spec import LOSSES, TaskSpec
from edgelocal.errors import UsageError


def loss(logits: Tensor, y: Tensor, task: TaskSpec) -> Tensor:
    """Mean loss, shape (), of logits (N, classes) in the logits' dtype; PyTorch's mean reductions.

    With smoothing s over C classes the target of cross entropy is (1 - s) at the label plus s / C everywhere. A label
    outside 0..C-1 matches no class: refusing it is the data pipeline's duty.

    Raises:
        UsageError: the task names an unknown loss.
    """
    _known(task)
    if task.loss == "cross_entropy":
        return _cross_entropy(logits, y, task.label_smoothing)
    target = y.to(logits.dtype).reshape(logits.shape)
    if task.loss == "bce":
        return ((1 - target) * logits - functional.logsigmoid(logits)).mean()
    return (logits - target).square().mean()


def metrics(logits: Tensor, y: Tensor, task: TaskSpec) -> dict[str, Tensor]:
    """Sums over the batch, shape () each, that add up over batches; see the module for names and dtypes.

    Raises:
        UsageError: the task names an unknown loss.
    """
    _known(task)
    if task.loss == "cross_entropy":
        return {"correct": (logits.argmax(1) == y).sum()}
    target = y.reshape(logits.shape)
    if task.loss == "bce":
        return {"correct": ((logits > 0) == (target > 0.5)).sum()}
    return {"absolute_error": (logits - target.to(logits.dtype)).abs().sum().to(torch.float32)}


def _cross_entropy(logits: Tensor, y: Tensor, smoothing: float) -> Tensor:
    # Comparing with every class number, rather than gathering one, keeps Scatter out of the backward.
    classes = logits.shape[1]
    target = (y.unsqueeze(1) == torch.arange(classes, device=y.device)).to(logits.dtype)
    if smoothing:
        target = target * (1 - smoothing) + smoothing / classes
    return -(target * functional.log_softmax(logits, 1)).sum(1).mean()


def _known(task: TaskSpec) -> None:
    if task.loss not in LOSSES:
        raise UsageError(f"no loss is called {task.loss!r}; choose one of {', '.join(LOSSES)}")
