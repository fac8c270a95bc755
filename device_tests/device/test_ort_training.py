"""Artifacts for ONNX Runtime's training build: refused where that is not installed, the same training where it is.

`make test` runs this file on plain ONNX Runtime, oldest and newest, and on onnxruntime-training-cpu, without torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from device_tests.device.golden_steps import EXPECTED, LR, batches, losses
from device_tests.device.runs import ARTIFACTS, RESIDUAL, answer, copy_bundle, edit_manifest, last_state, write_data
from edgelocal.bundle.artifacts import RESET
from edgelocal.bundle.folder import open_bundle, verify
from edgelocal.bundle.onnx_scan import TRAINING_DOMAIN, scan
from edgelocal.bundle.protobuf import BYTES, FIXED64, VARINT, render
from edgelocal.errors import BundleError
from edgelocal.machine.device import describe
from edgelocal.machine.packages import package
from edgelocal.runtime.library import has_training, runtime
from edgelocal.runtime.tensor import Tensor
from edgelocal.storage.tensors import Array
from edgelocal.training.blocks import load_blocks

TRAINS = has_training()
training_build = pytest.mark.skipif(not TRAINS, reason="the ONNX Runtime installed here is not a training build")
plain_build = pytest.mark.skipif(TRAINS, reason="the ONNX Runtime installed here is a training build")
TRAIN = ("--epochs", 2, "--no-augment", "--threads", 1)
STEP = "blocks/00/ort_training/training_model.onnx"


def steps(*, artifacts: bool) -> tuple[Array, dict[str, Array]]:
    """Losses of 20 steps, and the state after them."""
    bundle = open_bundle(ARTIFACTS)
    blocks = load_blocks(bundle, 1, None, artifacts=artifacts)
    found = losses(blocks)
    return found, {f"{b.spec.name}:{n}": a for b in blocks for n, a in b.state().items()}


def test_a_bundle_for_both_runtimes_is_whole_and_says_so() -> None:
    bundle = open_bundle(ARTIFACTS)
    assert bundle.manifest.runtimes == ("portable", "ort-training")
    assert open_bundle(RESIDUAL).manifest.runtimes == ("portable",)
    assert {Path(name).name for name in verify(bundle) if "ort_training" in name} == {
        *("training_model.onnx", "eval_model.onnx", "optimizer_model.onnx", "checkpoint")
    }
    assert answer("inspect", ARTIFACTS)["runtimes"] == ["portable", "ort-training"]


def test_operators_of_the_runtime_are_in_the_training_model_alone_and_only_known_ones() -> None:
    model = (ARTIFACTS / STEP).read_bytes()
    assert TRAINING_DOMAIN in model
    scan(model, training=True)
    with pytest.raises(BundleError, match="another domain"):
        scan(model)
    for name in ("eval_model", "optimizer_model"):
        data = (ARTIFACTS / f"blocks/00/ort_training/{name}.onnx").read_bytes()
        assert (TRAINING_DOMAIN in data) == (name == "optimizer_model")
    hostile = model.replace(b"InPlaceAccumulatorV2", b"InPlaceAccumulatorXX")
    with pytest.raises(BundleError, match="InPlaceAccumulatorXX"):
        scan(hostile, training=True)


def test_the_portable_graphs_train_it_wherever_it_is(tmp_path: Path) -> None:
    data = write_data(tmp_path / "d.npz", RESIDUAL)
    report = answer("train", ARTIFACTS, "--data", data, "--out", tmp_path / "run", *TRAIN)
    assert json.loads((tmp_path / "run/run.json").read_text())["config"]["runtime"] == "portable"
    assert report["planned_peak_bytes"] is not None


@plain_build
def test_a_plain_runtime_is_told_from_a_training_build(tmp_path: Path) -> None:
    data = write_data(tmp_path / "d.npz", RESIDUAL)
    given = ("train", ARTIFACTS, "--data", data, "--out", tmp_path / "run", *TRAIN, "--runtime", "ort-training")
    refused = answer(*given, code=2)
    assert refused["kind"] == "RuntimeMissingError"
    assert "training build" in refused["error"]
    assert ("onnxruntime-training-cpu" in refused["error"]) == (package(describe(), "ort-training") is not None)
    assert not (tmp_path / "run").exists()
    assert "train with --runtime portable" in refused["error"]
    alone = bundle_without_steps(tmp_path / "alone")
    refused = answer("train", alone, "--data", data, "--out", tmp_path / "run", *TRAIN, code=2)
    assert "export the bundle with --runtime portable or both" in refused["error"]


def test_nothing_is_planned_for_artifacts_alone(tmp_path: Path) -> None:
    refused = answer("plan", bundle_without_steps(tmp_path / "alone"), code=2)
    assert "has training artifacts only, and for these nothing is planned" in refused["error"]


def test_a_bundle_without_artifacts_is_not_trained_by_them(tmp_path: Path) -> None:
    data = write_data(tmp_path / "d.npz", RESIDUAL)
    given = ("train", RESIDUAL, "--data", data, "--out", tmp_path / "run", *TRAIN, "--runtime", "ort-training")
    assert "export it with --runtime ort-training" in answer(*given, code=2)["error"]
    given = ("train", ARTIFACTS, *given[2:], "--micro-batch", 4)
    assert "--micro-batch needs --runtime portable" in answer(*given, code=2)["error"]
    given = (*given[:-2], "--on-oom", "replan")
    assert "--on-oom replan needs --runtime portable" in answer(*given, code=2)["error"]


def bundle_without_steps(folder: Path) -> Path:
    """As `export --runtime ort-training` writes it: step and gradient graphs are described and not there."""
    bundle = copy_bundle(ARTIFACTS, folder)

    def strip(manifest: dict[str, Any]) -> None:
        for block in manifest["blocks"]:
            for graph in (block["step"], block["accumulation"]["gradient"]):
                (bundle / graph["file"]).unlink()
                del manifest["files"][graph["file"]]

    edit_manifest(bundle, strip)
    return bundle


def test_step_graphs_may_be_missing_where_artifacts_stand_for_all_of_them(tmp_path: Path) -> None:
    bundle = bundle_without_steps(tmp_path / "b")
    opened = open_bundle(bundle)
    verify(opened)
    assert opened.manifest.runtimes == ("ort-training",)
    data = write_data(tmp_path / "d.npz", RESIDUAL)
    given = ("train", bundle, "--data", data, "--out", tmp_path / "run", *TRAIN)
    assert "export it with --runtime portable" in answer(*given, "--runtime", "portable", code=2)["error"]
    if TRAINS:  # auto takes what there is
        assert answer(*given)["steps"] == 2 * 3
    else:
        assert "training build" in answer(*given, code=2)["error"]


SPOILT = (
    *("one step missing", "a parameter renamed", "outputs in another order", "another h", "losses", "a flag of floats"),
    *("no reset", "a hyper-parameter", "a structure", "no update", "a step that stands for others"),
)


@pytest.mark.parametrize("change", SPOILT)
def test_artifacts_that_do_not_fit_the_block_are_refused(tmp_path: Path, change: str) -> None:
    bundle = copy_bundle(ARTIFACTS, tmp_path / "b")

    def spoil(manifest: dict[str, Any]) -> None:
        block = manifest["blocks"][0]
        training = block["ort_training"]["training"]
        if change == "one step missing":
            del manifest["files"][block["step"]["file"]]
        elif change == "a parameter renamed":
            next(t for t in training["inputs"] if t["name"].startswith("param/"))["name"] = "param/other"
        elif change == "outputs in another order":
            training["outputs"][:2] = training["outputs"][1::-1]
        elif change == "another h":
            training["outputs"][1]["shape"][0] = 1
        elif change == "losses":
            training["outputs"][0]["shape"] = ["N"]
        elif change == "a flag of floats":
            training["outputs"][3]["dtype"] = "float32"
        elif change == "no reset":
            training["inputs"] = [t for t in training["inputs"] if t["name"] != RESET]
        elif change == "a hyper-parameter":
            training["inputs"].append({"name": "momentum", "shape": [], "dtype": "float32"})
        elif change == "a structure":
            training["structure"] = "one"
        elif change == "no update":
            manifest["schema"] = 1
            del block["accumulation"]
        else:
            for own in manifest["blocks"]:
                del manifest["files"][own["step"]["file"]], manifest["files"][own["accumulation"]["gradient"]["file"]]
            block["forward"]["file"] = block["step"]["file"]

    edit_manifest(bundle, spoil)
    with pytest.raises(BundleError):
        open_bundle(bundle)


@training_build
def test_twenty_steps_agree_with_the_float64_oracle_and_with_the_portable_graphs() -> None:
    expected = np.asarray(json.loads(EXPECTED.read_text())["losses"])
    own, state = steps(artifacts=True)
    portable, other = steps(artifacts=False)
    for found in (own, portable):
        errors = np.abs(found - expected) / np.abs(expected)
        print(f"onnxruntime {runtime().__version__}: largest relative error of a loss {errors.max():.1e}")
        assert errors.max() < 2e-5
    assert state.keys() == other.keys()
    assert any(name.endswith("running_var") for name in state)
    for name, array in state.items():
        if array.dtype == np.int64:
            assert (array == 20).all(), name  # of batches tracked
        np.testing.assert_allclose(array, other[name], rtol=2e-3, atol=2e-5, err_msg=name)


@training_build
def test_the_runtimes_own_module_and_optimizer_take_the_artifacts_as_they_are() -> None:
    """What its Python package, and C++, C# and Java, call; the package itself would want torch."""
    native: Any = runtime().capi._pybind_state
    cpu = native.OrtDevice(native.OrtDevice.cpu(), native.OrtDevice.default_memory(), 0)
    expected = json.loads(EXPECTED.read_text())["losses"][0][0]
    folder = ARTIFACTS / "blocks/00/ort_training"
    state = native.load_checkpoint(str(folder / "checkpoint"))
    options = runtime().SessionOptions()
    models = (str(folder / f"{name}_model.onnx") for name in ("training", "eval"))
    module = native.Module(next(models), state, next(models), cpu, options)
    optimizer = native.Optimizer(str(folder / "optimizer_model.onnx"), state, cpu, options)
    optimizer.set_learning_rate(LR)
    x, y = next(batches())
    first, again, inference = (native.OrtValueVector() for _ in range(3))
    module.train_step([x, y], first)
    assert first[0].numpy() == pytest.approx(expected, rel=1e-5)
    optimizer.optimizer_step()
    module.lazy_reset_grad()
    module.train_step([x, y], again)
    assert again[0].numpy() < first[0].numpy()
    module.eval_step([x, y], inference)
    assert np.isfinite(inference[0].numpy())
    mean = "buf/parts.a.bn1.running_mean"
    moved = np.asarray(state.get_parameter(mean).data.numpy())
    assert np.abs(moved).max() > 0  # running statistics move with the steps
    reference = portable_buffers(x, y)
    assert not np.allclose(moved, reference[mean])  # after two steps, and after one:
    fresh = native.load_checkpoint(str(folder / "checkpoint"))
    once = native.Module(str(folder / "training_model.onnx"), fresh, None, cpu, options)
    once.train_step([x, y], first)
    for name, array in reference.items():
        found = np.asarray(fresh.get_parameter(name).data.numpy()).reshape(array.shape)
        np.testing.assert_allclose(found, array, rtol=1e-5, atol=1e-7, err_msg=name)


