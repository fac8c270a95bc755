"""Export, train, finish: bundles are whole or not there, and trained weights return to PyTorch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file

from device_tests.device.runs import RESIDUAL as DATA_OF
from device_tests.device.runs import answer, write_data
from device_tests.export.test_request import request
from edgelocal.bundle.folder import open_bundle, verify
from edgelocal.errors import EdgelocalError
from edgelocal.exporters.pack import export_bundle
from edgelocal.exporters.rules import build_blocks
from edgelocal.exporters.units import load_network

SMALL = {"input_shape": "1x8x8", "classes": 4, "blocks": "2", "aux_depth": 1, "pad": 1}
NETS = """
import torch
from torch import nn

def sequential(classes, input_shape):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, classes))

def fixed():
    return sequential(7, None)

def failing():
    raise RuntimeError("no luck today")

def no_module():
    return 42

def longwinded(classes):
    net = nn.Sequential(nn.Flatten())
    net.add_module("n" * 300, nn.Linear(64, classes))
    return net

class garbled(nn.Sequential):
    def __init__(self, classes):
        super().__init__(nn.Flatten(), nn.Linear(64, 8), nn.Linear(8, 8), nn.Linear(8, classes))
    def edgelocal_units(self):
        return [("first", nn.Sequential(self[0], self[1])), (chr(0xDCFF), self[2]), ("head", self[3])]

class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(64, 4)
    def forward(self, x):
        z = self.fc(x.flatten(1))
        return z if z.sum() > 0 else -z

def branching(classes):
    return Branching()
