"""The device side on every supported pair of Python and ONNX Runtime: `make matrix`, or `nox` with edgelocal[dev].

A session a row of ROWS makes an environment, runs the device suite in it and trains two golden bundles by the command;
`compare` prints one table of what they left under out/matrix and fails if a row failed or differs too much.

    nox -- --json FILE                     the table to FILE as well (default: out/matrix/matrix.json)
    nox -s "row(py310-ort1.17)" compare    one row anew, beside what the others left
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import nox

nox.options.envdir = "out/matrix/environments"
nox.options.error_on_missing_interpreters = True
nox.options.download_python = "never"


@dataclass(frozen=True)
class Row:
    """A pair, and what is installed beside edgelocal[image,test]. `constraints`: a file of versions, or none."""

    name: str
    python: str
    packages: tuple[str, ...]
    constraints: str | None = None
    artifacts: bool = False  # also train with --runtime ort-training


ROWS = (
    Row("py310-ort1.17", "3.10", ("onnxruntime==1.17.*", "numpy<2")),
    Row("py310-ort1.23", "3.10", ("onnxruntime==1.23.2",)),
    Row("py311-training", "3.11", ("onnxruntime-training-cpu==1.19.2",), "constraints/training.txt", artifacts=True),
    Row("py312-newest", "3.12", ("onnxruntime",), "constraints/newest.txt"),
    Row("py313-newest", "3.13", ("onnxruntime",), "constraints/newest.txt"),
)
RESULTS = Path("out/matrix/rows")
TABLE = Path("out/matrix/matrix.json")
GOLDEN = Path("device_tests/device/golden")

# As SUITE in the Makefile.
MARKS = "not slow and not kills"
SUITE = ("-n", "2", "--dist", "loadfile", "device_tests/device", "-p", "no:cacheprovider", "-m", MARKS)
AGREE = ("-p", "no:cacheprovider", "-s", "-k", "agree_with_the_float64_oracle")
ERROR = re.compile(r"largest relative error of a loss.* (\S+)$", re.MULTILINE)
DATA = """
import sys
from pathlib import Path
from device_tests.device.runs import RESIDUAL, write_data
write_data(Path(sys.argv[1]), RESIDUAL, 96, 32)
"""
TRAIN = ("--epochs", "6", "--seed", "1", "--threads", "1", "--resume", "never", "--json")

# What may lie between a row and the newest: 36 steps amplify rounding.
LOSS_ERROR = 2e-5  # of 20 steps against float64, as device_tests/device/test_runtimes.py asks
LOSS_APART = 1e-5
WEIGHTS_APART = 1e-4


@dataclass(frozen=True)
class Line:
    """A line of the table. `runtime`: as installed; `by`: what trained; None: there is no such result."""

    row: str
    python: str
    runtime: str | None
    by: str
    passed: int | None
    failed: int | None
    skipped: int | None
    seconds: float | None
    loss_error: float | None
    losses_apart: float | None
    weights_apart: float | None
    same_bits: bool | None  # losses and weights, as the newest


@nox.session(python=False)
def clear(session: nox.Session) -> None:
    """Forget the results of earlier runs."""
    shutil.rmtree(RESULTS, ignore_errors=True)


@nox.session
@nox.parametrize("python,row", [nox.param(row.python, row, id=row.name) for row in ROWS])
def row(session: nox.Session, row: Row) -> None:
    """The suite and the trainings of a row."""
    folder = RESULTS / row.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    constraints = ("--constraint", row.constraints) if row.constraints else ()
    session.install(*constraints, "--editable", ".[image,test]", *row.packages)
    pytest = ("python", "-m", "pytest")
    session.run(*pytest, *SUITE, f"--junit-xml={folder}/suite.xml", success_codes=[0, 1])
    for by in ("portable", "ort-training") if row.artifacts else ("portable",):
        test = "test_runtimes.py" if by == "portable" else "test_ort_training.py"
        said = session.run(*pytest, *AGREE, f"device_tests/device/{test}", silent=True, success_codes=[0, 1])
        (folder / f"{by}.txt").write_text(str(said))
    session.run("python", "-c", DATA, f"{folder}/data.npz")
    train(session, folder, "residual", "portable")
    train(session, folder, "artifacts", "portable")
    if row.artifacts:
        train(session, folder, "artifacts", "ort-training")
    if tests(folder)["failed"]:
        session.error(f"tests failed: {folder}/suite.xml")


def train(session: nox.Session, folder: Path, bundle: str, by: str) -> None:
    """Train a golden bundle by the command, and write its model."""
    run = folder / f"{bundle}-{by}"
    data = ("--data", f"{folder}/data.npz")
    session.run(
        "edgelocal", "train", f"{GOLDEN / bundle}", *data, "--out", f"{run}", "--runtime", by, *TRAIN, silent=True
    )
    session.run("edgelocal", "finish", f"{run}", "--out", f"{run / 'model'}", "--json", silent=True)


@nox.session(python=False)
def compare(session: nox.Session) -> None:
    """The table of all rows; fails if one failed, is missing, or is too far from the newest."""
    parser = argparse.ArgumentParser(prog="nox --")
    parser.add_argument("--json", type=Path, default=TABLE)
    path = parser.parse_args(session.posargs).json
    lines = [line(row, by) for row in ROWS for by in (("portable", "ort-training") if row.artifacts else ("portable",))]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([asdict(line) for line in lines], indent=1) + "\n")
    print(f"\n{table(lines)}\n\nrows of the same weights, bit by bit: {groups(lines)}\n")
    wrong = [f"{line.row}, {line.by}: {text}" for line in lines for text in complaints(line)]
    if wrong:
        session.error("; ".join(wrong))


def line(row: Row, by: str) -> Line:
    """What a row left."""
    folder, newest = RESULTS / row.name, RESULTS / ROWS[-1].name
    runs = ("artifacts-ort-training",) if by == "ort-training" else ("residual-portable", "artifacts-portable")
    pairs = [(folder / run, newest / run.replace("ort-training", "portable")) for run in runs]
    trained = all((run / "model/weights.safetensors").exists() for pair in pairs for run in pair)
    losses = [apart(losses_of(a), losses_of(b)) for a, b in pairs] if trained else None
    weights = [apart(weights_of(a), weights_of(b)) for a, b in pairs] if trained else None
    report = pairs[0][0] / "report.json"
    version = json.loads(report.read_text())["runtime"]["onnxruntime"] if report.exists() else None
    package = re.split("[=<>]", row.packages[0])[0]
    said = folder / f"{by}.txt"
    errors = ERROR.findall(said.read_text()) if said.exists() else []
    return Line(
        row=row.name,
        python=row.python,
        runtime=version and f"{package} {version}",
        by=by,
        **tests(folder),
        loss_error=float(errors[0]) if errors else None,
        losses_apart=max(losses) if losses else None,
        weights_apart=max(weights) if weights else None,
        same_bits=not any((*losses, *weights)) if losses and weights else None,
    )


def tests(folder: Path) -> dict[str, Any]:
    """Counts and seconds of the suite of a row."""
    path = folder / "suite.xml"
    if not path.exists():
        return dict.fromkeys(("passed", "failed", "skipped", "seconds"))
    suite = next(ElementTree.parse(path).iter("testsuite")).attrib
    failed, skipped = int(suite["failures"]) + int(suite["errors"]), int(suite["skipped"])
    passed = int(suite["tests"]) - failed - skipped
    return {"passed": passed, "failed": failed, "skipped": skipped, "seconds": round(float(suite["time"]))}


def losses_of(run: Path) -> dict[str, Any]:
    """The losses of every epoch of a run, on the data of this digest."""
    import numpy as np

    digest = json.loads((run / "run.json").read_text())["data_digest"]
    epochs = [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]
    found = [[*(b["loss"] for b in epoch["blocks"].values()), epoch["validation"]["loss"]] for epoch in epochs]
    return {digest: np.asarray(found)}


def weights_of(run: Path) -> dict[str, Any]:
    """The tensors of the model of a run."""
    from edgelocal.storage.tensors import decode

    return decode((run / "model/weights.safetensors").read_bytes())[0]


def apart(found: dict[str, Any], expected: dict[str, Any]) -> float:
    """The largest difference of a tensor, relative to its largest value (one below 0.01 counts as that large); 0.0: the
    same bits; infinite: not the same tensors."""
    import numpy as np

    largest = 0.0
    if found.keys() != expected.keys():
        return float("inf")
    for name, a in found.items():
        b = expected[name]
        if a.tobytes() != b.tobytes():
            difference = np.abs(a.astype(np.float64) - b).max() / max(np.abs(b).max(), 0.01)
            largest = max(largest, float(np.nan_to_num(difference, nan=np.inf)), np.finfo(float).tiny)
    return largest


def groups(lines: list[Line]) -> str:
    """The rows, those of equal weights together."""
    found: dict[bytes, list[str]] = {}
    for line in lines:
        path = RESULTS / line.row / f"artifacts-{line.by}" / "model/weights.safetensors"
        if path.exists():
            found.setdefault(path.read_bytes(), []).append(f"{line.row} {line.by}")
    return "; ".join(", ".join(group) for group in found.values())


def complaints(line: Line) -> list[str]:
    """What is wrong with a line."""
    if line.passed is None:
        return ["no result"]
    wrong = [f"{line.failed} tests failed"] if line.failed or not line.passed else []
    for what, value, bound in (
        ("loss against float64", line.loss_error, LOSS_ERROR),
        ("losses against the newest", line.losses_apart, LOSS_APART),
        ("weights against the newest", line.weights_apart, WEIGHTS_APART),
    ):
        if value is None:
            wrong.append(f"{what}: no result")
        elif value > bound:
            wrong.append(f"{what}: {value:.1e}, at most {bound:.0e} allowed")
    return wrong


def table(lines: list[Line]) -> str:
    """Markdown."""

    def number(value: float | None) -> str:
        return "none" if value is None else f"{value:.1e}"

    def difference(value: float | None) -> str:
        return "same bits" if value == 0 else number(value)

    text = [
        "| Python | runtime | trained by | passed | failed | skipped | s | loss against float64 "
        "| losses against the newest | weights against the newest |",
        "|---|---|---|--:|--:|--:|--:|--:|--:|--:|",
    ]
    for line in lines:
        counts = (line.passed, line.failed, line.skipped, line.seconds)
        cells = (line.python, line.runtime or "none", line.by, *("none" if c is None else f"{c}" for c in counts))
        differences = (line.losses_apart, line.weights_apart)
        text.append(f"| {' | '.join((*cells, number(line.loss_error), *map(difference, differences)))} |")
    return "\n".join(text)
