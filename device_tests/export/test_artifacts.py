"""`export --runtime ort-training|both`.

The artifacts are made where ONNX Runtime's training build is installed beside PyTorch (`make artifacts`); elsewhere
it is the refusal that is tested.
"""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

from edgelocal.bundle.folder import open_bundle, verify
from edgelocal.commands.export_options import ExportOptions
from edgelocal.errors import ExportError, UsageError
from edgelocal.exporters.ort_trial import complaint
from edgelocal.exporters.pack import export_bundle
from edgelocal.exporters.request import make_request
from edgelocal.runtime.library import has_training
from edgelocal.runtime.tensor import Tensor
from edgelocal.training.blocks import load_blocks

DOC = Path(__file__).parents[2] / "docs/ort-training.md"
TRAINS = has_training() and importlib.util.find_spec("onnxruntime.training") is not None
training_build = pytest.mark.skipif(not TRAINS, reason="no training build of ONNX Runtime beside PyTorch")
plain_build = pytest.mark.skipif(TRAINS, reason="a training build is installed")

NETWORKS = """
import torch
from torch import nn

class Most(nn.Module):
    def forward(self, x):
        return x.amax((2, 3))

class Sums(nn.Module):
    def forward(self, x):
        return x.cumsum(1)

class Norm(nn.Module):
    def forward(self, x):
        return (x - x.mean((2, 3), keepdim=True)) / (x.var((2, 3), keepdim=True) + 1e-5).sqrt()

class Buffers(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.arange(8).view(8, 1, 1) % 2 == 0)
        self.register_buffer("large", torch.tensor([2 ** 24 + 1, 2 ** 53]))

    def forward(self, x):
        return torch.where(self.mask, x, -x) + 0 * self.large[0].float()

LAYERS = {
    "average pool": lambda: nn.AvgPool2d(2), "padded pool": lambda: nn.AvgPool2d(3, 1, 1, count_include_pad=False),
    "max pool": lambda: nn.MaxPool2d(3, 2, 1), "silu": nn.SiLU, "gelu": nn.GELU, "variance": Norm,
    "group norm": lambda: nn.GroupNorm(2, 8), "dropout": lambda: nn.Dropout(0.3), "buffers": Buffers,
    "transposed": lambda: nn.ConvTranspose2d(8, 8, 2, 2),
}

def layer(name):
    middle = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), LAYERS[name]())
    last = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    return nn.Sequential(nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU()), middle, last)

def first():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU())

def most():
    return nn.Sequential(first(), nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU()), nn.Sequential(Most(), nn.Linear(8, 10)))

def sums():
    last = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))
    return nn.Sequential(first(), nn.Sequential(nn.Conv2d(8, 8, 3), Sums()), last)
"""


def exported(tmp_path: Path, network: str = "mlp", **changes: Any) -> Path:
    given = {"blocks": "1", "rule": "bp", "input_shape": "16", "pad": 0, "flip": False, "runtime": "both"}
    request = make_request(network, ExportOptions(**{**given, **changes}))  # type: ignore[arg-type]
    export_bundle(request, tmp_path / "b", lambda text: None)
    return tmp_path / "b"


@plain_build
def test_without_the_training_build_nothing_is_written_and_the_message_says_what_to_install(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"edgelocal\[export,ort-training\].*--runtime portable"):
        exported(tmp_path)
    assert not (tmp_path / "b").exists()


@training_build
@pytest.mark.parametrize(
    ("network", "module", "aten", "operator"),
    [("most", "2.0 (Most)", "aten.amax.default", "ReduceMax"), ("sums", "1.1 (Sums)", "aten.cumsum.default", "CumSum")],
)
def test_an_operator_without_a_gradient_is_named_with_its_module(
    tmp_path: Path, network: str, module: str, aten: str, operator: str
) -> None:
    (tmp_path / "net.py").write_text(NETWORKS)
    words = f"module {module} uses {aten}: .*no gradient for its operator {operator}; export with --runtime portable"
    with pytest.raises(ExportError, match=words.replace("(", r"\(").replace(")", r"\)")):
        exported(tmp_path, f"{tmp_path / 'net.py'}:{network}", input_shape="3x8x8")
    assert not (tmp_path / "b").exists()


