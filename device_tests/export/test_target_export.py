"""Bundles for one target and for both: what is in them, that both are the same training, and refusals."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from device_tests.export.helpers import Arrays, relative_errors
from edgelocal.bundle.folder import Bundle, open_bundle, verify
from edgelocal.bundle.spec import Manifest
from edgelocal.bundle.targets import Device, for_device
from edgelocal.commands.export_options import ExportOptions
from edgelocal.commands.inspect import bundle_table, describe_bundle
from edgelocal.errors import BundleError, ExportError
from edgelocal.exporters.pack import export_bundle
from edgelocal.exporters.request import make_request
from edgelocal.runtime.tensor import Tensor as Value
from edgelocal.training.blocks import load_blocks

BATCH = 8


FOLDERS: list[Path] = []


@pytest.fixture(autouse=True, scope="module")
def _folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    FOLDERS.append(tmp_path_factory.mktemp("targets"))
    yield
    FOLDERS.clear()


@functools.cache
def exported(target: str, network: str = "resnet8", precision: str = "float32") -> Bundle:
    shape = "3x16x16" if network == "resnet8" else "12"
    options = ExportOptions(
        blocks="2", target=target, precision=precision, input_shape=shape, batch=BATCH, pad=0, flip=False
    )
    folder = FOLDERS[0] / f"{network} {target} {precision}"
    export_bundle(make_request(network, options), folder, lambda text: None)
    return open_bundle(folder)


def test_a_bundle_for_both_has_the_files_of_either() -> None:
    cpu, cuda, both = (exported(target) for target in ("cpu", "cuda", "both"))
    assert [b.manifest.target for b in (cpu, cuda, both)] == ["cpu", "cuda", "both"]
    assert verify(cpu) == verify(cuda)
    second = sorted(set(verify(both)) - set(verify(cpu)))
    assert second == [f"blocks/0{i}/cuda/{kind}.onnx" for i in (0, 1) for kind in ("gradient", "step")]
    for name, entry in cpu.manifest.files.items():
        assert both.manifest.files[name] == entry
    for name in second:
        assert both.manifest.files[name] == cuda.manifest.files[name.replace("cuda/", "")]
        assert both.manifest.files[name] != cpu.manifest.files[name.replace("cuda/", "")]


def bare(manifest: Manifest) -> Manifest:
    """Without what says where files lie."""
    blocks = []
    for block in manifest.blocks:
        assert block.accumulation is not None
        gradient = replace(block.accumulation.gradient, file="gradient")
        accumulation = replace(block.accumulation, gradient=gradient)
        blocks.append(replace(block, step=replace(block.step, file="step"), accumulation=accumulation))
    return replace(manifest, blocks=tuple(blocks), files={}, frontier=None)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_device_sees_in_it_what_a_bundle_for_it_alone_says(device: Device) -> None:
    assert bare(for_device(exported("both").manifest, device)) == bare(exported(device).manifest)


def trained(device: Device, micro_batch: int | None) -> Arrays:
    """The state after two steps with the graphs for this device, on the CPU."""
    bundle = exported("both")
    blocks = load_blocks(replace(bundle, manifest=for_device(bundle.manifest, device)), 1, None, artifacts=False)
    rng = np.random.default_rng(0)
    found: Arrays = {}
    for number in range(2):
        h, y = Value.of(rng.standard_normal((BATCH, 3, 16, 16), np.float32)), Value.of(rng.integers(0, 10, BATCH))
        for block in blocks:
            result = block.step(h, y, {"lr": 0.1, **bundle.manifest.optimizer.hyper}, 0, number, micro_batch)
            h = result.h
            found[f"{block.index} {number}"] = np.array(result.loss)
    return found | {f"{b.index} {name}": np.array(a) for b in blocks for name, a in b.state().items()}


@pytest.mark.parametrize("micro_batch", [None, 4])
def test_both_sets_of_graphs_are_the_same_training(micro_batch: int | None) -> None:
    cpu, cuda = trained("cpu", micro_batch), trained("cuda", micro_batch)
    errors = relative_errors(cuda, cpu)
    assert max(errors.values()) < 1e-4
    assert any(cpu[name].tobytes() != cuda[name].tobytes() for name in cpu), "other graphs sum in another order"


def test_every_byte_of_the_second_set_is_checked(tmp_path: Path) -> None:
    bundle = exported("both")
    name = bundle.manifest.blocks[0].cuda.step.file if bundle.manifest.blocks[0].cuda else ""
    path = bundle.folder / name
    data = path.read_bytes()
    try:
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        with pytest.raises(BundleError, match=r"cuda/step.onnx is damaged"):
            verify(bundle)
    finally:
        path.write_bytes(data)


def test_graphs_that_suit_both_are_written_once() -> None:
    bundle = exported("both", "mlp")
    assert [block.cuda for block in bundle.manifest.blocks] == [None, None]
    assert for_device(bundle.manifest, "cuda").blocks == bundle.manifest.blocks


def test_inspect_says_what_it_was_exported_for() -> None:
    shown = [describe_bundle(exported(*given).manifest) for given in (("both",), ("cuda", "mlp", "bfloat16"))]
    assert [(s["target"], s["precision"]) for s in shown] == [("both", "float32"), ("cuda", "bfloat16")]
    captions = [str(bundle_table(s).caption) for s in shown]
    assert "graphs for the CPU and for CUDA" in captions[0]
    assert "graphs for CUDA, matrix products in bfloat16" in captions[1]


def test_bfloat16_is_in_the_training_graphs_alone() -> None:
    plain, rounded = exported("cuda", "mlp"), exported("cuda", "mlp", "bfloat16")
    differing = [n for n, entry in rounded.manifest.files.items() if plain.manifest.files.get(n) != entry]
    assert sorted(differing) == [f"blocks/0{i}/{kind}.onnx" for i in (0, 1) for kind in ("gradient", "step")]
    verify(rounded)
    with pytest.raises(BundleError, match="bfloat16"):
        for_device(rounded.manifest, "cpu")


class Ranks(nn.Module):
    """Uses the place of the largest whole number."""

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        return x * (1 + (8 * x).long().argmax(1, keepdim=True))


def ranks() -> nn.Module:
    """A network with an operator that CUDA has no kernel for."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8), Ranks(), nn.Linear(8, 10))


@pytest.mark.parametrize("target", ["cuda", "both"])
def test_what_would_run_on_the_cpu_is_no_bundle(target: str, tmp_path: Path) -> None:
    options = ExportOptions(blocks="1", rule="bp", target=target, input_shape="12", batch=BATCH)
    with pytest.raises(
        ExportError, match=r"\(Ranks\) uses aten.argmax.default: in (step|forward).onnx the ONNX operator ArgMax"
    ):
        export_bundle(make_request(f"{__name__}:ranks", options), tmp_path / "b", lambda text: None)
    assert list(tmp_path.iterdir()) == []
    plain = replace(options, target="cpu")
    export_bundle(make_request(f"{__name__}:ranks", plain), tmp_path / "b", lambda text: None)
    verify(open_bundle(tmp_path / "b"))
