"""Whether ONNX Runtime's training build can run a block's artifacts: once, in a process of its own.

    python -m edgelocal.exporters.ort_trial MODEL...

Its gradient operators are not all there (a model can be made that cannot be loaded), and a few end the process that
runs them. Inputs are constants, the batch is 2.
"""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

TYPES = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(bool)": np.bool_}
LIMIT_S = 600


def complaint(models: Sequence[Path]) -> str | None:
    """What is wrong with one of the models, in the words of the runtime; None if all of them run."""
    command = [sys.executable, "-m", "edgelocal.exporters.ort_trial", *map(str, models)]
    done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=LIMIT_S, check=False)
    if done.returncode == 0:
        return None
    if done.returncode < 0:
        return f"running it ends the process ({signal.Signals(-done.returncode).name})"
    return " ".join(done.stderr.split())[-600:]


def run_once(path: Path) -> None:
    """Load the model and run it on constants."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    session.run(None, {argument.name: _constant(argument) for argument in session.get_inputs()})


def _constant(argument: Any) -> np.ndarray[Any, Any]:
    """Class 0, sample values and weights of a half: no variance is 0 by it, and no logarithm infinite."""
    shape = [size if isinstance(size, int) else 2 for size in argument.shape]
    kind = TYPES[argument.type]
    return np.full(shape, 0.5 if kind == np.float32 else kind == np.bool_, kind)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        run_once(Path(name))