LAYERS = (*("average pool", "padded pool", "max pool", "silu", "gelu", "variance", "group norm", "dropout", "buffers"),)


def one_layer(tmp_path: Path, name: str) -> Path:
    (tmp_path / "net.py").write_text(f"{NETWORKS}\ndef net():\n    return layer({name!r})\n")
    return exported(tmp_path, f"{tmp_path / 'net.py'}:net", input_shape="3x8x8")


@training_build
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_trained_by_its_artifacts_as_by_its_step_graph(tmp_path: Path, name: str) -> None:
    bundle = open_bundle(one_layer(tmp_path, name))
    portable, artifacts = (load_blocks(bundle, 1, None, artifacts=own)[0] for own in (False, True))
    rng = np.random.default_rng(0)
    for number in range(3):
        x, y = rng.normal(size=(6, 3, 8, 8)).astype(np.float32), rng.integers(0, 10, 6)
        hyper = {"lr": 0.1, **bundle.manifest.optimizer.hyper}
        losses = [b.step(Tensor.of(x), Tensor.of(y), hyper, 0, number).loss for b in (portable, artifacts)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    after = artifacts.state()
    for key, value in portable.state().items():
        assert after[key].dtype == value.dtype
        if value.dtype == np.float32:  # a bias in front of a normalisation has a gradient of rounding errors
            np.testing.assert_allclose(after[key], value, rtol=1e-3, atol=1e-4, err_msg=key)
        else:
            np.testing.assert_array_equal(after[key], value, err_msg=key)


@training_build
def test_a_gradient_that_the_runtime_cannot_compute_is_named_with_its_module(tmp_path: Path) -> None:
    words = r"module 1.1 \(ConvTranspose2d\) uses aten.convolution.default: .* gradient for its operator ConvTranspose;"
    with pytest.raises(ExportError, match=words):
        one_layer(tmp_path, "transposed")
    assert not (tmp_path / "b").exists()


@training_build
def test_what_ends_a_process_that_runs_it_is_a_complaint_and_not_our_end(tmp_path: Path) -> None:
    code = "import os, signal; os.kill(os.getpid(), signal.SIGFPE)"
    (tmp_path / "sitecustomize.py").write_text(code)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(tmp_path))
        assert complaint([tmp_path / "m.onnx"]) == "running it ends the process (SIGFPE)"


@training_build
def test_the_optimizer_of_the_artifacts_is_pytorchs_adamw(tmp_path: Path) -> None:
    """Small gradients included, where eps counts."""
    from onnxruntime.training.api import CheckpointState, Module
    from onnxruntime.training.api import Optimizer as Updates

    folder = exported(tmp_path, optimizer="adamw", weight_decay=0.1) / "blocks/00/ort_training"
    state = CheckpointState.load_checkpoint(str(folder / "checkpoint"))
    model = Module(str(folder / "training_model.onnx"), state, str(folder / "eval_model.onnx"))
    update = Updates(str(folder / "optimizer_model.onnx"), model)
    # The first layer's: its gradient is as small as the samples.
    name = next(n for n, p in state.parameters if n.endswith(".weight") and p.data.shape[-1] == 16)
    weight = torch.nn.Parameter(torch.from_numpy(np.array(state.parameters[name].data)).double())
    eager = torch.optim.AdamW([weight], lr=1e-2, weight_decay=0.1)
    update.set_learning_rate(1e-2)
    rng = np.random.default_rng(0)
    model.train()
    for _ in range(3):
        x, y = (1e-6 * rng.normal(size=(4, 16))).astype(np.float32), rng.integers(0, 10, 4)
        model(x, y)
        weight.grad = torch.from_numpy(np.array(state.parameters[name].grad)).double()
        assert 0 < weight.grad.abs().max() < 1e-5
        update.step()
        model.lazy_reset_grad()
        eager.step()
        np.testing.assert_allclose(state.parameters[name].data, weight.detach().numpy(), rtol=0, atol=1e-5)


