"""The options of `edgelocal export` -> an ExportRequest, with what depends on the input filled in."""

from __future__ import annotations

import re
from pathlib import Path

from edgelocal.errors import UsageError
from edgelocal.exporters.optimizers import make_optimizer
from edgelocal.exporters.pack import ExportRequest
from edgelocal.exporters.partition import Blocks
from edgelocal.spec import AugmentSpec, DefaultsSpec, InputSpec, RuleSpec, TaskSpec

# Per-channel means and deviations of the data sets, on the scale 0..1.
NORMALIZATIONS = {
    "none": ((0.0,), (1.0,)),
    "half": ((0.5,), (0.5,)),
    "cifar": ((125.3 / 255, 123.0 / 255, 113.9 / 255), (63.0 / 255, 62.1 / 255, 66.7 / 255)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


def make_request(
    network: str,
    *,
    blocks: str,
    rule: str,
    aux_depth: int,
    tau: float,
    tail: str,
    input_shape: str,
    classes: int,
    class_names: str,
    normalize: str,
    loss: str,
    label_smoothing: float,
    optimizer: str,
    momentum: float | None,
    weight_decay: float | None,
    nesterov: bool,
    pad: int,
    pad_mode: str,
    flip: bool,
    batch: int,
    epochs: int,
    lr: float,
    lr_schedule: str,
    weights: Path | None,
    partial_weights: bool,
    seed: int,
) -> ExportRequest:
    """Parse the text options.

    Raises:
        UsageError: an option that cannot be read, with an example of one that can.
    """
    shape, dtype = parse_input(input_shape)
    mean, std = parse_normalization(normalize, shape, dtype)
    image = len(shape) == 3
    return ExportRequest(
        network=network,
        blocks=parse_blocks(blocks),
        rule=RuleSpec(rule, aux_depth, tau, 1, tail),
        input=InputSpec(shape, mean, std, dtype),
        task=TaskSpec(loss, classes, label_smoothing, tuple(n.strip() for n in class_names.split(",") if n.strip())),
        optimizer=make_optimizer(optimizer, momentum, weight_decay, nesterov),
        augment=AugmentSpec(pad if image else 0, "reflect" if pad_mode == "reflect" else "zero", flip and image),
        defaults=DefaultsSpec(batch, epochs, lr, lr_schedule),
        weights=weights,
        partial_weights=partial_weights,
        seed=seed,
    )


def parse_input(text: str) -> tuple[tuple[int, ...], str]:
    """ "3x32x32" -> ((3, 32, 32), "float32"); "int64:128" -> ((128,), "int64")."""
    match = re.fullmatch(r"(?:(int64|float32):)?(\d+(?:x\d+){0,3})", text)
    if match is None or "0" in match[2].split("x"):
        raise UsageError(
            f"--input {text!r} is not a shape; write 3x32x32 for images, 64 for features, int64:128 for tokens"
        )
    return tuple(int(part) for part in match[2].split("x")), match[1] or "float32"


def parse_blocks(text: str) -> Blocks:
    """ "per-unit", "auto" or a number of at least 1."""
    if text == "per-unit":
        return "per-unit"
    if text == "auto":
        return "auto"
    if not text.isdigit() or int(text) < 1:
        raise UsageError(f"--blocks {text!r}: write a number of at least 1, auto or per-unit")
    return int(text)


def parse_normalization(
    text: str, shape: tuple[int, ...], dtype: str = "float32"
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """A name of NORMALIZATIONS, or "M1,M2,M3/S1,S2,S3"; "auto" is cifar for three channels, half for one."""
    if dtype != "float32":
        return NORMALIZATIONS["none"]
    if text == "auto":
        image = len(shape) == 3
        text = "cifar" if image and shape[0] == 3 else "half" if image else "none"
    if text in NORMALIZATIONS:
        mean, std = NORMALIZATIONS[text]
    else:
        try:
            means, _, deviations = text.partition("/")
            mean = tuple(float(v) for v in means.split(","))
            std = tuple(float(v) for v in deviations.split(","))
        except ValueError:
            known = ", ".join(NORMALIZATIONS)
            raise UsageError(
                f"--normalize {text!r}: write auto, {known}, or MEAN,.../STD,... such as 0.5/0.25"
            ) from None
    if not {len(mean), len(std)} <= {1, shape[0]} or min(std) <= 0:
        raise UsageError(
            f"--normalize gives {len(mean)} means and {len(std)} deviations > 0; the input has {shape[0]} channels"
        )
    return mean, std
