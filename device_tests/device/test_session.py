"""The one door to ONNX Runtime: tensors, graphs, and what it says when something is wrong."""

from __future__ import annotations

import dataclasses
import gc
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from device_tests.device.runs import DROPOUT, ENVIRONMENT, RESIDUAL, answer, copy_bundle, put, write_data
from edgelocal.bundle.folder import open_bundle
from edgelocal.bundle.spec import GraphSpec, TensorSpec
from edgelocal.errors import BundleError
from edgelocal.runtime.library import runtime_info
from edgelocal.runtime.session import Graph
from edgelocal.runtime.tensor import Tensor
from edgelocal.storage.tensors import Array

HEAD = open_bundle(DROPOUT).manifest.blocks[0].head
assert HEAD is not None
MODEL = (DROPOUT / HEAD.file).read_bytes()


def feeds(batch: int = 2) -> dict[str, Tensor]:
    rng = np.random.default_rng(0)
    return {t.name: Tensor.of(rng.normal(size=t.resolve(batch)).astype(np.float32)) for t in head().inputs}


def head() -> GraphSpec:
    assert HEAD is not None
    return HEAD


@pytest.mark.parametrize(
    "array",
    [
        np.arange(6, dtype=np.float32).reshape(2, 3),
        np.arange(24, dtype=np.float32).reshape(2, 3, 4).transpose(2, 0, 1),
        np.arange(10, dtype=np.int64)[::3],
        np.array([True, False, True]),
        np.float32(1.5).reshape(()),
        np.array(7, np.int64),
    ],
    ids=["float32", "transposed", "strided", "bool", "scalar", "integer scalar"],
)
def test_tensors_hold_what_they_were_given(array: Array) -> None:
    found = Tensor.of(array).array()
    assert (found.shape, found.dtype) == (array.shape, array.dtype)
    assert np.array_equal(found, array)


def test_a_tensor_outlives_the_array_it_was_made_of() -> None:
    tensors = [Tensor.of(np.full(100_000, n, np.float32)) for n in range(20)]
    gc.collect()
    noise = [np.full(100_000, -1, np.float32) for _ in range(20)]
    assert all((t.array() == n).all() for n, t in enumerate(tensors))
    assert len(noise) == 20
    assert tensors[3].batch == 100_000
    assert Tensor.of(np.float32(0.25).reshape(())).item() == 0.25


def logits_of(graph: Graph, given: dict[str, Tensor]) -> Array:
    result = Tensor.empty((given["h"].batch, 4), "float32")
    graph.run([given[t.name] for t in head().inputs], [result])
    return result.array()


def test_a_run_writes_into_the_memory_it_is_given() -> None:
    given = feeds()
    h, weight, bias = (given[t.name].array() for t in head().inputs)
    np.testing.assert_allclose(logits_of(Graph(head(), MODEL, 1), given), h @ weight.T + bias, rtol=1e-5)


def test_rows_are_the_same_memory() -> None:
    whole = Tensor.of(np.arange(12, dtype=np.float32).reshape(4, 3))
    part = whole.rows(1, 3)
    assert part.batch == 2
    part.array()[0, 0] = 50
    assert whole.array()[1, 0] == 50
    assert part._value.numpy()[0, 0] == 50


@pytest.mark.parametrize(
    "change",
    [
        lambda s: dataclasses.replace(s, inputs=s.inputs[::-1]),
        lambda s: dataclasses.replace(s, inputs=s.inputs[:-1]),
        lambda s: dataclasses.replace(s, outputs=(TensorSpec("other", ("N", 4), "float32"),)),
    ],
    ids=["order", "fewer", "output"],
)
def test_a_graph_of_another_signature_is_refused(change: object) -> None:
    assert callable(change)
    with pytest.raises(BundleError, match=r"head\.onnx has other inputs or outputs than the manifest says"):
        Graph(change(head()), MODEL, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": ("N", 5)}, r"logits is tensor\(float\) \['N', 4\], the manifest says float32 \['N', 5\]"),
        ({"shape": ("N", 4, 1)}, r"the manifest says float32 \['N', 4, 1\]"),
        ({"shape": (2, 4)}, r"the manifest says float32 \[2, 4\]"),
        ({"shape": ()}, r"the manifest says float32 \[\]"),
        ({"shape": ("N", "N")}, r"the manifest says float32 \['N', 'N'\]"),
        ({"dtype": "int64"}, r"logits is tensor\(float\) .* the manifest says int64"),
    ],
)
def test_a_tensor_of_another_shape_or_dtype_is_refused(change: dict[str, Any], message: str) -> None:
    spec = head()
    with pytest.raises(BundleError, match=message):
        Graph(dataclasses.replace(spec, outputs=(dataclasses.replace(spec.outputs[0], **change),)), MODEL, 1)
    swapped = dataclasses.replace(spec.inputs[1], shape=spec.inputs[1].shape[::-1])
    with pytest.raises(BundleError, match=r"the manifest says float32 \[24, 4\]; export the bundle again"):
        Graph(dataclasses.replace(spec, inputs=(spec.inputs[0], swapped, spec.inputs[2])), MODEL, 1)


