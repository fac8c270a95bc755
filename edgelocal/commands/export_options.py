"""What `edgelocal export` takes beside the network: names, defaults and help, in this one place.

On the device's side, because the command line shows them where there is no torch.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import click

Command: TypeAlias = Callable[..., Any]


@dataclass(frozen=True)
class ExportOptions:
    """The options as they are typed, with the defaults of the command line; exporters/request.py reads and checks them.

    None means: what suits the optimizer (`momentum`, `weight_decay`, `lr`), or not asked for (`memory_budget`,
    `weights`).
    """

    blocks: str = "auto"
    rule: str = "auglocal"
    aux_depth: int = 2
    aux_depth_min: int = 1
    tau: float = 0.5
    tail: str = "merge"
    input_shape: str = "3x32x32"
    classes: int = 10
    class_names: str = ""
    normalize: str = "auto"
    loss: str = "cross_entropy"
    label_smoothing: float = 0.0
    optimizer: str = "sgd"
    momentum: float | None = None
    weight_decay: float | None = None
    nesterov: bool = True
    pad: int = 4
    pad_mode: str = "reflect"
    flip: bool = True
    batch: int = 128
    epochs: int = 10
    lr: float | None = None
    lr_schedule: str = "cosine"
    memory_budget: str | None = None
    weights: Path | None = None
    partial_weights: bool = False
    runtime: str = "portable"
    target: str = "cpu"
    precision: str = "float32"
    seed: int = 0


def _option(*names: str, **settings: Any) -> Callable[[Command], Command]:
    """`click.option` with the default of the field that bears the last of `names`."""
    field = names[-1].partition("/")[0].removeprefix("--").replace("-", "_")
    return click.option(*names, default=getattr(ExportOptions, field), **{"show_default": True, **settings})


_OPTIONS = (
    _option("--blocks", help="A number, auto or per-unit."),
    _option("--rule", help="auglocal, linear or bp (one block, the baseline)."),
    _option("--aux-depth", help="Largest depth of the auxiliary networks."),
    _option("--aux-depth-min", help="Smallest depth of the auxiliary networks."),
    _option("--tau", help="How much shallower later auxiliaries are, 0 to 1."),
    _option(
        "--tail",
        type=click.Choice(["merge", "all"]),
        help="merge: the last aux-depth + 1 units are one block; all: every unit may be one.",
    ),
    _option("--input", "input_shape", help="CxHxW or a length; int64:LENGTH for token ids."),
    _option("--classes", help="Width of the output."),
    _option("--class-names", show_default=False, help="Comma-separated, in the order of the outputs."),
    _option("--normalize", help="auto, cifar, imagenet, half, none, or MEAN/STD with commas."),
    _option("--loss", type=click.Choice(["cross_entropy", "bce", "mse"]), help="The local loss of every block."),
    _option("--label-smoothing"),
    _option("--optimizer", type=click.Choice(["sgd", "adamw"]), help="Goes into the graphs."),
    _option("--momentum", type=float, help="SGD's momentum.  [default: 0.9]"),
    _option("--weight-decay", type=float, help="[default: 1e-4 for sgd, 1e-2 for adamw]"),
    _option("--nesterov/--no-nesterov"),
    _option("--pad", help="Augmentation: pad by this many pixels, crop back at random."),
    _option("--pad-mode", type=click.Choice(["reflect", "zero"])),
    _option("--flip/--no-flip", help="Augmentation: mirror half of the images."),
    _option("--batch", help="Default batch on the device."),
    _option("--epochs", help="Default number of epochs."),
    _option("--lr", type=float, help="Default learning rate.  [default: 0.1 for sgd, 0.001 for adamw]"),
    _option(
        "--lr-schedule",
        type=click.Choice(["constant", "step", "cosine"]),
        help="Default schedule; cosine ends at 0.",
    ),
    _option(
        "--memory-budget",
        help="Bytes the process on the device may hold, such as 256MiB: choose blocks that fit, with as little "
        "auxiliary depth given up as can be, then with the least compute.",
    ),
    _option(
        "--weights", type=click.Path(path_type=Path), help="Start from a .safetensors or .pt file (read weights-only)."
    ),
    _option("--partial-weights", is_flag=True, help="Take from --weights what fits, and report the rest."),
    _option(
        "--runtime",
        type=click.Choice(["portable", "ort-training", "both"]),
        help="What the bundle can be trained with: standard ONNX on any ONNX Runtime, the artifacts of ONNX Runtime's "
        "training build, or both.",
    ),
    _option(
        "--target",
        type=click.Choice(["cpu", "cuda", "both"]),
        help="What the training graphs are written for; either runs on both. cuda: no node may need the CPU.",
    ),
    _option(
        "--precision",
        type=click.Choice(["float32", "bfloat16"]),
        help="Of what goes into the matrix products of training, with --target cuda. Convolutions stay float32: ONNX "
        "Runtime has no others for bfloat16 (train --tf32 makes them faster).",
    ),
    _option("--seed", help="Of the initial weights."),
)


def export_options(command: Command) -> Command:
    """A decorator: the command takes all of them, as keyword arguments with the names of `ExportOptions`."""
    for option in reversed(_OPTIONS):  # click lists them from the last one applied to the first
        command = option(command)
    return command
