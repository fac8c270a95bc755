"""What a run of a graph takes of memory, measured in a process of its own, because a process has one arena."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import onnx

from device_tests.device.runs import ENVIRONMENT
from device_tests.export.helpers import Arrays
from edgelocal.bundle.spec import GraphSpec

# Reads a graph and its inputs, runs it in a region of `region` bytes without another beside it, and prints what runs
# take of memory: what they touch and the table.
TOUCHED = """
import json, pickle, sys
from pathlib import Path
from edgelocal.machine.budget import PeakMeter
from edgelocal.runtime.session import Graph
from edgelocal.runtime.tensor import Tensor
from edgelocal.runtime.arena import give_back, reserve
spec, model, values, batch, region = pickle.loads(Path(sys.argv[1]).read_bytes())
reserve(region, region)
graph = Graph(spec, model, 2)
inputs = [Tensor(values[t.name]) for t in spec.inputs]
outputs = [Tensor.empty(t.resolve(batch), t.dtype) for t in spec.outputs]
for output in outputs:
    output.array()[...] = 1  # so that its pages are there before it is measured
grown = []
for _ in range(4):
    give_back()
    with PeakMeter() as meter:
        graph.run(inputs, outputs, release=True)
    grown.append(meter.growth_bytes)
print(json.dumps(grown))
"""


def touched(work: Path, spec: GraphSpec, model: onnx.ModelProto, values: Arrays, batch: int, region: int) -> int:
    """Bytes: what is touched of the arena and its table, and what kernels take beside it."""
    (work / "case").write_bytes(pickle.dumps((spec, model.SerializeToString(), values, batch, region)))
    line = [sys.executable, "-c", TOUCHED, str(work / "case")]
    done = subprocess.run(line, capture_output=True, text=True, env=ENVIRONMENT, check=True, timeout=100)
    found: list[int] = json.loads(done.stdout)[1:]
    return min(found)