@training_build
@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_models_are_readable_by_the_last_training_build(tmp_path: Path, optimizer: str) -> None:
    bundle = exported(tmp_path, "resnet8", optimizer=optimizer, input_shape="3x16x16", label_smoothing=0.1)
    verify(open_bundle(bundle))
    folder = bundle / "blocks/00/ort_training"
    for name in ("training", "eval", "optimizer"):
        model = onnx.load(folder / f"{name}_model.onnx")
        assert model.ir_version == 8
        assert {o.domain for o in model.opset_import} <= {"", "com.microsoft"}
        assert next(o.version for o in model.opset_import if not o.domain) == 18
    kinds = [node.op_type for node in onnx.load(folder / "optimizer_model.onnx").graph.node]
    assert kinds == ["AdamWOptimizer" if optimizer == "adamw" else "SGDOptimizerV2"]
    weights = onnx.load(folder / "eval_model.onnx").graph.input[2:]
    assert {value.type.tensor_type.elem_type for value in weights} == {TensorProto.FLOAT}


@training_build
def test_a_bundle_for_the_artifacts_alone_has_no_step_graphs(tmp_path: Path) -> None:
    bundle = open_bundle(exported(tmp_path, runtime="ort-training"))
    assert bundle.manifest.runtimes == ("ort-training",)
    verify(bundle)
    assert {Path(name).name for name in bundle.manifest.files}.isdisjoint({"step.onnx", "gradient.onnx"})


@training_build
def test_the_example_of_the_documentation_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = re.search(r"```python\n(.*?)```", DOC.read_text(), re.DOTALL)
    assert code is not None
    assert len(code[1].splitlines()) <= 30
    bundle = exported(tmp_path, "resnet8", optimizer="adamw", input_shape="3x32x32", rule="auglocal", blocks="2")
    bundle.rename(tmp_path / "bundle")
    rng = np.random.default_rng(0)
    y = np.arange(96) % 10
    x = rng.normal(size=(96, 3, 32, 32)) + y.reshape(-1, 1, 1, 1) / 3
    np.savez(tmp_path / "data.npz", x=x.astype(np.float32), y=y)
    monkeypatch.chdir(tmp_path)
    found: dict[str, Any] = {}
    exec(compile(code[1], str(DOC), "exec"), found)
    losses = found["losses"]
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])


@training_build
def test_evaluation_is_inference_and_running_statistics_are_pytorchs(tmp_path: Path) -> None:
    from onnxruntime.training.api import CheckpointState, Module

    from edgelocal.exporters.optimizers import sgd
    from edgelocal.exporters.oracle import Oracle
    from edgelocal.exporters.rules import build_blocks
    from edgelocal.exporters.units import load_network

    folder = exported(tmp_path, "resnet8", input_shape="3x16x16", optimizer="adamw") / "blocks/00/ort_training"
    state = CheckpointState.load_checkpoint(str(folder / "checkpoint"))
    module = Module(str(folder / "training_model.onnx"), state, str(folder / "eval_model.onnx"))
    manifest = open_bundle(tmp_path / "b").manifest
    network = load_network("resnet8", (3, 16, 16), 10, manifest.seed)
    block = build_blocks(network, manifest.rule, (range(len(network.units)),), manifest.seed)[0]
    oracle = Oracle([block], manifest.task, sgd().reference, torch.float32)
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(8, 3, 16, 16)).astype(np.float32), np.arange(8) % 10
    module.train()
    module(x, y)
    trained = oracle.blocks[0].train()
    trained(torch.from_numpy(x))
    names = trained.tensor_names()
    for key, buffer in trained.named_buffers():
        value = np.asarray(state.parameters[f"buf/{names[key]}"].data).reshape(buffer.shape)
        np.testing.assert_allclose(value, buffer.numpy(), rtol=1e-5, atol=1e-6, err_msg=key)
    module.eval()
    loss, h, _ = module(x, y)
    with torch.no_grad():
        logits = trained.eval()(torch.from_numpy(x))[1]
    np.testing.assert_allclose(h, logits.numpy(), rtol=1e-4, atol=1e-5)
    expected = torch.nn.functional.cross_entropy(logits, torch.from_numpy(y)).item()
    assert float(loss) == pytest.approx(expected, rel=1e-5)