@pytest.mark.parametrize("model", [b"", b"\xff" * 50, MODEL[:-60]], ids=["empty", "noise", "cut"])
def test_bytes_that_are_no_model_are_refused(model: bytes) -> None:
    with pytest.raises(BundleError, match=r"head\.onnx( cannot be loaded| has other inputs|: damaged ONNX)"):
        Graph(head(), model, 1)


def test_feeds_of_another_shape_are_an_error_that_names_the_graph() -> None:
    graph = Graph(head(), MODEL, 1)
    with pytest.raises(BundleError, match=r"head\.onnx cannot be run"):
        logits_of(graph, {**feeds(), "h": Tensor.of(np.zeros((2, 5), np.float32))})
    assert logits_of(graph, feeds()).shape == (2, 4)


def test_an_output_of_another_shape_is_an_error_that_names_the_graph() -> None:
    given = feeds()
    with pytest.raises(BundleError, match=r"head\.onnx cannot be run"):
        Graph(head(), MODEL, 1).run([given[t.name] for t in head().inputs], [Tensor.empty((2, 5), "float32")])


def test_a_bundle_with_a_foreign_graph_exits_with_4(tmp_path: Path) -> None:
    bundle = copy_bundle(RESIDUAL, tmp_path / "b")
    put(bundle, "blocks/00/step.onnx", b"no model at all")
    data = write_data(tmp_path / "d.npz", RESIDUAL)
    result = answer("train", bundle, "--data", data, "--out", tmp_path / "r", code=4)
    assert "blocks/00/step.onnx: damaged ONNX: wire type 6" in result["error"]


def test_the_runtime_is_described() -> None:
    assert runtime_info().as_dict() == {
        "onnxruntime": onnxruntime.__version__,
        "provider": "CPUExecutionProvider",
        "graph_level": "none",
        "machine": platform.machine(),
    }


@pytest.mark.parametrize("version", ["1.16.3", "0.9", "1.9.0"])
def test_a_runtime_too_old_is_refused_with_advice(tmp_path: Path, version: str) -> None:
    (tmp_path / "onnxruntime.py").write_text(f"__version__ = {version!r}")
    environment = {**ENVIRONMENT, "PYTHONPATH": os.pathsep.join([str(tmp_path), ENVIRONMENT.get("PYTHONPATH", "")])}
    code = (
        "from edgelocal.errors import RuntimeMissingError as E\n"
        "from edgelocal.runtime.library import runtime\n"
        "try:\n    runtime()\nexcept E as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True)
    assert done.stdout.startswith(f"ONNX Runtime {version} is too old, 1.17 or later is needed: pip install")


SCARCE = """
import resource, sys
import numpy as np
from edgelocal.runtime.block import Block
from edgelocal.bundle.folder import open_bundle
from edgelocal.errors import BudgetError
from edgelocal.runtime.graphs import GraphPool
from edgelocal.runtime.tensor import Tensor
from pathlib import Path

bundle = open_bundle(Path(sys.argv[1]))
block = Block(bundle, 0, GraphPool(bundle, 1))
hyper = {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.0}

def step(batch):
    x, y = np.zeros((batch, 1, 8, 8), np.float32), np.zeros(batch, np.int64)
    return block.step(Tensor.of(x), Tensor.of(y), hyper, 0, 0).loss

first = step(4)
x = Tensor.of(np.zeros((400_000, 1, 8, 8), np.float32))
y = Tensor.of(np.zeros(400_000, np.int64))
held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (held + (64 << 20), resource.RLIM_INFINITY))
try:
    block.step(x, y, hyper, 0, 1)
except BudgetError as error:
    print(error)
print(step(4) < first)
"""


def test_memory_that_is_not_there_is_a_budget_error_and_the_process_goes_on() -> None:
    """The limit on the address space makes the runtime's allocation fail, as a container's limit or ulimit would."""
    line = [sys.executable, "-c", SCARCE, str(RESIDUAL)]
    done = subprocess.run(line, capture_output=True, text=True, env=ENVIRONMENT, check=True, timeout=100)
    message, works = done.stdout.splitlines()
    assert "out of memory" in message
    assert "use a smaller --batch or more blocks" in message
    assert works == "True"


SILENT = """
import onnxruntime
told = []
onnxruntime.disable_telemetry_events = lambda: told.append("off")
from edgelocal.runtime.library import runtime
runtime()
runtime()
print(told)
"""


def test_the_runtime_is_told_once_to_report_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", SILENT], capture_output=True, text=True, env=ENVIRONMENT, check=True)
    assert done.stdout.strip() == "['off']"
