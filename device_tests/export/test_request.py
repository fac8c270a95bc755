"""The text options of `edgelocal export`."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from edgelocal.bundle.spec import AugmentSpec, DefaultsSpec, InputSpec, RuleSpec, TaskSpec
from edgelocal.commands.export_options import ExportOptions
from edgelocal.errors import UsageError
from edgelocal.exporters.request import (
    NORMALIZATIONS,
    make_request,
    parse_blocks,
    parse_input,
    parse_normalization,
)


def request(**changes: Any) -> Any:
    return make_request("resnet8", ExportOptions(**changes))


def typed(*arguments: str) -> dict[str, Any]:
    """What the command line makes of `edgelocal export resnet8 b` and these arguments."""
    from edgelocal.cli import export

    given = export.make_context("export", ["resnet8", "b", *arguments]).params
    return {name: value for name, value in given.items() if name not in ("network", "out", "as_json")}


def test_the_command_line_has_the_defaults_that_are_used_everywhere() -> None:
    assert typed() == asdict(ExportOptions())
    assert {name: type(value) for name, value in typed().items()} == {
        name: type(value) for name, value in asdict(ExportOptions()).items()
    }


def test_every_option_of_the_command_line_reaches_the_request() -> None:
    line = "--blocks 3 --rule linear --aux-depth 4 --aux-depth-min 2 --tau 0.25 --tail all --input 1x8x8 --classes 2"
    line += " --class-names a,b --normalize 0.5/0.25 --loss bce --label-smoothing 0.125 --optimizer adamw"
    line += " --weight-decay 0.5 --pad 1 --pad-mode zero --no-flip --batch 7 --epochs 3 --lr 0.5"
    line += " --lr-schedule step --weights w.pt --partial-weights --seed 9 --runtime both"
    line += " --target cuda --precision bfloat16"
    options = ExportOptions(**typed(*line.split()))
    found = make_request("resnet8", options)
    assert (found.network, found.blocks) == ("resnet8", 3)
    assert found.rule == RuleSpec("linear", 4, 0.25, 2, "all")
    assert found.input == InputSpec((1, 8, 8), (0.5,), (0.25,), "float32")
    assert found.task == TaskSpec("bce", 2, 0.125, ("a", "b"))
    assert (found.optimizer.name, found.optimizer.hyper["weight_decay"]) == ("adamw", 0.5)
    assert found.augment == AugmentSpec(1, "zero", False)
    assert found.defaults == DefaultsSpec(7, 3, 0.5, "step")
    assert (found.weights, found.partial_weights, found.seed) == (Path("w.pt"), True, 9)
    assert (found.runtime, found.target, found.precision) == ("both", "cuda", "bfloat16")
    plain = ExportOptions(**typed("--momentum", "0.5", "--no-nesterov", "--memory-budget", "1MiB"))
    assert make_request("resnet8", plain).optimizer.hyper["momentum"] == 0.5
    assert make_request("resnet8", plain).optimizer.name == "sgd"
    assert make_request("resnet8", plain).budget_bytes == 1 << 20
    both = asdict(options).items(), asdict(plain).items()
    defaults = asdict(ExportOptions())
    assert {name for changed in both for name, value in changed if value != defaults[name]} == set(defaults)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("3x32x32", ((3, 32, 32), "float32")),
        ("64", ((64,), "float32")),
        ("int64:128", ((128,), "int64")),
        ("float32:1x8x8", ((1, 8, 8), "float32")),
    ],
)
def test_shapes(text: str, expected: object) -> None:
    assert parse_input(text) == expected


@pytest.mark.parametrize(
    "text", ["", "3x", "3x0x3", "0", "axb", "int8:4", "1x2x3x4x5", "-3", "00", "3x00x3", "٣", "9" * 5000]
)
def test_what_is_no_shape_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a shape; write 3x32x32"):
        parse_input(text)


@pytest.mark.parametrize(("text", "blocks"), [("per-unit", "per-unit"), ("auto", "auto"), ("4", 4)])
def test_blocks(text: str, blocks: object) -> None:
    assert parse_blocks(text) == blocks


@pytest.mark.parametrize("text", ["0", "-1", "many", "1.5", "", "²", "٣", "9" * 5000])
def test_what_is_no_number_of_blocks_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="--blocks") as caught:
        parse_blocks(text)
    assert len(str(caught.value)) < 200


def test_normalizations() -> None:
    assert parse_normalization("auto", (3, 8, 8)) == NORMALIZATIONS["cifar"]
    assert parse_normalization("auto", (1, 8, 8)) == NORMALIZATIONS["half"]
    assert parse_normalization("auto", (12,)) == NORMALIZATIONS["none"]
    assert parse_normalization("cifar", (8,), "int64") == NORMALIZATIONS["none"]
    assert parse_normalization("0.1,0.2/1,2", (2, 4, 4)) == ((0.1, 0.2), (1.0, 2.0))


NO_NUMBERS = ("nan/1", "0/nan", "inf/1", "0/inf", "1e400/1", "1e39/1", "0/0", "0/-1", "0/1e-60")


@pytest.mark.parametrize(
    ("text", "shape"),
    [("0.5", (1, 8, 8)), ("a/b", (1,)), ("cifar", (1, 8, 8)), ("1,2/1", (3,)), *((text, (1,)) for text in NO_NUMBERS)],
)
def test_normalizations_that_do_not_fit_are_refused(text: str, shape: tuple[int, ...]) -> None:
    with pytest.raises(UsageError, match="--normalize"):
        parse_normalization(text, shape)


def test_only_images_are_augmented() -> None:
    assert request().augment.pad == 4
    vector = request(input_shape="64").augment
    assert (vector.pad, vector.flip) == (0, False)
    assert request(input_shape="64", pad=0).augment == vector


@pytest.mark.parametrize("pad", [3, -1, 100_000])
def test_padding_for_what_is_no_image_is_refused(pad: int) -> None:
    with pytest.raises(UsageError, match=f"--pad {pad} is for images"):
        request(input_shape="64", pad=pad)


def test_optimizers_have_pytorchs_defaults_and_take_what_is_given() -> None:
    assert request().optimizer.hyper == {"momentum": 0.9, "weight_decay": 1e-4}
    assert request(optimizer="adamw").optimizer.hyper["weight_decay"] == 1e-2
    assert request(optimizer="adamw").defaults.lr == 1e-3
    assert request(optimizer="adamw", lr=0.5).defaults.lr == 0.5
    assert request().defaults.lr == 0.1
    given = request(momentum=0.5, weight_decay=0.0, nesterov=False).optimizer
    assert (given.name, given.hyper) == ("sgd", {"momentum": 0.5, "weight_decay": 0.0})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"momentum": -1.0}, "momentum is -1"),
        ({"momentum": 1.0}, "momentum is 1.0; .* less than 1"),
        ({"momentum": float("nan")}, "momentum is nan"),
        ({"weight_decay": -1.0}, "weight decay is -1"),
        ({"weight_decay": 1e39}, "weight decay is 1e[+]39"),
        ({"weight_decay": float("nan")}, "weight decay is nan"),
        ({"optimizer": "lion"}, "no optimizer 'lion'"),
    ],
)
def test_bad_numbers_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        request(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label_smoothing": 1.0}, "label smoothing is 1.0"),
        ({"class_names": "a,b"}, "2 class names for 10 classes"),
        ({"classes": 2, "class_names": "a,a"}, "class name 'a' is given twice"),
        (
            {"classes": 2, "class_names": "a,\udcff"},
            r"class name 1, '\\udcff', has control characters or is no UTF-8 text",
        ),
        ({"classes": 2, "class_names": "a,\x1b[31m"}, "class name 1, .* has control characters"),
        ({"batch": 0}, "batch is 0, expected 1 to"),
        ({"epochs": 0}, "epochs is 0"),
        ({"epochs": 1}, "the cosine schedule ends at a learning rate of 0, .* --lr-schedule constant"),
        ({"lr": -1.0}, "learning rate is -1.0"),
        ({"lr": float("nan")}, "learning rate is nan"),
        ({"lr": float("inf")}, "learning rate is inf"),
        ({"tau": float("nan"), "rule": "linear"}, "tau is nan, expected 0 to 1"),
        ({"aux_depth": 10**400}, "auxiliary depth is 1000"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": 1 << 63}, "seed is 9223372036854775808"),
        ({"classes": 0}, "classes is 0"),
        ({"classes": 10**13}, "classes is 10000000000000, expected 1 to 1000000"),
        ({"input_shape": "9" * 20, "pad": 0}, "has 9{20} elements"),
        ({"input_shape": "1000000x1000000x1000000"}, "has 10{18} elements"),
        ({"pad": -1}, "cannot be padded by -1 pixels"),
        ({"pad": 32}, r"\(3, 32, 32\) cannot be padded by 32 pixels \(reflect\); .* at most 31"),
        ({"pad": 100_000, "pad_mode": "zero"}, "cannot be padded by 100000 pixels"),
        ({"loss": "hinge"}, "no loss 'hinge'"),
    ],
)
def test_requests_are_checked_before_anything_is_built(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        request(**changes).check()


@pytest.mark.parametrize(
    "changes",
    [
        {"lr": 0.0, "momentum": 0.0, "weight_decay": 0.0, "pad": 0},
        {"epochs": 1, "lr_schedule": "constant"},
        {"seed": (1 << 63) - 1, "classes": 1, "class_names": "größe", "pad": 31},
        {"input_shape": "1x1x64", "pad_mode": "zero"},
    ],
)
def test_the_limits_themselves_are_taken(changes: dict[str, Any]) -> None:
    request(**changes).check()


@pytest.mark.parametrize("target", ["cpu", "both"])
def test_bfloat16_is_for_cuda_alone(target: str) -> None:
    with pytest.raises(UsageError, match=f"--precision bfloat16 with --target {target}: .* export with --target cuda"):
        request(target=target, precision="bfloat16").check()
    request(target="cuda", precision="bfloat16").check()


@pytest.mark.parametrize("target", ["cuda", "both"])
def test_artifacts_alone_are_for_the_cpu(target: str) -> None:
    with pytest.raises(UsageError, match=f"--runtime ort-training with --target {target}: the artifacts train on the"):
        request(runtime="ort-training", target=target).check()
    request(runtime="both", target=target).check()


def test_unknown_targets_and_precisions_are_refused() -> None:
    with pytest.raises(UsageError, match="no target 'npu'; choose one of cpu, cuda, both"):
        request(target="npu").check()
    with pytest.raises(UsageError, match="no precision 'float16'; choose one of float32, bfloat16"):
        request(precision="float16").check()
