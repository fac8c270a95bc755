"""Tensors of a device, whose memory the runtime owns, against those of the host: the same training, bit by bit.

The device is the CPU here, so that every machine can run this; what is only so on CUDA is in test_cuda.py.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from device_tests.device.golden_steps import LR
from device_tests.device.runs import GOLDEN
from edgelocal.bundle.folder import open_bundle
from edgelocal.bundle.protobuf import fields
from edgelocal.errors import OverBudgetError, RuntimeMissingError
from edgelocal.runtime.block import Block
from edgelocal.runtime.graphs import GraphPool
from edgelocal.runtime.library import runtime
from edgelocal.runtime.pages import PageFile
from edgelocal.runtime.provider import CPU, Provider, refuse_strays, stray_nodes
from edgelocal.runtime.tensor import HOST, DeviceTensor, Place
from edgelocal.storage.tensors import Array

DEVICE = Provider(place=Place("cpu"), fixed_batch=True)


@pytest.mark.parametrize("dtype", ["float32", "int64", "bool"])
def test_values_go_up_and_come_down(dtype: str) -> None:
    values = np.arange(24).reshape(4, 3, 2).astype(dtype)
    tensor = Place("cpu").of(values)
    assert isinstance(tensor, DeviceTensor)
    assert (tensor.shape, tensor.dtype, tensor.nbytes, tensor.batch) == ((4, 3, 2), dtype, values.nbytes, 4)
    np.testing.assert_array_equal(tensor.array(), values)
    np.testing.assert_array_equal(tensor.rows(1, 3).array(), values[1:3])
    np.testing.assert_array_equal(tensor.rows(1, 4).rows(1, 2).array(), values[2:3])


def trained(bundle: Path, provider: Provider, page: Path | None, micro_batch: int | None) -> dict[str, Array]:
    """The state of all blocks after three steps, the loss of every step, and the last outputs in inference mode."""
    opened = open_bundle(bundle)
    graphs, place = GraphPool(opened, 1, provider=provider), provider.place
    pages = [PageFile(page / b.name, b.state()) if page else None for b in opened.manifest.blocks]
    blocks = [Block(opened, index, graphs, page=page) for index, page in enumerate(pages)]
    hyper = {"lr": LR, **opened.manifest.optimizer.hyper}
    shape = (10, *opened.manifest.input.shape)
    found: dict[str, Array] = {}
    rng = np.random.default_rng(0)
    for number in range(3):
        h, y = place.of(rng.normal(size=shape).astype(np.float32)), place.of(rng.integers(0, 4, 10))
        for block in blocks:
            result = block.step(h, y, hyper, 0, number, micro_batch)
            h = result.h
            assert isinstance(h, DeviceTensor) == (place is not HOST)
            found[f"{number} {block.index} loss"] = np.array([result.loss, result.metric])
    for block in blocks:
        found |= {f"{block.index} {name}": np.array(value) for name, value in block.state().items()}
    h = place.of(rng.normal(size=shape).astype(np.float32))
    for block in blocks:
        h = block.forward(h)
        found[f"{block.index} logits"] = np.array(block.head(h).array())
        block.close()
    return found


@pytest.mark.parametrize(
    ("bundle", "paged", "micro_batch"),
    [("residual", False, None), ("residual", True, None), ("dropout", False, None), ("artifacts", False, 4)],
)
def test_blocks_train_on_a_device_as_on_the_host(
    tmp_path: Path, bundle: str, paged: bool, micro_batch: int | None
) -> None:
    page = tmp_path if paged else None
    host, device = (trained(GOLDEN / bundle, provider, page, micro_batch) for provider in (CPU, DEVICE))
    assert host.keys() == device.keys()
    for name, value in host.items():
        np.testing.assert_array_equal(device[name], value, err_msg=name)


def test_memory_that_a_device_has_not_is_an_error_that_says_so() -> None:
    with pytest.raises(OverBudgetError, match=r"memory of the device for float32 \[1099511627776\]: out of memory"):
        Place("cpu").empty((1 << 40,), "float32")


def operators(model: bytes) -> list[str]:
    """The operator of every node of a model."""
    graph = next(value for number, _, value in fields(model) if number == 7)
    nodes = (value for number, _, value in fields(graph) if number == 1)
    return [next(value for number, _, value in fields(node) if number == 4).decode() for node in nodes]


RECORDS = hasattr(runtime().InferenceSession, "get_provider_graph_assignment_info")


@pytest.mark.skipif(not RECORDS, reason="ONNX Runtime says from 1.24.1 on where nodes went")
def test_nodes_that_went_elsewhere_are_counted_and_refused() -> None:
    opened = open_bundle(GOLDEN / "residual")
    model = opened.read(opened.manifest.blocks[0].forward.file)
    options = runtime().SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    options.graph_optimization_level = runtime().GraphOptimizationLevel.ORT_DISABLE_ALL
    session = runtime().InferenceSession(model, options, providers=[CPU.name])
    assert not stray_nodes(session, CPU.name)
    found = stray_nodes(session, "OtherExecutionProvider")
    kinds = Counter(operators(model))
    assert found == kinds
    with pytest.raises(RuntimeMissingError, match=f"no kernel for {kinds.total()} nodes.* --allow-cpu-fallback"):
        refuse_strays(found, "OtherExecutionProvider")
    refuse_strays(Counter(), CPU.name)
