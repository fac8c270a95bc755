"""Checkpoints under a fitting seal whose content was changed: refused by what is wrong, before anything is set."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from device_tests.device.runs import DROPOUT, answer, disturb, last_state, reseal, write_data
from edgelocal.errors import CheckpointError
from edgelocal.storage.state import TrainingState
from edgelocal.storage.store import CheckpointStore
from edgelocal.storage.tensors import Array
from edgelocal.training.checkpoint import check_progress, read_progress
from edgelocal.training.run import open_trained
from edgelocal.training.run_info import read_run

Progress = dict[str, Any]
Edit = Callable[[Progress, dict[str, Array]], object]
BIAS = "00:param/0.bias"


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[object]]:
    """(finished run of 2 epochs of 3 batches, the command that made it without --out)."""
    folder = tmp_path_factory.mktemp("trained")
    data = write_data(folder / "d.npz", DROPOUT)
    given: list[object] = ["train", DROPOUT, "--data", data, "--epochs", 2, "--batch", 16, "--no-augment"]
    answer(*given, "--out", folder / "run", "--checkpoint-steps", 1)
    return folder / "run", given


def position(**changes: Any) -> Edit:
    return lambda progress, _: progress["position"].update(changes)


def progress(**changes: Any) -> Edit:
    return lambda found, _: found.update(changes)


def first(name: str, **changes: Any) -> Edit:
    """Changes to the entry of the first block."""
    return lambda found, _: found[name][0].update(changes)


def tensor(change: Callable[[Array], Array], name: str = BIAS) -> Edit:
    return lambda _, tensors: tensors.update({name: change(tensors[name])})


REFUSED: list[tuple[str, Edit, str]] = [
    ("no position", lambda p, _: p.pop("position"), r"missing keys \['position'\]"),
    ("empty position", progress(position={}), "progress.position: unknown keys .*missing keys .*'batch'"),
    ("position of null", progress(position=None), "progress.position: expected an object"),
    ("steps as text", position(steps="x"), "position.steps: expected int, found 'x'"),
    ("steps of true", position(steps=True), "position.steps: expected int"),
    ("steps of 1.0", position(steps=1.0), "position.steps: expected int"),
    ("negative steps", position(steps=-1), "position.steps: expected 0 to "),
    ("stage -1", position(stage=-1), "position.stage: expected 0 to 1, found '-1'"),
    ("stage 5", position(stage=5), "position.stage: expected 0 to 1, found '5'"),
    ("epoch -3", position(stage=0, epoch=-3), "position.epoch: expected 0 to 2, found '-3'"),
    ("epoch 9", position(stage=0, epoch=9), "position.epoch: expected 0 to 2, found '9'"),
    ("epoch after the end", position(epoch=1), "position.epoch: expected 0 to 0, found '1'"),
    ("huge batch", position(stage=0, batch=10**30), r"position.batch: expected 0 to \d+, found '1000000"),
    ("batch after the end", position(batch=1), "position.batch: expected 0 to 0, found '1'"),
    ("metrics of 5", progress(metrics=5), "progress.metrics: expected a list, found '5'"),
    ("metrics of [5]", progress(metrics=[5]), r"progress.metrics\[0\]: expected an object, found '5'"),
    ("record of another key", first("metrics", more=1), r"progress.metrics\[0\]: unknown keys \['more'\]"),
    ("record of NaN", first("metrics", lr=float("nan")), r"metrics\[0\].lr: expected a finite number"),
    ("record of no block", first("metrics", blocks={"zz": {}}), r"metrics\[0\].blocks: expected blocks of the bundle"),
    (
        "record of no score",
        first("metrics", blocks={"00": {}}),
        r"metrics\[0\]: expected scores \['accuracy', 'loss'\]",
    ),
    ("validation of text", first("metrics", validation={"loss": "x"}), "validation.loss: expected a finite number"),
    ("validation of no loss", first("metrics", validation={"accuracy": 1}), r"expected scores \['accuracy', 'loss'\]"),
    ("scores of none", progress(scores=[]), "progress.scores: expected one for each of 2 blocks, found '0'"),
    ("scores of null", progress(scores=None), "progress.scores: expected a list"),
    ("score of text", first("scores", right="all"), r"progress.scores\[0\].right: expected a finite number"),
    ("negative samples", first("scores", samples=-1), "progress.scores.samples: expected 0 to"),
    ("measures of {}", progress(measures={}), "progress.measures: expected a list"),
    ("measures of none", progress(measures=[]), "progress.measures: expected one for each of 2 blocks, found '0'"),
    ("another measure", first("measures", add=1), r"progress.measures\[0\]: unknown keys \['add'\]"),
    ("steps over all", first("measures", steps=7), "progress.measures.steps: expected 0 to 6, found '7'"),
    ("negative time", first("measures", step_s=-1.0), "progress.measures.step_s: expected at least 0"),
    ("peak of null", progress(process_peak_bytes=None), "process_peak_bytes: expected int, found 'None'"),
    ("negative peak", progress(process_peak_bytes=-1), "process_peak_bytes: expected 0 to"),
    ("another key", progress(more=1), r"progress: unknown keys \['more'\]"),
    ("no tensor", lambda _, t: t.pop(BIAS), r"expected the state of the bundle's blocks, found .*00:param/0.bias"),
    ("another tensor", lambda _, t: t.update(more=t[BIAS]), "expected the state of the bundle's blocks, found .*more"),
    ("tensor of another shape", tensor(lambda a: a[:-1]), r"00:param/0.bias: expected float32 \[24\], found .*\[23\]"),
    ("tensor of rank 2", tensor(lambda a: a[None]), r"expected float32 \[24\], found .*\[1, 24\]"),
    ("float64 tensor", tensor(lambda a: a.astype(np.float64)), r"expected float32 \[24\], found .*float64"),
    ("NaN tensor", tensor(lambda a: a * np.float32("nan")), "'00:param/0.bias' of the checkpoint holds .* not finite"),
    ("infinite tensor", tensor(lambda a: a + np.float32("inf")), "holds a value that is not finite"),
]


@pytest.mark.parametrize(("edit", "message"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED])
def test_refused(trained: tuple[Path, list[object]], tmp_path: Path, edit: Edit, message: str) -> None:
    run = Path(shutil.copytree(trained[0], tmp_path / "run"))
    reseal(run, edit)
    with pytest.raises(CheckpointError, match=message):
        open_trained(run, 1)


VALUES = [None, True, -1, 0, 1.5, 10**30, float("nan"), "", "x", [], {}, [[]], {"": 0}, [0] * 9]


def test_only_checkpoint_errors_leave_under_other_structures(trained: tuple[Path, list[object]]) -> None:
    rng = random.Random(0)
    run = open_trained(trained[0], 1)
    whole = json.dumps(last_state(trained[0])[0])
    refused = 0
    for _ in range(2000):
        raw = json.loads(whole)
        disturb(raw, VALUES, rng)
        try:
            found = read_progress(TrainingState(raw, {}))
            check_progress(found, run.bundle.manifest, run.info.config, 3)
        except CheckpointError:
            refused += 1
    assert refused > 1400


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (position(steps=5), "position.steps: expected the steps before it, 6, found '5'"),
        (position(stage=0, epoch=1, batch=4, steps=7), "position.batch: expected 0 to 3, found '4'"),
        (position(stage=0, epoch=2, batch=1, steps=7), "position.batch: expected 0 to 0, found '1'"),
        (progress(metrics=5), "progress.metrics: expected a list"),
        (tensor(lambda a: a[:-1]), "00:param/0.bias: expected float32"),
    ],
    ids=["steps", "batch", "epoch", "metrics", "tensor"],
)
def test_train_refuses_with_4_what_the_data_shows_to_be_wrong(
    trained: tuple[Path, list[object]], tmp_path: Path, edit: Edit, message: str
) -> None:
    run = Path(shutil.copytree(trained[0], tmp_path / "run"))
    before = (run / "metrics.jsonl").read_bytes()
    reseal(run, edit)
    assert message in answer(*trained[1], "--out", run, code=4)["error"]
    assert (run / "metrics.jsonl").read_bytes() == before


def test_what_is_sealed_anew_without_a_change_is_continued(trained: tuple[Path, list[object]], tmp_path: Path) -> None:
    run = Path(shutil.copytree(trained[0], tmp_path / "run"))
    report = answer(*trained[1], "--out", run)
    max((run / "state").iterdir()).unlink()  # the step before the end
    reseal(run, lambda progress, tensors: None)
    loaded = CheckpointStore(run, writable=False).load(read_run(run).fingerprint)
    assert loaded is not None
    assert loaded.state.progress["position"] == {"stage": 0, "epoch": 1, "batch": 3, "steps": 6}
    again = answer(*trained[1], "--out", run)
    assert again["validation"] == report["validation"]
    assert [b["steps"] for b in again["blocks"]] == [6, 6]
