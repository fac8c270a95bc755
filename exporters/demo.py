"""The whole way on real data in minutes: a small ResNet on scikit-learn's handwritten digits.

Export runs here; training, evaluation and finishing run in processes of their own, as on a device, without torch.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from edgelocal.commands.export_options import ExportOptions
from edgelocal.errors import UsageError
from edgelocal.exporters.pack import export_bundle
from edgelocal.exporters.request import ExportRequest, make_request
from edgelocal.machine.budget import format_size, parse_size
from edgelocal.storage.whole import staging

Say = Callable[[str], None]
TEST_SHARE = 0.2


def run_demo(out: Path, memory_budget: str, say: Say) -> dict[str, Any]:
    """Export, train, evaluate, finish into the folder `out`; returns the training report and the conclusion.

    Raises:
        UsageError: scikit-learn is missing, or `out` exists.
    """
    started = time.perf_counter()
    budget = parse_size(memory_budget)
    if out.exists():
        raise UsageError(f"{out} exists; remove it or choose another --out")
    write_digits(out / "data")
    say(f"1. data: {out}/data, 1,797 handwritten digits of 8 x 8 pixels from scikit-learn")
    say(f"2. export: resnet14 in blocks of one unit, each with its auxiliary network -> {out}/bundle")
    export_bundle(_request(), out / "bundle", say)
    say(f"3. train: a process without torch, within {format_size(budget)} -> {out}/run")
    train = _edgelocal(
        ["train", f"{out}/bundle", "--data", f"{out}/data", "--out", f"{out}/run", "--memory-budget", memory_budget],
        say,
    )
    say(f"4. evaluate and finish -> {out}/model")
    scores = _edgelocal(["eval", f"{out}/run", "--data", f"{out}/data"], say)
    _edgelocal(["finish", f"{out}/run", "--out", f"{out}/model"], say)
    conclusion = (
        f"test accuracy {100 * scores['accuracy']:.2f} %, peak memory {format_size(train['process_peak_bytes'])} of a "
        f"budget of {format_size(budget)}, {time.perf_counter() - started:.0f} s in all. "
        f"The model: {out}/model/model.onnx"
    )
    return {"report": train, "scores": scores, "conclusion": conclusion}


def write_digits(folder: Path) -> None:
    """The digits as x_train, y_train, x_test, y_test (.npy); uint8 images (n, 1, 8, 8), every fifth for testing."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise UsageError("the demo takes its data from scikit-learn: type  pip install scikit-learn") from None
    digits = load_digits()
    images = np.clip(digits.images * 16, 0, 255).astype(np.uint8)[:, None]
    labels = digits.target.astype(np.int64)
    test = np.arange(len(labels)) % round(1 / TEST_SHARE) == 0
    with staging(folder) as staged:
        for name, chosen in (("train", ~test), ("test", test)):
            np.save(staged / f"x_{name}.npy", images[chosen])
            np.save(staged / f"y_{name}.npy", labels[chosen])


def _request() -> ExportRequest:
    options = ExportOptions(
        blocks="per-unit", input_shape="1x8x8", pad=1, pad_mode="zero", flip=False, batch=64, epochs=15
    )
    return make_request("resnet14", options)


def _edgelocal(arguments: list[str], say: Say) -> dict[str, Any]:
    """Run a command in a process of its own and return its JSON."""
    say("   $ edgelocal " + " ".join(arguments))
    done = subprocess.run(
        [sys.executable, "-m", "edgelocal", *arguments, "--json"], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode != 0:
        raise UsageError(
            f"`edgelocal {' '.join(arguments)}` failed with exit code {done.returncode}; its message is above"
        )
    result: dict[str, Any] = json.loads(done.stdout)
    return result
