"""The options of `edgelocal export` -> an ExportRequest, with what depends on the input filled in, and its check."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

from edgelocal.bundle.manifest import is_plain
from edgelocal.bundle.spec import (
    LOSSES,
    PRECISIONS,
    TARGETS,
    AugmentSpec,
    DefaultsSpec,
    InputSpec,
    RuleSpec,
    TaskSpec,
)
from edgelocal.commands.export_options import ExportOptions
from edgelocal.errors import UsageError
from edgelocal.exporters.optimizers import MAX_FLOAT, Optimizer, make_optimizer
from edgelocal.exporters.partition import Blocks
from edgelocal.machine.budget import parse_size
from edgelocal.training.config import ORT_TRAINING, PORTABLE
from edgelocal.training.schedule import trains_nothing

# Per-channel means and deviations of the data sets, on the scale 0..1.
NORMALIZATIONS = {
    "none": ((0.0,), (1.0,)),
    "half": ((0.5,), (0.5,)),
    "cifar": ((125.3 / 255, 123.0 / 255, 113.9 / 255), (63.0 / 255, 62.1 / 255, 66.7 / 255)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}

RATES = {"sgd": 0.1, "adamw": 1e-3}
MAX_CLASSES = 1_000_000
MAX_ELEMENTS = 1 << 28  # of a sample: 1 GiB
MAX_COUNT = (1 << 31) - 1
MAX_SEED = (1 << 63) - 1
_MIN_STD = 1e-37  # float32 still divides by it


@dataclass(frozen=True)
class ExportRequest:
    """What the command line asks for. `runtime` is "portable", "ort-training" or "both"; `target` "cpu", "cuda" or
    "both"; `precision` "float32" or "bfloat16". `frontier` shows the trade-off around what a budget chooses, which
    takes time."""

    network: str
    blocks: Blocks
    rule: RuleSpec
    input: InputSpec
    task: TaskSpec
    optimizer: Optimizer
    augment: AugmentSpec
    defaults: DefaultsSpec
    weights: Path | None
    partial_weights: bool
    seed: int
    budget_bytes: int | None = None
    frontier: bool = True
    runtime: str = PORTABLE
    target: str = "cpu"
    precision: str = "float32"

    @property
    def targets(self) -> tuple[str, ...]:
        """What the training graphs are written for; the first take the place that they have in every bundle."""
        return ("cpu", "cuda") if self.target == "both" else (self.target,)

    def check(self) -> None:
        """Raise UsageError for the first value out of range."""
        self._check_numbers()
        self._check_schedule()
        if self.task.loss not in LOSSES:
            raise UsageError(f"there is no loss {self.task.loss!r}; choose one of {', '.join(LOSSES)}")
        if not 0 <= self.task.label_smoothing < 1:
            raise UsageError(f"label smoothing is {self.task.label_smoothing}, expected 0 <= s < 1")
        _check_text("the network", self.network)
        self._check_class_names()
        self._check_padding()
        self._check_target()

    def _check_target(self) -> None:
        if self.target not in TARGETS:
            raise UsageError(f"there is no target {self.target!r}; choose one of {', '.join(TARGETS)}")
        if self.precision not in PRECISIONS:
            raise UsageError(f"there is no precision {self.precision!r}; choose one of {', '.join(PRECISIONS)}")
        if self.precision == "bfloat16" and self.target != "cuda":
            raise UsageError(
                f"--precision bfloat16 with --target {self.target}: ONNX Runtime has no matrix products in bfloat16 on "
                "the CPU; export with --target cuda, or leave --precision out"
            )
        if self.runtime == ORT_TRAINING and self.target != "cpu":
            raise UsageError(
                f"--runtime ort-training with --target {self.target}: the artifacts train on the CPU; export with "
                "--runtime portable or both, or leave --target out"
            )

    def _check_numbers(self) -> None:
        ranges = (
            ("auxiliary depth", self.rule.depth, 0, MAX_COUNT),
            ("least auxiliary depth", self.rule.d_min, 1, MAX_COUNT),
            ("tau", self.rule.tau, 0, 1),
            ("the number of classes", self.task.classes, 1, MAX_CLASSES),
            ("batch", self.defaults.batch, 1, MAX_COUNT),
            ("epochs", self.defaults.epochs, 1, MAX_COUNT),
            ("learning rate", self.defaults.lr, 0, MAX_FLOAT),
            ("seed", self.seed, 0, MAX_SEED),
        )
        for name, found, low, high in ranges:
            if not low <= found <= high:
                raise UsageError(f"{name} is {found}, expected {low} to {high}")
        elements = math.prod(self.input.shape)
        if elements > MAX_ELEMENTS:
            raise UsageError(f"a sample of {self.input.shape} has {elements} elements, at most {MAX_ELEMENTS} will do")

    def _check_schedule(self) -> None:
        schedule, epochs = self.defaults.lr_schedule, self.defaults.epochs
        if trains_nothing(schedule, self.defaults.lr, epochs, 0):
            raise UsageError(
                f"the {schedule} schedule ends at a learning rate of 0, which with --epochs {epochs} is the rate of "
                "every step: give more --epochs, or --lr-schedule constant"
            )

    def _check_class_names(self) -> None:
        names = self.task.class_names
        if names and len(names) != self.task.classes:
            raise UsageError(f"{len(names)} class names for {self.task.classes} classes; give one a class")
        for index, name in enumerate(names):
            _check_text(f"class name {index}", name)
            if name in names[:index]:
                raise UsageError(f"class name {name!r} is given twice; every class needs a name of its own")

    def _check_padding(self) -> None:
        pad, mode, shape = self.augment.pad, self.augment.mode, self.input.shape
        most = 0
        if len(shape) == 3:
            most = min(shape[1:]) - 1 if mode == "reflect" else max(shape[1:])
        if not 0 <= pad <= most:
            raise UsageError(
                f"samples of {shape} cannot be padded by {pad} pixels ({mode}); give --pad at least 0, at most {most}"
            )


def make_request(network: str, options: ExportOptions) -> ExportRequest:
    """Parse the text options.

    Raises:
        UsageError: an option that cannot be read, with an example of one that can.
    """
    shape, dtype = parse_input(options.input_shape)
    mean, std = parse_normalization(options.normalize, shape, dtype)
    names = tuple(name.strip() for name in options.class_names.split(",") if name.strip())
    budget = options.memory_budget
    optimizer = make_optimizer(options.optimizer, options.momentum, options.weight_decay, options.nesterov)
    lr = RATES[options.optimizer] if options.lr is None else options.lr
    return ExportRequest(
        network=network,
        blocks=parse_blocks(options.blocks),
        rule=RuleSpec(options.rule, options.aux_depth, options.tau, options.aux_depth_min, options.tail),
        input=InputSpec(shape, mean, std, dtype),
        task=TaskSpec(options.loss, options.classes, options.label_smoothing, names),
        optimizer=optimizer,
        augment=_augment(options.pad, options.pad_mode, options.flip, shape),
        defaults=DefaultsSpec(options.batch, options.epochs, lr, options.lr_schedule),
        weights=options.weights,
        partial_weights=options.partial_weights,
        seed=options.seed,
        budget_bytes=None if budget is None else parse_memory_budget(budget, options.blocks),
        runtime=options.runtime,
        target=options.target,
        precision=options.precision,
    )


def parse_input(text: str) -> tuple[tuple[int, ...], str]:
    """ "3x32x32" -> ((3, 32, 32), "float32"); "int64:128" -> ((128,), "int64")."""
    match = re.fullmatch(r"(?:(int64|float32):)?([0-9]{1,20}(?:x[0-9]{1,20}){0,3})", text)
    shape = tuple(int(part) for part in match[2].split("x")) if match else ()
    if match is None or 0 in shape:
        raise UsageError(
            f"--input {_shown(text)} is not a shape; write 3x32x32 for images, 64 for features, int64:128 for tokens"
        )
    return shape, match[1] or "float32"


def parse_blocks(text: str) -> Blocks:
    """ "per-unit", "auto" or a number of at least 1."""
    if text == "per-unit":
        return "per-unit"
    if text == "auto":
        return "auto"
    if not re.fullmatch("[0-9]{1,9}", text) or int(text) < 1:
        raise UsageError(f"--blocks {_shown(text)}: write a number from 1 to 999999999, auto or per-unit")
    return int(text)


def parse_memory_budget(text: str, blocks: str) -> int:
    """Bytes of --memory-budget, which decides the blocks itself."""
    if blocks != "auto":
        raise UsageError(f"--memory-budget chooses the blocks: leave --blocks {_shown(blocks)} out, or the budget")
    if "%" in text or text.strip().lower() == "auto":
        raise UsageError(f"--memory-budget {_shown(text)}: the device is not known here; write a size, such as 256MiB")
    return parse_size(text)


def parse_normalization(
    text: str, shape: tuple[int, ...], dtype: str = "float32"
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """A name of NORMALIZATIONS, or "M1,M2,M3/S1,S2,S3"; "auto" is cifar for three channels, half for one."""
    if dtype != "float32":
        return NORMALIZATIONS["none"]
    if text == "auto":
        image = len(shape) == 3
        text = "cifar" if image and shape[0] == 3 else "half" if image else "none"
    mean, std = NORMALIZATIONS[text] if text in NORMALIZATIONS else _means_and_deviations(text)
    if not {len(mean), len(std)} <= {1, shape[0]}:
        raise UsageError(
            f"--normalize gives {len(mean)} means and {len(std)} deviations; the input has {shape[0]} channels"
        )
    if not (all(abs(m) <= MAX_FLOAT for m in mean) and all(_MIN_STD <= s <= MAX_FLOAT for s in std)):
        raise UsageError(f"--normalize {_shown(text)}: means must be finite, deviations finite and more than 0")
    return mean, std


def _means_and_deviations(text: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    try:
        means, _, deviations = text.partition("/")
        return tuple(float(v) for v in means.split(",")), tuple(float(v) for v in deviations.split(","))
    except ValueError:
        known = ", ".join(NORMALIZATIONS)
        raise UsageError(
            f"--normalize {_shown(text)}: write auto, {known}, or MEAN,.../STD,... such as 0.5/0.25"
        ) from None


def _augment(pad: int, mode: str, flip: bool, shape: tuple[int, ...]) -> AugmentSpec:
    if len(shape) == 3:
        return AugmentSpec(pad, mode, flip)
    if pad not in (0, ExportOptions.pad):  # nobody can tell whether the default was given
        raise UsageError(f"--pad {pad} is for images (channels, height, width), the input is {shape}: leave it out")
    return AugmentSpec(0, mode, False)


def _check_text(what: str, text: str) -> None:
    """Bytes of the command line that are no UTF-8 arrive as halves of surrogate pairs."""
    if not is_plain(text):
        raise UsageError(
            f"{what}, {text!r}, has control characters or is no UTF-8 text; write it as plain text, or check the "
            "terminal's locale"
        )


def _shown(text: str) -> str:
    return repr(text) if len(text) <= 40 else f"{text[:40]!r}..."
