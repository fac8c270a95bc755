"""Optimizers as pure functions over one parameter and its named state.

An optimizer has `hyper` (scalar graph inputs with their defaults, besides the learning rate), `slots` (tensors of the
parameter's shape, starting at zero) and `update`. It is traced once with scalars in place of tensors: every
operation is element by element, so the traced graph serves parameters of any shape.

The updates are those of torch.optim (tested against it):
    SGD     g += wd p;  m = mu m + g;  p -= lr m, or with Nesterov  p -= lr (g + mu m)
    AdamW   p -= lr wd p;  m = b1 m + (1 - b1) g;  v = b2 v + (1 - b2) g^2;
            p -= lr / (1 - b1^t) m / (sqrt(v) / sqrt(1 - b2^t) + eps)        (Loshchilov and Hutter 2019)
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from edgelocal.bundle.spec import OptimizerSpec
from edgelocal.errors import ExportError

MAX_FLOAT = 3.4e38  # float32 holds no larger number, rounded

Tensors = Mapping[str, torch.Tensor]
Update = Callable[[torch.Tensor, torch.Tensor, Tensors, Tensors], tuple[torch.Tensor, dict[str, torch.Tensor]]]


@dataclass(frozen=True)
class Optimizer:
    """`update(param, grad, slots, hyper) -> (new param, new slots)`; hyper holds `lr`, the hyper-parameters and,
    if `counts_steps`, `step`: the number of this update from 1 on, float32 (). `reference` is torch's own."""

    name: str
    hyper: dict[str, float]
    slots: tuple[str, ...]
    counts_steps: bool
    update: Update
    reference: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]

    def spec(self) -> OptimizerSpec:
        """What the manifest says of it."""
        return OptimizerSpec(self.name, dict(self.hyper))


def sgd(momentum: float = 0.9, weight_decay: float = 1e-4, nesterov: bool = True) -> Optimizer:
    """Stochastic gradient descent with momentum and L2 weight decay on all parameters."""

    def update(
        p: torch.Tensor, g: torch.Tensor, slots: Tensors, h: Tensors
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        g = g + h["weight_decay"] * p
        m = h["momentum"] * slots["momentum"] + g
        return p - h["lr"] * (g + h["momentum"] * m if nesterov else m), {"momentum": m}

    def reference(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(
            parameters, lr=0.0, momentum=momentum, weight_decay=weight_decay, nesterov=nesterov and momentum > 0
        )

    name = "sgd-nesterov" if nesterov else "sgd"
    return Optimizer(
        name, {"momentum": momentum, "weight_decay": weight_decay}, ("momentum",), False, update, reference
    )


def adamw(betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 1e-2) -> Optimizer:
    """Adam with decoupled weight decay."""

    def update(
        p: torch.Tensor, g: torch.Tensor, slots: Tensors, h: Tensors
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        m = h["beta1"] * slots["m"] + (1 - h["beta1"]) * g
        v = h["beta2"] * slots["v"] + (1 - h["beta2"]) * g * g
        rate = h["lr"] / (1 - h["beta1"] ** h["step"])
        scale = torch.sqrt(v) / torch.sqrt(1 - h["beta2"] ** h["step"]) + h["eps"]
        return p * (1 - h["lr"] * h["weight_decay"]) - rate * m / scale, {"m": m, "v": v}

    def reference(parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=0.0, betas=betas, eps=eps, weight_decay=weight_decay)

    hyper = {"beta1": betas[0], "beta2": betas[1], "eps": eps, "weight_decay": weight_decay}
    return Optimizer("adamw", hyper, ("m", "v"), True, update, reference)


def make_optimizer(name: str, momentum: float | None, weight_decay: float | None, nesterov: bool) -> Optimizer:
    """The optimizer of the command line; None takes its default.

    Raises:
        ExportError: an unknown name, or a value outside its range.
    """
    if momentum is not None and not 0 <= momentum < 1:
        raise ExportError(f"momentum is {momentum}; give a finite number of at least 0 and less than 1")
    if weight_decay is not None and not 0 <= weight_decay <= MAX_FLOAT:
        raise ExportError(f"weight decay is {weight_decay}; give a finite number of at least 0 that float32 can hold")
    if name == "sgd":
        return sgd(0.9 if momentum is None else momentum, 1e-4 if weight_decay is None else weight_decay, nesterov)
    if name == "adamw":
        return adamw(weight_decay=1e-2 if weight_decay is None else weight_decay)
    raise ExportError(f"there is no optimizer {name!r}; choose sgd or adamw")
