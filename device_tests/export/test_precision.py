"""Products in bfloat16, products and convolutions in TF32: what is rounded, and how far training moves by it.

No runtime has either on the CPU, so they are emulated: what goes in is rounded, multiplied and added up in float32; of
bfloat16 the sum is rounded too. That is what the device does but for the order of the sums. The differences are printed
with -s; docs/targets.md has them.
"""

from __future__ import annotations

import copy
from collections import Counter

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from device_tests.export.accumulation import build
from device_tests.export.helpers import Array, Arrays, session
from edgelocal.bundle.spec import TaskSpec
from edgelocal.exporters.bfloat16 import PRODUCTS, ROUNDED, in_bfloat16
from edgelocal.exporters.coverage import strays
from edgelocal.exporters.forms import CUDA
from edgelocal.exporters.memory.optimise import optimise
from edgelocal.exporters.memory.shapes import value_types
from edgelocal.exporters.onnx_accumulate import gradient_graph
from edgelocal.exporters.onnx_block import ExportedGraph
from edgelocal.exporters.onnx_step import step_graph
from edgelocal.exporters.optimizers import sgd
from edgelocal.exporters.rules import LocalBlock
from edgelocal.exporters.step import LocalStep
from edgelocal.exporters.units import load_network
from edgelocal.exporters.zoo.custom import from_module

TASK = TaskSpec("cross_entropy", 10, 0.0, ())
BATCH, STEPS = 32, 150
RATES = {"mlp": 0.05, "resnet8": 0.02}
NETWORKS: dict[str, tuple[int, ...]] = {"mlp": (64,), "resnet8": (3, 16, 16)}
ULP = 2.0**-8  # the largest relative error of a rounding to bfloat16, and what half of its last place is at most


def block_of(network: str) -> LocalBlock:
    return build(load_network(network, NETWORKS[network], 10, seed=0), 1, "bp")[0]


def emulated(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same numbers on the CPU: products of rounded values in float32, their results rounded."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    del result.graph.node[:]
    del result.graph.value_info[:]
    for node in model.graph.node:
        if node.op_type not in PRODUCTS or not all(ROUNDED in name for name in node.input):
            result.graph.node.append(node)
            continue
        output = node.output[0]
        wide = [f"{output}/{i}" for i in range(len(node.input))]
        for source, name in zip(node.input, wide, strict=True):
            result.graph.node.append(helper.make_node("Cast", [source], [name], to=TensorProto.FLOAT))
        product = onnx.NodeProto()
        product.CopyFrom(node)
        product.input[:], product.output[:] = wide, [f"{output}/exact"]
        rounding = helper.make_node("Cast", [f"{output}/exact"], [output], to=TensorProto.BFLOAT16)
        result.graph.node.extend([product, rounding])
    return result


def in_tf32(model: onnx.ModelProto) -> onnx.ModelProto:
    """What goes into products and convolutions rounded to the 11 significant bits of TF32, by Veltkamp's splitting:
    with c = (2^13 + 1) x, all in float32, x is c - (c - x) but for its last 13 bits."""
    result = onnx.ModelProto()
    result.CopyFrom(model)
    del result.graph.node[:]
    result.graph.initializer.append(numpy_helper.from_array(np.float32(2**13 + 1).reshape(()), "split"))
    for original in model.graph.node:
        node = onnx.NodeProto()
        node.CopyFrom(original)
        if node.op_type in (*PRODUCTS, "Conv", "ConvTranspose"):
            for i, source in enumerate(original.input[:2]):
                part = [f"{original.output[0]}/tf32/{i}/{step}" for step in range(3)]
                result.graph.node.append(helper.make_node("Mul", [source, "split"], [part[0]]))
                result.graph.node.append(helper.make_node("Sub", [part[0], source], [part[1]]))
                result.graph.node.append(helper.make_node("Sub", [part[0], part[1]], [part[2]]))
                node.input[i] = part[2]
        result.graph.node.append(node)
    return result


def data(network: str, step: int) -> Arrays:
    """A batch of ten classes that can be learned."""
    rng = np.random.default_rng(step)
    y = rng.integers(0, 10, BATCH)
    centres = np.random.default_rng(99).standard_normal((10, *NETWORKS[network]))
    x = 0.5 * centres[y] + rng.standard_normal((BATCH, *NETWORKS[network]))
    return {"x": x.astype(np.float32), "y": y}


def initial(block: LocalBlock, graph: ExportedGraph) -> Arrays:
    local = {name: key for key, name in block.tensor_names().items()}
    state = block.state_dict()
    return {
        t.name: state[local[t.name.partition("/")[2]]].numpy().copy()
        if t.kind in ("param", "buf")
        else np.zeros(t.resolve(1), np.float32)
        for t in graph.inputs
        if t.kind
    }


def ran(runtime: onnxruntime.InferenceSession, graph: ExportedGraph, feeds: Arrays) -> Arrays:
    names = [t.name for t in graph.outputs]
    return dict(zip(names, runtime.run(names, {t.name: feeds[t.name] for t in graph.inputs}), strict=True))


def apart(found: Array, expected: Array) -> float:
    """||a - b|| / ||b||."""
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def flat(arrays: Arrays) -> Array:
    return np.concatenate([a.reshape(-1) for name, a in sorted(arrays.items()) if name.startswith("new/acc/")])


def eager(block: LocalBlock, network: str, *, rounded: bool) -> Array:
    """PyTorch's own gradients of one step."""
    module = copy.deepcopy(LocalStep(block, TASK)).train()
    values = data(network, 0)
    with torch.autocast("cpu", torch.bfloat16, enabled=rounded):
        loss = module(torch.from_numpy(values["x"]), torch.from_numpy(values["y"]))[0]
    loss.backward()
    gradients = [p.grad.reshape(-1) for _, p in sorted(module.named_parameters()) if p.grad is not None]
    return np.asarray(torch.cat(gradients).numpy())


def test_the_runtime_rounds_as_pytorch_does() -> None:
    x = torch.randn(10_000) * 10.0 ** torch.randint(-30, 30, (10_000,))
    nodes = [
        helper.make_node("Cast", ["x"], ["r"], to=TensorProto.BFLOAT16),
        helper.make_node("Cast", ["r"], ["y"], to=TensorProto.FLOAT),
    ]
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["N"]) for name in "xy"]
    graph = helper.make_graph(nodes, "round", info[:1], info[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    found = session(model).run(None, {"x": x.numpy()})[0]
    np.testing.assert_array_equal(found, x.bfloat16().float().numpy())


def test_tf32_keeps_eleven_bits() -> None:
    x = np.random.default_rng(0).standard_normal((64, 64), np.float32)
    info = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [64, 64]) for name in "xy"]
    one = numpy_helper.from_array(np.eye(64, dtype=np.float32), "one")
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "one"], ["y"])], "g", info[:1], info[1:], [one])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    found = session(in_tf32(model)).run(None, {"x": x})[0]
    mantissa, exponent = np.frexp(x)
    np.testing.assert_array_equal(found, np.ldexp(np.round(mantissa * 2**11) / 2**11, exponent))


