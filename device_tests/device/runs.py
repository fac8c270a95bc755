"""Golden bundles, small data for them, and the ways to train: inside this process, or by the real command."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from edgelocal.bundle.folder import open_bundle
from edgelocal.bundle.manifest import seal
from edgelocal.bundle.spec import TaskSpec
from edgelocal.data.pipeline import open_dataset
from edgelocal.runtime.block import Block
from edgelocal.storage.state import MAGIC, SEAL_BYTES, decode_state
from edgelocal.storage.tensors import Array, decode, encode
from edgelocal.training.blocks import load_blocks
from edgelocal.training.config import TrainConfig
from edgelocal.training.trainer import Trainer

GOLDEN = Path(__file__).parent / "golden"
RESIDUAL, DROPOUT, ARTIFACTS = (GOLDEN / name for name in ("residual", "dropout", "artifacts"))
ENVIRONMENT = {**os.environ, "PYTHONWARNINGS": "error", "COLUMNS": "120", "NO_COLOR": "1"}


def write_data(path: Path, bundle: Path, samples: int = 48, test: int = 16) -> Path:
    """A learnable problem of four classes for a golden bundle, as .npz with a test split."""
    rng = np.random.default_rng(5)
    y = np.arange(samples + test) % 4
    if bundle == RESIDUAL:
        x = rng.integers(0, 120, (len(y), 8, 8), dtype=np.uint8)
        for image, c in zip(x, y, strict=True):
            image[4 * (c // 2) : 4 * (c // 2) + 4, 4 * (c % 2) : 4 * (c % 2) + 4] += 100
    else:
        x = rng.normal(0, 0.5, (len(y), 12)).astype(np.float32) + np.eye(4, 12, dtype=np.float32)[y] * 2
    np.savez(path, x_train=x[:samples], y_train=y[:samples], x_test=x[samples:], y_test=y[samples:])
    return path


def command(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """`python -m edgelocal` with these arguments, to its end."""
    line = [sys.executable, "-m", "edgelocal", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, env=ENVIRONMENT, timeout=120, check=False, **options)


def answer(*arguments: object, code: int = 0, **options: Any) -> dict[str, Any]:
    """The object a command with --json prints, alone on stdout; its exit code must be `code`."""
    done = command(*arguments, "--json", **options)
    assert done.returncode == code, done.stderr
    result: dict[str, Any] = json.loads(done.stdout)
    return result


# argv: a command. It is run, and watched from outside: its report, and the highest VmHWM, looked at every 2 ms.
_WATCHING = """
import json, subprocess, sys, time
process = subprocess.Popen(sys.argv[1:], stdout=subprocess.PIPE)
seen = 0
while process.poll() is None:
    with open(f"/proc/{process.pid}/status") as status:
        lines = [line for line in status if line.startswith("VmHWM")]
    seen = max(seen, *(int(line.split()[1]) for line in lines), 0)
    time.sleep(0.002)
