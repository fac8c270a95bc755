"""Loss and metric sums of logits in numpy: what evaluation reports, by the formulas the step graphs use."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from edgelocal.bundle.spec import TaskSpec
from edgelocal.storage.tensors import Array


@dataclass
class Score:
    """Sums over samples. `right` counts right predictions or decisions; for mse it adds absolute errors."""

    samples: int = 0
    loss_sum: float = 0.0
    right: float = 0.0

    def add(self, samples: int, mean_loss: float, right: float) -> None:
        """Add a batch with its mean loss."""
        self.samples += samples
        self.loss_sum += mean_loss * samples
        self.right += right

    def result(self, task: TaskSpec) -> dict[str, float]:
        """Means: `loss`, and `accuracy` in 0..1 or `mean_absolute_error`."""
        count = max(1, self.samples)
        width = 1 if task.loss == "cross_entropy" else task.classes
        name = "mean_absolute_error" if task.loss == "mse" else "accuracy"
        return {"loss": self.loss_sum / count, name: self.right / (count * width)}


def score(logits: Array, y: Array, task: TaskSpec) -> tuple[float, float]:
    """(mean loss, sum of the metric) of logits (n, classes) and targets; float64 inside."""
    z = logits.astype(np.float64)
    if task.loss == "cross_entropy":
        shifted = z - z.max(axis=1, keepdims=True)
        log_p = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
        s = task.label_smoothing
        picked = log_p[np.arange(len(y)), y]
        loss = -((1 - s) * picked + s * log_p.mean(axis=1)).mean()
        return float(loss), float((z.argmax(axis=1) == y).sum())
    if task.loss == "bce":
        loss = (np.maximum(z, 0) - z * y + np.log1p(np.exp(-np.abs(z)))).mean()
        return float(loss), float(((z > 0) == (y > 0.5)).sum())
    return float(((z - y) ** 2).mean()), float(np.abs(z - y).sum())