@pytest.mark.parametrize("network", NETWORKS)
def test_one_step_from_the_same_state(network: str) -> None:
    """The gradients are as near to those of float32 as PyTorch's are when it rounds products and convolutions."""
    block = block_of(network)
    exact = gradient_graph(block, TASK, NETWORKS[network], torch.float32, CUDA)
    rounded = in_bfloat16(exact)
    feeds = {**initial(block, exact), **data(network, 0), "share": np.ones((), np.float32)}
    expected = ran(session(exact.model), exact, feeds)
    found = ran(session(emulated(rounded.model)), rounded, feeds)
    loss = abs(float(found["loss"]) / float(expected["loss"]) - 1)
    gradients = apart(flat(found), flat(expected))
    fast = ran(session(in_tf32(exact.model)), exact, feeds)
    near = apart(flat(fast), flat(expected))
    usual = apart(eager(block, network, rounded=True), eager(block, network, rounded=False))
    print(f"{network}: one step, loss {loss:.1e}, gradients {gradients:.1e}, PyTorch's autocast {usual:.1e}")
    moved = abs(float(fast["loss"]) / float(expected["loss"]) - 1)
    print(f"{network}: one step in TF32, loss {moved:.1e}, gradients {near:.1e}")
    assert 0 < near < usual
    assert 0 < gradients < 1.5 * usual
    assert loss < ULP


@pytest.mark.parametrize("network", NETWORKS)
def test_training_comes_to_the_same_loss(network: str) -> None:
    block = block_of(network)
    exact = step_graph(block, TASK, sgd(), NETWORKS[network], torch.float32, CUDA)
    rounded = in_bfloat16(exact)
    losses = []
    programs = (exact, exact.model), (rounded, emulated(rounded.model)), (exact, in_tf32(exact.model))
    for graph, model in programs:
        runtime, state, seen = session(model), initial(block, graph), []
        numbers = {k: np.asarray(v, np.float32) for k, v in {"lr": RATES[network], **sgd().hyper}.items()}
        for step in range(STEPS):
            found = ran(runtime, graph, {**state, **numbers, **data(network, step)})
            state = {name: found[f"new/{name}"] for name in state}
            seen.append(float(found["loss"]))
        losses.append(seen)
    ends = [float(np.mean(seen[-20:])) for seen in losses]
    said = ", ".join(f"{end:.4f} in {name}" for end, name in zip(ends, ("float32", "bfloat16", "TF32"), strict=True))
    print(f"{network}: {STEPS} steps, mean loss of the last 20 {said}")
    assert ends[0] < 0.7 * losses[0][0], "it learns, so that there is something to compare"
    assert losses[0] not in losses[1:]
    assert max(abs(end - ends[0]) for end in ends) < 0.05 * losses[0][0]


