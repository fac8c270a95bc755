"""Networks as units: names and sizes against published ones, composition, and every way a user's network can fail."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from edgelocal.errors import ExportError
from edgelocal.exporters import zoo
from edgelocal.exporters.units import Network, check_composition, load_network
from edgelocal.exporters.zoo import custom
from edgelocal.exporters.zoo.vit import patch_size

LARGE = {"mobilenetv2", "resnet18", "resnet34", "resnet50", "resnet101"}
VGG_CLASSIFIER = 25088 * 4096 + 4096 + 4096 * 4096 + 4096 + 4096 * 1000 + 1000
PUBLISHED = {  # parameters of torchvision's models with 1000 classes
    "resnet18": 11_689_512,
    "resnet34": 21_797_672,
    "resnet50": 25_557_032,
    "resnet101": 44_549_160,
    "mobilenetv2": 3_504_872,
}
PUBLISHED_VGG = {"vgg11": 132_868_840, "vgg13": 133_053_736, "vgg16": 138_365_992, "vgg19": 143_678_248}
WIDTHS = {
    "resnet32": [16] * 6 + [32] * 5 + [64] * 5,
    "resnet110": [16] * 19 + [32] * 18 + [64] * 18,
    "resnet34": [64] * 4 + [128] * 4 + [256] * 6 + [512] * 3,
    "resnet50": [64] * 4 + [128] * 4 + [256] * 6 + [512] * 3,
    "resnet101": [64] * 4 + [128] * 4 + [256] * 23 + [512] * 3,
    "vgg13": [64] * 2 + [128] * 2 + [256] * 2 + [512] * 4,
    "vgg19": [64] * 2 + [128] * 2 + [256] * 4 + [512] * 8,
    "mobilenetv2": [32, 16] + [24] * 2 + [32] * 3 + [64] * 4 + [96] * 3 + [160] * 3 + [320, 1280],
}


def on_meta(name: str, shape: tuple[int, ...] = (3, 224, 224), classes: int = 1000) -> Network:
    with torch.device("meta"):
        return zoo.build(name, shape, classes)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name", zoo.names())
def test_units_in_sequence_are_the_network(name: str) -> None:
    network = load_network(name, (3, 64, 64) if name in LARGE else (3, 32, 32), 5, seed=3)
    check_composition(network)
    assert network.module.training
    assert len({unit.name for unit in network.units}) == len(network.units)


@pytest.mark.parametrize("name", WIDTHS)
def test_unit_widths(name: str) -> None:
    assert [unit.width for unit in on_meta(name).units] == WIDTHS[name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_as_many_as_published(name: str) -> None:
    assert count(on_meta(name).module) == PUBLISHED[name]


@pytest.mark.parametrize("name", PUBLISHED_VGG)
def test_vgg_features_are_as_many_as_published(name: str) -> None:
    assert count(on_meta(name).module.get_submodule("features")) == PUBLISHED_VGG[name] - VGG_CLASSIFIER


@pytest.mark.parametrize(("name", "millions"), [("resnet32", 0.467), ("resnet110", 1.731)])
def test_cifar_parameters(name: str, millions: float) -> None:
    assert count(on_meta(name, (3, 32, 32), 10).module) / 1e6 == pytest.approx(millions, abs=5e-4)


@pytest.mark.parametrize(
    ("name", "key", "shape"),
    [
        ("resnet50", "conv1.weight", (64, 3, 7, 7)),
        ("resnet50", "layer1.0.downsample.0.weight", (256, 64, 1, 1)),
        ("resnet50", "layer4.2.bn3.running_var", (2048,)),
        ("resnet18", "layer2.0.downsample.1.weight", (128,)),
        ("resnet18", "fc.weight", (1000, 512)),
        ("vgg11", "features.25.weight", (512, 512, 3, 3)),
        ("vgg16", "features.41.running_mean", (512,)),
        ("mobilenetv2", "features.1.conv.1.weight", (16, 32, 1, 1)),
        ("mobilenetv2", "features.2.conv.1.0.weight", (96, 1, 3, 3)),
        ("mobilenetv2", "features.17.conv.3.weight", (320,)),
        ("mobilenetv2", "classifier.1.weight", (1000, 1280)),
        ("resnet32", "layer3.0.downsample.0.weight", (64, 32, 1, 1)),
    ],
)
def test_names_are_those_of_torchvision(name: str, key: str, shape: tuple[int, ...]) -> None:
    assert tuple(on_meta(name).module.state_dict()[key].shape) == shape


def test_convolutions_start_from_the_fan_out_normal() -> None:
    weight = load_network("resnet32", (3, 32, 32), 10, seed=0).module.get_parameter("layer3.1.conv1.weight")
    assert float(weight.detach().std()) == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)


def test_the_seed_decides_the_weights_and_nothing_else() -> None:
    torch.manual_seed(1)
    before = torch.random.get_rng_state()
    first, second, other = (load_network("mlp", (6,), 3, seed).module.state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize(
    ("side", "patch"), [((32, 32), 4), ((64, 64), 8), ((28, 28), 4), ((224, 224), 28), ((32, 64), 4)]
)
def test_patches_divide_the_image_into_about_64(side: tuple[int, int], patch: int) -> None:
    assert patch_size(*side) == patch


@pytest.mark.parametrize("name", ["resnet20", "resnet18", "resnet50", "mobilenetv2", "vit", "vgg11"])
@pytest.mark.parametrize("size", [(1, 1), (5, 9), (28, 28), (37, 41)])
def test_networks_take_images_of_any_size_that_leaves_something(name: str, size: tuple[int, int]) -> None:
    if name == "vgg11" and min(size) < 32:  # five poolings without padding
        with pytest.raises(ExportError, match="at least 32x32"):
            load_network(name, (1, *size), 3, seed=0)
        return
    network = load_network(name, (1, *size), 3, seed=0)
    check_composition(network)
    assert network.module.eval()(torch.randn(2, 1, *size)).shape == (2, 3)


def test_an_image_that_patches_do_not_cover_evenly_is_continued_with_zeros() -> None:
    network = load_network("vit", (1, 37, 41), 3, seed=0)
    patch = patch_size(37, 41)
    bordered = torch.zeros(2, 1, -(-37 // patch) * patch, -(-41 // patch) * patch)
    bordered[..., :37, :41] = torch.randn(2, 1, 37, 41)
    embedding = network.units[0].module
    tokens = torch.nn.functional.conv2d(bordered, embedding.proj.weight, embedding.proj.bias, patch)  # type: ignore[arg-type, union-attr]
    found = embedding(bordered[..., :37, :41]) - embedding.position
    torch.testing.assert_close(found[:, 1:], tokens.flatten(2).transpose(1, 2))


@pytest.mark.parametrize(
    ("reference", "shape", "message"),
    [
        ("resnet33", (3, 32, 32), "did you mean resnet"),
        ("resnet33", (3, 32, 32), "vgg13"),
        ("vgg13", (3, 16, 16), "at least 32x32"),
        ("resnet18", (3072,), "takes images"),
        ("mlp", (), "expected positive numbers"),
        ("file.py", (3, 4, 4), "names no callable"),
        ("no_such_module_here:net", (3,), "cannot import no_such_module_here: ModuleNotFoundError"),
        ("math:nothing", (3,), "has nothing under the name 'nothing'"),
        ("math:pi", (3,), "has a float"),
        ("missing.py:net", (3,), "cannot import missing.py: there is no such file, seen from /"),
        ("", (3,), "no network is called ''; the zoo has"),
        ("mlp", (1 << 60,), "mlp: building it for input .* failed with"),
    ],
)
def test_a_bad_reference_is_refused(reference: str, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        load_network(reference, shape, 10, seed=0)


def user_network(folder: Path, body: str, classes: int = 3, shape: tuple[int, ...] = (1, 8, 8)) -> Network:
    path = folder / "net.py"
    path.write_text("import torch\nfrom torch import nn\n" + body)
    return load_network(f"{path}:make", shape, classes, seed=0)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def make(): raise ValueError('boom')", "ValueError: boom"),
        ("def make(): return 3", "returned a int, expected a torch.nn.Module"),
        ("def make(: pass", "SyntaxError"),
        ("def make(classes): return nn.Sequential(nn.Flatten(), nn.Linear(64, 7))", r"\(N, 1, 8, 8\) gives .*\(N, 7\)"),
        ("def make(): return nn.Linear(64, 3)", "failed with RuntimeError"),
        (
            "def make(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).double()",
            "1.weight is torch.float64, exp",
        ),
        ("def make(): return nn.Sequential(nn.Flatten(), nn.Linear(64, 3)).half()", "1.weight is torch.float16, exp"),
        ("def make(): return nn.LSTM(8, 3)", "failed with|returned tuple"),
        (
            "def make():\n a = nn.Linear(4, 4)\n return nn.Sequential(nn.Flatten(), nn.Linear(64, 4), a, nn.ReLU(), a,"
            " nn.Linear(4, 3))",
            "parameter 2.weight is shared by 2 and 4",
        ),
        (
            "class make(nn.Sequential):\n def __init__(self): super().__init__(nn.Flatten(), nn.Linear(64, 3))\n"
            " def edgelocal_units(self): return [('a', self[0])]",
            "returned 1 entries",
        ),
        (
            "class make(nn.Sequential):\n def __init__(self): super().__init__(nn.Flatten(), nn.Linear(64, 3))\n"
            " def edgelocal_units(self): return [('a', self[0]), ('b', nn.Linear(64, 3))]",
            "weight of head is no parameter",
        ),
        (
            "class make(nn.Sequential):\n"
            " def __init__(self): super().__init__(nn.Flatten(), nn.Linear(64, 64), nn.Linear(64, 3))\n"
            " def edgelocal_units(self): return [('a', self[0]), ('b', self[2])]",
            r"parameters \['1.weight', '1.bias'\] are in no unit",
        ),
    ],
)
def test_a_bad_network_is_refused(tmp_path: Path, body: str, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        user_network(tmp_path, body)


def test_a_sequential_is_cut_before_every_child_with_parameters(tmp_path: Path) -> None:
    network = user_network(
        tmp_path,
        "def make(classes, input_shape):\n"
        " return nn.Sequential(nn.Identity(), nn.Conv2d(input_shape[0], 4, 3), nn.BatchNorm2d(4), nn.ReLU(),"
        " nn.Conv2d(4, 8, 3, 2), nn.ReLU(), nn.Flatten(), nn.Linear(32, 5), nn.Linear(5, classes), nn.Identity())",
    )
    check_composition(network)
    assert [(u.name, u.width) for u in network.units] == [("1", 4), ("4", 32), ("7", 5)]
    assert len(list(network.head.children())) == 2


def test_a_child_that_occurs_twice_is_kept() -> None:
    relu = nn.ReLU()
    layers = [nn.Linear(4, 4), relu, nn.Linear(4, 4), relu, nn.Linear(4, 2)]
    network = custom.from_module(nn.Sequential(*layers), "twice", (4,), 2)
    check_composition(network)
    assert [len(list(unit.module.children())) for unit in network.units] == [2, 2]


def test_declared_units_are_taken(tmp_path: Path) -> None:
    network = user_network(
        tmp_path,
        "class make(nn.Module):\n"
        " def __init__(self, classes): super().__init__(); self.a = nn.Linear(64, 6); self.b = nn.Linear(6, classes)\n"
        " def forward(self, x): return self.b(self.a(x.flatten(1)))\n"
        " def edgelocal_units(self): return [('first', nn.Sequential(nn.Flatten(), self.a)), ('head', self.b)]\n",
    )
    check_composition(network)
    assert [(u.name, u.width) for u in network.units] == [("first", 6)]


def test_any_other_module_is_one_unit(tmp_path: Path) -> None:
    network = user_network(
        tmp_path,
        "class make(nn.Module):\n"
        " def __init__(self, **kw): super().__init__(); self.a = nn.Linear(64, kw['classes'])\n"
        " def forward(self, x): return self.a(x.flatten(1))\n",
    )
    check_composition(network)
    assert len(network.units) == 1


class Forgetful(nn.Module):
    """Declares its units, but leaves the ReLU between them out."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).relu())

    def edgelocal_units(self) -> list[tuple[str, nn.Module]]:
        return [("a", self.a), ("b", self.b)]