def portable_buffers(x: Array, y: Array) -> dict[str, Array]:
    """The buffers of the first block after one portable step: running variances are unbiased."""
    bundle = open_bundle(ARTIFACTS)
    block = load_blocks(bundle, 1, None)[0]
    block.step(Tensor.of(x), Tensor.of(y), {"lr": LR, **bundle.manifest.optimizer.hyper}, 0, 0)
    return {name: array for name, array in block.state().items() if name.startswith("buf/")}


@training_build
@pytest.mark.parametrize("schedule", ["interleaved", "sequential"])
def test_the_command_trains_by_artifacts_as_by_step_graphs(tmp_path: Path, schedule: str) -> None:
    data = write_data(tmp_path / "d.npz", RESIDUAL)
    reports = {
        name: answer(
            *("train", ARTIFACTS, "--data", data, "--out", tmp_path / name, *TRAIN),
            *("--schedule", schedule, "--runtime", name, "--memory-budget", "1GiB"),
        )
        for name in ("portable", "ort-training")
    }
    for own, other in zip(*(report["blocks"] for report in reports.values()), strict=True):
        assert own["training"]["loss"] == pytest.approx(other["training"]["loss"], rel=1e-3)
    assert reports["ort-training"]["planned_peak_bytes"] is None
    assert last_state(tmp_path / "ort-training")[0]["position"] == last_state(tmp_path / "portable")[0]["position"]