print(json.dumps([json.load(process.stdout), 1024 * seen]))
"""


def watched(*arguments: object) -> tuple[dict[str, Any], int]:
    """What `answer` gives, and the most that the process held, in bytes.

    A small process starts the command and watches: the kernel's figure begins with the memory of who starts it, and the
    command sets it back to measure its blocks.
    """
    line = [sys.executable, "-c", _WATCHING, sys.executable, "-m", "edgelocal", *map(str, arguments), "--json"]
    done = subprocess.run(line, capture_output=True, text=True, env=ENVIRONMENT, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    report, peak = json.loads(done.stdout)
    return report, peak


def slowness() -> float:
    """By what factor this processor is slower just now than where the limits on processor time were set, at least 1:
    a processor shared with other machines is twice as slow at times."""
    times = []
    for _ in range(9):
        started = time.process_time()
        total = 0
        for number in range(300_000):
            total += number * number % 7
        times.append(time.process_time() - started)
    return max(1.0, min(times) / 0.020)


def config(**changes: Any) -> TrainConfig:
    """Two epochs of batches of 16, without augmentation."""
    values: dict[str, Any] = {
        "epochs": 2,
        "batch": 16,
        "lr": 0.02,
        "lr_schedule": "cosine",
        "warmup_epochs": 0,
        "schedule": "interleaved",
        "seed": 1,
        "augment": False,
        "cache": "off",
        "hyper": {},
    }
    return TrainConfig(**(values | changes))


def trainer(bundle: Path, data: Path, cache_folder: Path | None = None, threads: int = 1, **changes: Any) -> Trainer:
    """A trainer at its start."""
    opened = open_bundle(bundle)
    manifest = opened.manifest
    splits = [open_dataset(data, split, manifest.input, manifest.task) for split in ("train", "test")]  # type: ignore[arg-type]
    blocks = load_blocks(opened, threads, None)
    return Trainer(manifest, config(**changes), blocks, splits[0], splits[1], cache_folder=cache_folder)


class Recorder:
    """A watcher that keeps what it is told; asks to stop after `stop_at` steps, or at its `stop_ask`-th chance."""

    def __init__(self, stop_at: int | None = None, stop_ask: int | None = None) -> None:
        self.stop_at = stop_at
        self.stop_ask = stop_ask
        self.steps = 0
        self.asked = 0
        self.records: list[dict[str, Any]] = []
        self.commits: list[int] = []

    def step(self, trainer: Trainer) -> None:
        self.steps += 1

    def epoch(self, trainer: Trainer, record: dict[str, Any]) -> None:
        self.records.append(record)

    def should_stop(self) -> bool:
        self.asked += 1
        return self.steps == self.stop_at or self.asked == self.stop_ask

    def commit(self, trainer: Trainer) -> None:
        self.commits.append(trainer.position.steps)


def state_of(blocks: tuple[Block, ...]) -> dict[str, Array]:
    """Copies of all tensors of all blocks."""
    return {f"{b.spec.name}:{name}": array.copy() for b in blocks for name, array in b.state().items()}


def assert_same_bits(a: dict[str, Array], b: dict[str, Array]) -> None:
    """Equal names and equal bytes."""
    assert a.keys() == b.keys()
    assert [name for name in a if a[name].tobytes() != b[name].tobytes()] == []


def last_state(run: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    """Progress and tensors of the newest checkpoint of a run."""
    path = max((run / "state").glob("*.ckpt"))
    data = path.read_bytes()
    fingerprint = data[: data.index(b'"},')].split(b'"fingerprint":"')[1][:64].decode()
    state = decode_state(data, fingerprint)
    return state.progress, state.tensors


def reseal(run: Path, edit: Callable[[dict[str, Any], dict[str, Array]], object]) -> None:
    """Change progress and tensors of every checkpoint of a run, under a fitting seal."""
    for path in (run / "state").glob("*.ckpt"):
        tensors, metadata = decode(path.read_bytes()[:-SEAL_BYTES])
        progress = json.loads(metadata["progress"])
        edit(progress, tensors)
        sealed = b"".join(encode(tensors, {**metadata, "progress": json.dumps(progress)})) + MAGIC
        path.write_bytes(sealed + hashlib.sha256(sealed).digest())


@contextlib.contextmanager
def unprivileged() -> Iterator[Path]:
    """A folder to work in as a user whom permissions bind, also where the tests run as root."""
    with tempfile.TemporaryDirectory() as folder:
        root = os.geteuid() == 0
        if root:
            shutil.chown(folder, 65534)
            os.seteuid(65534)
        try:
            yield Path(folder)
        finally:
            if root:
                os.seteuid(0)


def copy_bundle(source: Path, folder: Path, edit: Callable[[dict[str, Any]], None] | None = None) -> Path:
    """A copy of a bundle, its manifest changed by `edit`."""
    shutil.copytree(source, folder)
    if edit is not None:
        edit_manifest(folder, edit)
    return folder


def edit_manifest(folder: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest and seal it anew."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    del manifest["seal"]
    edit(manifest)
    (folder / "manifest.json").write_bytes(seal(json.dumps(manifest).encode()))


def put(folder: Path, name: str, data: bytes) -> None:
    """Replace a file of a bundle and what its manifest says of it."""
    (folder / name).write_bytes(data)
    entry = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit_manifest(folder, lambda manifest: manifest["files"].update({name: entry}))


def disturb(raw: Any, values: list[Any], rng: random.Random) -> None:
    """Change parsed JSON at one random place: an entry is left out, written twice, or one of `values`."""
    container, key = rng.choice(_places(raw, []))
    if rng.random() < 0.2:
        del container[key]
    elif rng.random() < 0.2 and isinstance(container, dict):
        container[f"{key}?"] = container[key]
    else:
        container[key] = rng.choice(values)


def _places(raw: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Every (container, key) of a tree."""
    for key in list(raw) if isinstance(raw, dict) else range(len(raw)) if isinstance(raw, list) else ():
        found.append((raw, key))
        _places(raw[key], found)
    return found


def task(loss: str = "cross_entropy", classes: int = 3, smoothing: float = 0.0) -> TaskSpec:
    """A task without class names."""
    return TaskSpec(loss, classes, smoothing, ())
