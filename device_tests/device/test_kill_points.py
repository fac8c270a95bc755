"""A run killed before each of its disk operations in turn (or every few), resumed, ends as if nothing had happened.

The children are forked from a process that has imported all but ONNX Runtime, whose threads do not survive a fork, so
that a kill costs little more than the time of the training. They die of SIGKILL, inside the writer, at a place that is
chosen and not hit by luck.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from device_tests.device.runs import DROPOUT, ENVIRONMENT, RESIDUAL, write_data

pytestmark = pytest.mark.kills
DRIVER = """
import json, os, shutil, signal, sys
from pathlib import Path
import edgelocal.commands.train, edgelocal.storage.store as store
from edgelocal.cli import main

out, log, data, arguments = Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[6:]
dense, stride = map(int, sys.argv[4:6])

class Dying(store.Disk):
    left = 0

def counted(name):
    plain = getattr(store.Disk, name)
    def operation(self, *given):
        Dying.left -= 1
        if Dying.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return plain(self, *given)
    return operation

for name in ("create", "open", "write", "sync", "close", "rename", "remove", "make_folder"):
    setattr(Dying, name, counted(name))

def child(run, at):
    pid = os.fork()
    if pid == 0:
        place = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(place, 1)
        os.dup2(place, 2)
        Dying.left = at
        store.DISK.__class__ = Dying
        main(["train", arguments[0], "--data", data, "--out", str(run), *arguments[1:]])
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def result(run):
    last = max((run / "state").glob("*.ckpt")).read_bytes()
    size = int.from_bytes(last[:8], "little")
    progress = json.loads(json.loads(last[8 : 8 + size])["__metadata__"]["progress"])
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    plain = [{k: v for k, v in r.items() if k != "seconds"} for r in records]
    names = sorted(p.relative_to(run).as_posix() for p in run.rglob("*") if p.suffix != ".ckpt")
    return [last[8 + size : -40].hex(), progress["position"], progress["scores"], plain, names]

assert child(out / "whole", 0) == 0, Path(log).read_text()
expected = result(out / "whole")
wrong, at, killed = [], 0, 0
while True:
    at += 1 if at < dense else stride
    run = out / f"at{at}"
    if child(run, at) != -signal.SIGKILL:
        break
    killed += 1
    code = child(run, 0)
    if code:
        wrong.append([at, code, Path(log).read_text()[-300:]])
    elif result(run) != expected:
        wrong.append([at, [a == b for a, b in zip(result(run), expected)], result(run)[4]])
    shutil.rmtree(run)
print(json.dumps([killed, wrong]))
"""

SCHEDULES = {
    "interleaved": ["--schedule", "interleaved"],
    "sequential": ["--schedule", "sequential"],
    "cached": ["--schedule", "sequential", "--cache", "float32", "--no-augment"],
}


@pytest.mark.parametrize(
    ("bundle", "schedule", "dense", "stride"),
    [
        (DROPOUT, "interleaved", 36, 10),
        (DROPOUT, "cached", 0, 23),
        (RESIDUAL, "sequential", 0, 97),
        pytest.param(DROPOUT, "interleaved", 0, 1, marks=pytest.mark.slow),
        pytest.param(DROPOUT, "cached", 0, 1, marks=pytest.mark.slow),
    ],
)
def test_a_run_killed_before_any_disk_operation_ends_with_the_same_bits(
    tmp_path: Path, bundle: Path, schedule: str, dense: int, stride: int
) -> None:
    data = write_data(tmp_path / "d.npz", bundle, samples=16, test=4)
    given = [bundle, "--epochs", 2, "--batch", 16, "--checkpoint-steps", 1, "--threads", 1, *SCHEDULES[schedule]]
    line = [sys.executable, "-c", DRIVER, tmp_path, tmp_path / "log", data, dense, stride, *given]
    done = subprocess.run(
        [str(a) for a in line], capture_output=True, text=True, env=ENVIRONMENT, check=False, timeout=500
    )
    assert done.returncode == 0, done.stderr
    kills, wrong = json.loads(done.stdout)
    print(f"{kills} kills")
    assert wrong == []
    assert kills >= 10