@pytest.mark.parametrize("network", NETWORKS)
def test_only_products_are_rounded_and_they_have_kernels(network: str) -> None:
    block = block_of(network)
    exact = step_graph(block, TASK, sgd(), NETWORKS[network], torch.float32, CUDA)
    rounded = in_bfloat16(exact)
    assert (rounded.inputs, rounded.outputs) == (exact.inputs, exact.outputs)
    types = value_types(rounded.model)
    in_two_bytes = Counter(
        node.op_type
        for node in rounded.model.graph.node
        if TensorProto.BFLOAT16 in [types[name].dtype for name in (*node.input, *node.output) if name]
    )
    before, after = (Counter(n.op_type for n in g.model.graph.node) for g in (exact, rounded))
    assert in_two_bytes.keys() == {"Cast", *(kind for kind in PRODUCTS if kind in before)}
    assert {kind: after[kind] for kind in PRODUCTS} == {kind: before[kind] for kind in PRODUCTS}
    assert strays(rounded.model, BATCH) == ()


def test_a_lean_graph_computes_the_same_and_counts_two_bytes() -> None:
    block = block_of("mlp")
    rounded = in_bfloat16(gradient_graph(block, TASK, NETWORKS["mlp"], torch.float32, CUDA))
    lean = optimise(rounded, BATCH)
    feeds = {**initial(block, rounded), **data("mlp", 0), "share": np.ones((), np.float32)}
    before, after = (ran(session(emulated(model)), rounded, feeds) for model in (rounded.model, lean.model))
    assert [name for name in before if before[name].tobytes() != after[name].tobytes()] == []
    types = value_types(lean.model)
    assert types[f"x{ROUNDED}"].size.at(BATCH) == 2 * 64 * BATCH


def test_a_bias_is_added_in_float32_and_products_with_constants_stay() -> None:
    torch.manual_seed(0)
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AvgPool2d(3, 2, ceil_mode=True), nn.Flatten(), nn.Linear(36, 10))
    block = build(from_module(body, "pooled", (3, 9, 9), 10), 1, "bp")[0]
    exact = step_graph(block, TASK, sgd(), (3, 9, 9), torch.float32, CUDA)
    rounded = in_bfloat16(exact)
    constants = {i.name for i in exact.model.graph.initializer}
    fixed = [n for n in exact.model.graph.node if n.op_type == "MatMul" and constants.intersection(n.input)]
    assert len(fixed) >= 2
    kept = {n.output[0]: list(n.input) for n in rounded.model.graph.node}
    assert all(kept[n.output[0]] == list(n.input) for n in fixed)
    biased = [n for n in exact.model.graph.node if n.op_type == "Gemm" and len(n.input) == 3]
    assert len(biased) == 1
    assert kept[biased[0].output[0]][1] == biased[0].input[2]
    assert [n.op_type for n in rounded.model.graph.node if n.output[0] == biased[0].output[0]] == ["Add"]
    onnx.checker.check_model(rounded.model, full_check=True)


def test_a_scaled_bias_keeps_its_scale() -> None:
    info = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["N", 3]) for n in "ay"]
    node = helper.make_node("Gemm", ["a", "b", "c"], ["y"], "y", alpha=0.5, beta=2.0)
    inputs = [info[0], helper.make_tensor_value_info("b", TensorProto.FLOAT, [3, 3])]
    inputs.append(helper.make_tensor_value_info("c", TensorProto.FLOAT, [3]))
    model = helper.make_model(
        helper.make_graph([node], "g", inputs, info[1:]), opset_imports=[helper.make_opsetid("", 18)], ir_version=8
    )
    found = in_bfloat16(ExportedGraph(model, (), ()))
    a, b, c = np.eye(3, dtype=np.float32), np.full((3, 3), 4, np.float32), np.float32([0.1, 0.2, 0.3])
    result = session(emulated(found.model)).run(None, {"a": a, "b": b, "c": c})[0]
    np.testing.assert_array_equal(result, np.float32(0.5) * (a @ b) + np.float32(2) * c)


def test_numbers_of_another_type_stay_as_they_are() -> None:
    info = [helper.make_tensor_value_info(n, TensorProto.DOUBLE, ["N", 3]) for n in "ay"]
    b = numpy_helper.from_array(np.eye(3), "b")
    node = helper.make_node("MatMul", ["a", "b"], ["y"], "y")
    model = helper.make_model(helper.make_graph([node], "g", info[:1], info[1:], [b]))
    assert in_bfloat16(ExportedGraph(model, (), ())).model == model