@training_build
def test_a_run_goes_on_bit_by_bit_and_not_on_another_runtime(tmp_path: Path) -> None:
    data = write_data(tmp_path / "d.npz", RESIDUAL)
    given = ("train", ARTIFACTS, "--data", data, *TRAIN, "--runtime", "ort-training", "--checkpoint-steps", 1)
    whole = answer(*given, "--out", tmp_path / "whole")
    begun = answer(*given, "--out", tmp_path / "begun")
    newest = max((tmp_path / "begun/state").iterdir())
    newest.unlink()  # go on from the commit before the last
    (tmp_path / "begun/report.json").unlink()
    again = answer(*given, "--out", tmp_path / "begun")
    assert again["blocks"][0]["training"] == begun["blocks"][0]["training"] == whole["blocks"][0]["training"]
    other = (*given[:-4], "--runtime", "portable", "--out", tmp_path / "begun")
    assert "runtime" in answer(*other, code=4)["error"]


def hidden(kind: bytes, *, first: bool) -> bytes:
    """A model with a node of the runtime's own domain whose operator is said twice, in two wire types."""
    op_type = [(4, BYTES, kind), (4, FIXED64, b"ReluGrad")]
    node = [*(op_type if first else op_type[::-1]), (7, BYTES, b"com.microsoft")]
    return render([(1, VARINT, 8), (7, BYTES, render([(1, BYTES, render(node))]))])


@pytest.mark.parametrize("first", [True, False])
def test_an_operator_cannot_hide_behind_another_wire_type(first: bool) -> None:
    with pytest.raises(BundleError, match="wire type 1"):
        scan(hidden(b"WaitEvent", first=first), training=True)


def test_an_operator_s_name_is_no_number() -> None:
    node = render([(4, VARINT, 3_000_000_000), (7, BYTES, b"com.microsoft")])
    with pytest.raises(BundleError, match="wire type 0"):
        scan(render([(1, VARINT, 8), (7, BYTES, render([(1, BYTES, node)]))]), training=True)


@training_build
def test_the_budget_bounds_what_is_asked_for(tmp_path: Path) -> None:
    """Nothing is planned for the artifacts; memory that is not there is refused before it is taken."""
    data = write_data(tmp_path / "d.npz", RESIDUAL, 512)
    given = ("train", ARTIFACTS, "--data", data, "--out", tmp_path / "run", "--runtime", "ort-training")
    small = answer(*given, "--epochs", 2, "--batch", 512, "--memory-budget", "76MiB", code=3)
    assert "memory" in small["error"]
