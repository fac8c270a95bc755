"""`edgelocal demo`: the whole way on real data, by one command."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest

from edgelocal.errors import UsageError
from edgelocal.exporters.demo import run_demo, write_digits


def test_the_digits_are_those_of_scikit_learn(tmp_path: Path) -> None:
    from sklearn.datasets import load_digits

    write_digits(tmp_path / "data")
    parts = {name: np.load(tmp_path / "data" / f"{name}.npy") for name in ("x_train", "y_train", "x_test", "y_test")}
    assert {name: (a.shape, a.dtype.name) for name, a in parts.items()} == {
        "x_train": ((1437, 1, 8, 8), "uint8"),
        "y_train": ((1437,), "int64"),
        "x_test": ((360, 1, 8, 8), "uint8"),
        "y_test": ((360,), "int64"),
    }
    digits = load_digits()
    np.testing.assert_array_equal(parts["y_test"], digits.target[::5])
    np.testing.assert_array_equal(parts["x_test"][:, 0], np.clip(digits.images[::5] * 16, 0, 255))
    together = np.concatenate([parts["y_train"], parts["y_test"]])
    np.testing.assert_array_equal(np.bincount(together), np.bincount(digits.target))


def test_a_folder_that_exists_is_kept(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="exists; remove it or choose another --out"):
        run_demo(tmp_path, "256MiB", lambda text: None)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_demo_learns_within_its_budget(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "edgelocal", "demo", "--out", str(tmp_path / "demo"), "--json"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    result = json.loads(done.stdout)
    assert result["scores"]["accuracy"] > 0.95
    assert result["report"]["process_peak_bytes"] <= 256 << 20
    session = onnxruntime.InferenceSession(tmp_path / "demo" / "model" / "model.onnx")
    x, y = (np.load(tmp_path / "demo" / "data" / f"{name}_test.npy") for name in "xy")
    (logits,) = session.run(None, {session.get_inputs()[0].name: ((x / 255 - 0.5) / 0.5).astype(np.float32)})
    assert np.mean(logits.argmax(1) == y) == pytest.approx(result["scores"]["accuracy"], abs=1e-6)