def test_a_forgotten_step_is_found() -> None:
    with pytest.raises(ExportError, match="differ from the module by"):
        check_composition(custom.from_module(Forgetful(), "forgetful", (6,), 2))


class Failing(nn.Module):
    """Runs on PyTorch's fake tensors; on real ones `last` of its output fails or is of another type."""

    def __init__(self, last: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.a = nn.Linear(6, 2)
        self.last = last

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.a(x))


def refuse_real(x: Tensor) -> Tensor:
    if not isinstance(x, FakeTensor):
        raise RuntimeError("no memory")
    return x


@pytest.mark.parametrize(
    ("last", "message"),
    [
        (refuse_real, r"a run on input \(2, 6\) failed with RuntimeError: no memory"),
        (Tensor.double, "puts out torch.float64, expected torch.float32"),
        (Tensor.long, "puts out torch.int64, expected torch.float32"),
    ],
)
def test_a_network_that_does_not_run_is_refused(last: Callable[[Tensor], Tensor], message: str) -> None:
    network = custom.from_module(Failing(last), "failing", (6,), 2)
    with pytest.raises(ExportError, match=message):
        check_composition(network)


def test_a_probe_that_fails_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("torch._subclasses.fake_tensor")
    log.addHandler(caplog.handler)  # PyTorch's loggers do not propagate
    try:
        with pytest.raises(ExportError, match="failed with RuntimeError"):
            custom.from_module(nn.Linear(5, 2), "unfit", (6,), 2)
    finally:
        log.removeHandler(caplog.handler)
    assert caplog.records == []
    assert not log.disabled


def test_a_module_in_the_current_folder_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "neighbour_of_zoo.py").write_text("SIZE = 6")
    source = "from torch import nn\nfrom neighbour_of_zoo import SIZE\ndef make(): return nn.Linear(SIZE, 2)"
    (tmp_path / "net_of_zoo.py").write_text(source)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p not in ("", ".")])
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    before = list(sys.path)
    assert load_network("net_of_zoo:make", (6,), 2, seed=0).name == "net_of_zoo:make"
    assert sys.path == before


def test_fresh_units_match_the_rank() -> None:
    encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    net = nn.Sequential(nn.Linear(5, 8), encoder, nn.Sequential(nn.Flatten(), nn.Linear(32, 2)))
    network = custom.from_module(net, "tokens", (4, 5), 2)
    fresh = network.units[1].fresh(8, 8, 1)
    assert fresh(torch.zeros(2, 4, 8)).shape == (2, 4, 8)
    assert not torch.equal(fresh.get_parameter("linear1.weight"), encoder.linear1.weight)
    with pytest.raises(ExportError, match="changes the shape of its tokens"):
        network.units[0].fresh(8, 8, 1)
    maps = custom.from_module(nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 2)), "maps", (1, 8, 8), 2)
    assert maps.units[0].width == 144
