"""The only module that imports ONNX Runtime: model bytes -> something that runs.

Options, and why: one arena for all sessions, because an arena keeps what it once took: with one a session the process
held the peaks of all blocks at once (ResNet-32 in 14 blocks, batch 128: 1231 MiB against 338, docs/decisions/0006); no
memory pattern (it doubles the peak from the second run on); no spinning, because every session has threads of its
own, and those that wait must not take the cores from the one that works; one operator after the other, so that only
one block's activations live.
"""

from __future__ import annotations

import platform
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np

from edgelocal.device import describe
from edgelocal.doctor import advice
from edgelocal.errors import BudgetError, BundleError, EdgelocalError, RuntimeMissingError
from edgelocal.spec import GraphSpec
from edgelocal.tensors import Array

GRAPH_LEVEL = "all"
OLDEST_RUNTIME = (1, 17)


@dataclass(frozen=True)
class RuntimeInfo:
    """The runtime in use. Bits are the same for equal values of all of them."""

    version: str
    provider: str
    graph_level: str
    machine: str

    def as_dict(self) -> dict[str, str]:
        """Plain values for run.json."""
        return {
            "onnxruntime": self.version,
            "provider": self.provider,
            "graph_level": self.graph_level,
            "machine": self.machine,
        }


def runtime() -> ModuleType:
    """The onnxruntime module.

    Raises:
        RuntimeMissingError: none is installed, or one older than 1.17; the message says what to type here.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # 1.17 warns of newer interpreters when imported
            import onnxruntime
    except ImportError as error:
        raise RuntimeMissingError(f"no ONNX Runtime can be imported ({error}): {advice(describe())}") from None
    version: str = onnxruntime.__version__
    if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_RUNTIME:
        raise RuntimeMissingError(f"ONNX Runtime {version} is too old, 1.17 or later is needed: {advice(describe())}")
    module: ModuleType = onnxruntime
    return module


def runtime_info() -> RuntimeInfo:
    """Version, provider and settings that the bits of a run depend on."""
    return RuntimeInfo(runtime().__version__, "CPUExecutionProvider", GRAPH_LEVEL, platform.machine())


@cache
def _shared_arena() -> None:
    """Register the arena that every session of the process uses."""
    ort = runtime()
    place = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(place, ort.OrtArenaCfg({"arena_extend_strategy": 0}))


class Tensor:
    """A tensor in the runtime's memory. `.array()` is a view where the runtime allows it, else a copy."""

    def __init__(self, value: Any) -> None:
        self.value = value

    @classmethod
    def of(cls, array: Array) -> Tensor:
        """Copy (or wrap) a numpy array."""
        contiguous = np.ascontiguousarray(array).reshape(array.shape)
        return cls(runtime().OrtValue.ortvalue_from_numpy(contiguous))

    @property
    def batch(self) -> int:
        """The first dimension."""
        return int(self.value.shape()[0])

    def array(self) -> Array:
        """The values as a numpy array."""
        values: Array = self.value.numpy()
        return values

    def item(self) -> float:
        """The value of a () tensor."""
        return float(self.array())


class Graph:
    """A loaded ONNX graph of a bundle.

    Raises:
        BundleError: the runtime cannot load the model, or it is not the one the manifest describes.
        BudgetError: no memory to load it.
    """

    def __init__(self, spec: GraphSpec, model: bytes, threads: int) -> None:
        self.spec = spec
        ort = runtime()
        _shared_arena()
        options = ort.SessionOptions()
        options.enable_mem_pattern = False
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.use_env_allocators", "1")
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
        try:
            self._session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise _translated(error, f"{spec.file} cannot be loaded", BundleError) from error
        self._check_signature()

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run on all inputs of the graph; returns the outputs by name.

        Raises:
            BundleError: the graph wants an input that is not fed.
            BudgetError: the runtime could not get the memory it needs.
        """
        missing = [t.name for t in self.spec.inputs if t.name not in feeds]
        if missing:
            raise BundleError(
                f"{self.spec.file} wants {missing[0]!r}, which is not known here; upgrade edgelocal, or export again"
            )
        names = [t.name for t in self.spec.outputs]
        values = {t.name: feeds[t.name].value for t in self.spec.inputs}
        try:
            results = self._session.run_with_ort_values(names, values)
        except Exception as error:
            raise _translated(error, f"{self.spec.file} cannot be run", EdgelocalError) from error
        return {name: Tensor(value) for name, value in zip(names, results, strict=True)}

    def _check_signature(self) -> None:
        found = [i.name for i in self._session.get_inputs()], [o.name for o in self._session.get_outputs()]
        expected = [t.name for t in self.spec.inputs], [t.name for t in self.spec.outputs]
        if found != expected:
            raise BundleError(
                f"{self.spec.file} has other inputs or outputs than the manifest says; export the bundle again"
            )


def _translated(error: Exception, what: str, otherwise: type[EdgelocalError]) -> EdgelocalError:
    text = " ".join(str(error).split())
    if "allocate memory" in text or "bad_alloc" in text or "smaller than requested" in text:
        return BudgetError(f"{what}: out of memory ({text[:200]}); use a smaller --batch or more blocks")
    return otherwise(f"{what}: {text[:500]}")
