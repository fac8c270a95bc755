"""Pretrained weights: what fits is taken, every name that does not is said."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from edgelocal.errors import ExportError
from edgelocal.exporters.units import load_network
from edgelocal.exporters.weights import load_weights


def network(classes: int = 4, seed: int = 0) -> nn.Module:
    return load_network("resnet8", (1, 8, 8), classes, seed).module


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "nested.pt"])
def test_all_weights_arrive(tmp_path: Path, name: str) -> None:
    source, target = network(seed=1), network(seed=2)
    assert not same(source, target)
    state = source.state_dict()
    if name == "w.safetensors":
        save_file(state, tmp_path / name)
    else:
        torch.save({"state_dict": state, "epoch": 3} if name == "nested.pt" else state, tmp_path / name)
    assert load_weights(tmp_path / name, target, partial=False).lines() == []
    assert same(source, target)


def test_every_name_that_does_not_fit_is_listed(tmp_path: Path) -> None:
    state = network(classes=7, seed=1).state_dict()
    del state["layer1.0.conv2.weight"], state["bn1.bias"]
    state["extra.one"], state["extra.two"] = torch.zeros(1), torch.zeros(2)
    torch.save(state, tmp_path / "w.pt")
    with pytest.raises(ExportError) as caught:
        load_weights(tmp_path / "w.pt", network(), partial=False)
    message = str(caught.value)
    for line in (
        "missing in the file: layer1.0.conv2.weight",
        "missing in the file: bn1.bias",
        "unexpected in the file: extra.one",
        "unexpected in the file: extra.two",
        "other shape: fc.weight is [7, 64] in the file, [4, 64] in the network",
        "other shape: fc.bias is [7] in the file, [4] in the network",
        "--partial-weights",
    ):
        assert line in message


def test_partial_weights_take_what_fits_and_leave_the_rest(tmp_path: Path) -> None:
    source, target = network(classes=7, seed=1), network(seed=2)
    torch.save(source.state_dict(), tmp_path / "w.pt")
    head = target.state_dict()["fc.weight"].clone()
    mismatch = load_weights(tmp_path / "w.pt", target, partial=True)
    assert [name for name, _, _ in mismatch.shapes] == ["fc.weight", "fc.bias"]
    assert torch.equal(target.state_dict()["conv1.weight"], source.state_dict()["conv1.weight"])
    assert torch.equal(target.state_dict()["fc.weight"], head)


def test_batch_counters_of_old_files_are_not_missed(tmp_path: Path) -> None:
    state = {k: v for k, v in network(seed=1).state_dict().items() if not k.endswith("num_batches_tracked")}
    save_file(state, tmp_path / "w.safetensors")
    assert load_weights(tmp_path / "w.safetensors", network(), partial=False).lines() == []


class Hostile:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> object:
        return Path.touch, (self.path,)


def test_nothing_in_a_file_is_executed(tmp_path: Path) -> None:
    (tmp_path / "w.pt").write_bytes(pickle.dumps(Hostile(tmp_path / "executed")))
    with pytest.raises(ExportError, match="cannot be read as weights"):
        load_weights(tmp_path / "w.pt", network(), partial=True)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("name", "data"), [("w.safetensors", b"\xff" * 30), ("w.pt", b"PK\x03\x04nothing"), ("w.pt", b"")]
)
def test_damaged_files_are_refused(tmp_path: Path, name: str, data: bytes) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ExportError, match="cannot be read as weights"):
        load_weights(tmp_path / name, network(), partial=False)


def test_files_without_tensors_or_common_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="there is no file"):
        load_weights(tmp_path / "none.pt", network(), partial=False)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(ExportError, match="no mapping of names to tensors"):
        load_weights(tmp_path / "list.pt", network(), partial=False)
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(ExportError, match="shares no tensor"):
        load_weights(tmp_path / "other.pt", network(), partial=True)