"""


def export(out: Path, network: str = "resnet8", **changes: Any) -> dict[str, Any]:
    built = request(**(SMALL | changes))
    values = {name: getattr(built, name) for name in built.__dataclass_fields__} | {"network": network}
    return export_bundle(type(built)(**values), out, lambda text: None)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("export") / "bundle"
    export(out)
    return out


def test_a_bundle_is_whole_and_describes_itself(bundle: Path) -> None:
    opened = open_bundle(bundle)
    assert set(verify(opened)) == set(opened.manifest.files)
    assert opened.manifest.versions["torch"] == torch.__version__
    assert [b.units for b in opened.manifest.blocks] == [("stem",), ("layer1.0", "layer2.0", "layer3.0")]


def test_exporting_twice_gives_the_same_bytes(bundle: Path, tmp_path: Path) -> None:
    export(tmp_path / "again")
    assert open_bundle(tmp_path / "again").digest == open_bundle(bundle).digest


def test_every_graph_is_standard_onnx_with_the_signature_of_the_manifest(bundle: Path) -> None:
    opened = open_bundle(bundle)
    graphs = [opened.manifest.predict]
    for block in opened.manifest.blocks:
        graphs += [g for g in (block.step, block.forward, block.head) if g is not None]
    for graph in graphs:
        model = onnx.load_from_string(opened.read(graph.file))
        onnx.checker.check_model(model, full_check=True)
        assert {o.domain for o in model.opset_import} == {""}
        assert model.opset_import[0].version <= 18
        assert model.ir_version <= 9
        assert [i.name for i in model.graph.input] == [t.name for t in graph.inputs]
        assert [o.name for o in model.graph.output] == [t.name for t in graph.outputs]
        assert max((len(t.raw_data) for t in model.graph.initializer), default=0) < 4096
        assert not any(t.external_data for t in model.graph.initializer)


def test_trained_weights_return_to_the_original_module(bundle: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path / "d.npz", DATA_OF)
    answer("train", bundle, "--data", data, "--out", tmp_path / "run", "--epochs", 3, "--batch", 16, "--lr", 0.02)
    answer("finish", tmp_path / "run", "--out", tmp_path / "model")
    network = load_network("resnet8", (1, 8, 8), 4, 1)
    network.module.load_state_dict(load_file(tmp_path / "model" / "weights.safetensors"), strict=True)
    x = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = network.module.eval()(x).numpy()
    session = onnxruntime.InferenceSession(str(tmp_path / "model" / "model.onnx"))
    np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], expected, rtol=1e-4, atol=1e-5)


def test_an_early_exit_is_the_eager_block_and_its_auxiliary(bundle: Path, tmp_path: Path) -> None:
    data = write_data(tmp_path / "d.npz", DATA_OF)
    answer("train", bundle, "--data", data, "--out", tmp_path / "run", "--epochs", 3, "--batch", 16, "--lr", 0.02)
    answer("finish", tmp_path / "run", "--out", tmp_path / "model", "--exit-block", 0)
    manifest = open_bundle(bundle).manifest
    network = load_network("resnet8", (1, 8, 8), 4, 1)
    block = build_blocks(network, manifest.rule, (range(1), range(1, 4)), 1)[0].eval()
    weights = load_file(tmp_path / "model" / "weights.safetensors")
    block.load_state_dict({key: weights[name] for key, name in block.tensor_names().items()}, strict=True)
    x = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = block(x)[1].numpy()
    session = onnxruntime.InferenceSession(str(tmp_path / "model" / "model.onnx"))
    np.testing.assert_allclose(session.run(None, {"x": x.numpy()})[0], expected, rtol=1e-4, atol=1e-5)


def test_weights_are_where_training_starts(tmp_path: Path) -> None:
    source = load_network("resnet8", (1, 8, 8), 4, 9).module
    torch.save(source.state_dict(), tmp_path / "w.pt")
    export(tmp_path / "b", weights=tmp_path / "w.pt")
    opened = open_bundle(tmp_path / "b")
    found = opened.weights(opened.manifest.blocks[0])["param/conv1.weight"]
    np.testing.assert_array_equal(found, source.state_dict()["conv1.weight"].numpy())


BAD: dict[str, tuple[dict[str, Any], int, str]] = {
    "unknown network": ({"network": "resnet31"}, 2, "did you mean"),
    "unknown rule": ({"rule": "hebb"}, 2, "hebb"),
    "more blocks than units": ({"blocks": "9"}, 2, "9 blocks were asked for"),
    "callable that fails": ({"network": "nets.py:failing"}, 2, "no luck today"),
    "callable that returns no module": ({"network": "nets.py:no_module"}, 2, "returned a int"),
    "callable that is not there": ({"network": "nets.py:nothing"}, 2, "nothing"),
    "file that is not there": ({"network": "other.py:net"}, 2, "cannot import other.py: there is no such file"),
    "network of no text": ({"network": "\udcff.py:net"}, 2, "is no UTF-8 text"),
    "learning rate that is no number": ({"lr": float("nan")}, 2, "learning rate is nan"),
    "name that is too long": ({"network": "nets.py:longwinded", "rule": "bp"}, 2, "name has 311 characters"),
    "unit of no text": ({"network": "nets.py:garbled", "rule": "linear", "tail": "all"}, 2, "no device would accept"),
    "code that branches on values": ({"network": "nets.py:branching", "rule": "bp"}, 2, "Branching"),
    "outputs that are not the classes": ({"network": "nets.py:fixed"}, 2, "--classes"),
    "class names that disagree": ({"class_names": "a,b"}, 2, "2 class names for 4 classes"),
    "no weights there": ({"weights": Path("none.pt")}, 2, "no file .*none.pt"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_requests_say_why_and_leave_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    changes, code, message = BAD[name]
    (tmp_path / "nets.py").write_text(NETS)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(EdgelocalError, match=message) as caught:
        export(tmp_path / "out" / "b", **changes)
    assert caught.value.exit_code == code
    assert not (tmp_path / "out").exists() or list((tmp_path / "out").rglob("*")) == []


def test_an_output_folder_that_exists_is_kept(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "letter.txt").write_text("dear")
    with pytest.raises(EdgelocalError, match="exists"):
        export(tmp_path / "b")
    assert [p.name for p in tmp_path.rglob("*")] == ["b", "letter.txt"]


def test_a_sequential_of_ones_own_by_the_real_command(tmp_path: Path) -> None:
    (tmp_path / "nets.py").write_text(NETS)
    options = ("--input", "1x8x8", "--classes", 4, "--blocks", 2, "--rule", "linear", "--optimizer", "adamw")
    info = answer("export", f"{tmp_path}/nets.py:sequential", tmp_path / "b", *options)
    assert len(info["blocks"]) == 2
    data = write_data(tmp_path / "d.npz", DATA_OF)
    steps = ("--epochs", 30, "--lr", 0.01, "--batch", 16, "--no-augment")
    report = answer("train", tmp_path / "b", "--data", data, "--out", tmp_path / "run", *steps)
    assert report["blocks"][-1]["training"]["accuracy"] > 0.9
    assert json.loads((tmp_path / "run" / "report.json").read_text()) == report
