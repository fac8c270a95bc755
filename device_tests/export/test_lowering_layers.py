"""Layers as ONNX, output and every gradient against PyTorch's autograd in float64: norms, pooling, activations."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from device_tests.export.helpers import Function, Probe, check, lowered, session


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def frozen(module: nn.Module) -> nn.Module:
    """In inference mode within a network that trains, with statistics that are not 0 and 1."""
    for name, buffer in module.named_buffers():
        if name.startswith("running"):
            buffer.uniform_(0.5, 1.5)
    return module.eval()


NORMS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "batch norm 2d": (nn.BatchNorm2d(5), (5, 4, 3)),
    "batch norm 1d on features": (nn.BatchNorm1d(6), (6,)),
    "batch norm 1d on a line": (nn.BatchNorm1d(6), (6, 5)),
    "batch norm 3d": (nn.BatchNorm3d(3), (3, 2, 4, 3)),
    "batch norm without affine": (nn.BatchNorm2d(5, affine=False), (5, 4, 3)),
    "batch norm, other momentum and eps": (nn.BatchNorm2d(5, momentum=0.4, eps=1e-2), (5, 4, 3)),
    "batch norm without statistics": (nn.BatchNorm2d(5, track_running_stats=False), (5, 4, 3)),
    "frozen batch norm": (frozen(nn.BatchNorm2d(5)), (5, 4, 3)),
    "frozen batch norm without affine": (frozen(nn.BatchNorm2d(5, affine=False)), (5, 4, 3)),
}


@pytest.mark.parametrize(("module", "shape"), NORMS.values(), ids=list(NORMS))
def test_batch_norm_over_two_steps(module: nn.Module, shape: tuple[int, ...]) -> None:
    # A batch of one has no variance over features, and PyTorch refuses it.
    check(module, shape, batches=(7, 3))


def test_batch_norm_of_maps_takes_a_batch_of_one() -> None:
    check(nn.BatchNorm2d(5), (5, 4, 3), batches=(1, 6))


def test_batch_norm_far_from_zero() -> None:
    # The variance as E x^2 - (E x)^2 would lose all its digits here.
    check(nn.BatchNorm2d(3), (3, 5, 5), batches=(6, 4), draw=lambda s: 300 + torch.randn(s))


def test_new_running_variance_is_unbiased() -> None:
    # Independent of PyTorch: numpy's variance with ddof=1 over samples and places.
    probe = Probe(nn.BatchNorm2d(2, momentum=0.25), (2, 2, 1), (2, 2, 1), floating=True)
    graph = lowered(probe, (2, 2, 1), torch.float32)
    state = {name: tensor.detach().numpy() for name, tensor in probe.state_dict().items()}
    x = np.random.default_rng(0).standard_normal((3, 2, 2, 1), dtype=np.float32)
    outputs = session(graph.model).run(["new/body.running_var"], {"x": x, **{n: state[n] for n in graph.state}})
    seen = x * state["scale"] + state["shift"]
    expected = 0.75 * 1 + 0.25 * seen.var(axis=(0, 2, 3), ddof=1)
    np.testing.assert_allclose(outputs[0], expected, rtol=1e-6)


LAYERS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "layer norm": (nn.LayerNorm(6), (4, 6)),
    "layer norm on two axes": (nn.LayerNorm((4, 6)), (3, 4, 6)),
    "layer norm without affine": (nn.LayerNorm(6, elementwise_affine=False), (4, 6)),
    "layer norm without bias": (nn.LayerNorm(6, bias=False), (4, 6)),
    "group norm": (nn.GroupNorm(2, 6), (6, 4, 3)),
    "group norm, one group": (nn.GroupNorm(1, 6), (6, 4, 3)),
    "group norm on features": (nn.GroupNorm(2, 6), (6,)),
    "instance norm": (nn.InstanceNorm2d(4), (4, 5, 3)),
    "instance norm, affine": (nn.InstanceNorm2d(4, affine=True), (4, 5, 3)),
    "rms norm": (nn.RMSNorm(6, eps=1e-5), (4, 6)),
    "linear": (nn.Linear(5, 4), (5,)),
    "linear without bias": (nn.Linear(5, 4, bias=False), (5,)),
    "linear on tokens": (nn.Linear(5, 4), (3, 5)),
    "max pool": (nn.MaxPool2d(2), (3, 6, 8)),
    "max pool that overlaps": (nn.MaxPool2d(3, 2, 1), (3, 7, 8)),
    "max pool, ceil": (nn.MaxPool2d(3, 2, ceil_mode=True), (3, 6, 8)),
    "max pool, stride 1": (nn.MaxPool2d(3, 1, 1), (3, 6, 5)),
    "max pool, by axis": (nn.MaxPool2d((3, 2), (2, 1), (1, 0)), (3, 6, 5)),
    "max pool, dilated": (nn.MaxPool2d(2, 1, dilation=2), (3, 6, 5)),
    "max pool 1d": (nn.MaxPool1d(3, 2), (3, 9)),
    "average pool": (nn.AvgPool2d(2), (3, 6, 8)),
    "average pool that overlaps": (nn.AvgPool2d(3, 2, 1), (3, 7, 8)),
    "average pool, padding not counted": (nn.AvgPool2d(3, 2, 1, count_include_pad=False), (3, 7, 8)),
    "average pool, ceil": (nn.AvgPool2d(3, 2, ceil_mode=True), (3, 6, 8)),
    "average pool, ceil and padded": (nn.AvgPool2d(3, 2, 1, ceil_mode=True), (3, 6, 8)),
    "average pool, ceil, padded, not counted": (
        nn.AvgPool2d(3, 2, 1, ceil_mode=True, count_include_pad=False),
        (3, 6, 8),
    ),
    "average pool, own divisor": (nn.AvgPool2d(2, divisor_override=3), (3, 6, 8)),
    "average pool, rest left over": (nn.AvgPool2d((3, 2), (2, 3)), (3, 8, 9)),
    "average pool 1d": (nn.AvgPool1d(3, 2, 1), (3, 9)),
    "adaptive average to one": (nn.AdaptiveAvgPool2d(1), (3, 5, 6)),
    "adaptive average, divisible": (nn.AdaptiveAvgPool2d((3, 2)), (3, 6, 8)),
    "adaptive average, not divisible": (nn.AdaptiveAvgPool2d((3, 4)), (3, 7, 6)),
    "adaptive average, larger": (nn.AdaptiveAvgPool2d(7), (3, 3, 5)),
    "adaptive average 1d": (nn.AdaptiveAvgPool1d(3), (3, 7)),
    "adaptive maximum to one": (nn.AdaptiveMaxPool2d(1), (3, 5, 6)),
    "adaptive maximum, divisible": (nn.AdaptiveMaxPool2d((3, 2)), (3, 6, 8)),
    "adaptive maximum, not divisible": (nn.AdaptiveMaxPool2d((3, 4)), (3, 7, 6)),
    "lp pool": (Function(lambda x: functional.lp_pool2d(x.abs() + 0.1, 2.0, 2)), (3, 6, 8)),
    "nearest": (nn.Upsample(scale_factor=2), (3, 4, 3)),
    "nearest to a size": (nn.Upsample(size=(7, 5)), (3, 4, 3)),
    "bilinear upsampling": (nn.Upsample(scale_factor=2, mode="bilinear"), (3, 4, 3)),
    "bilinear, aligned": (nn.Upsample(size=(7, 5), mode="bilinear", align_corners=True), (3, 4, 3)),
    "pixel shuffle": (nn.PixelShuffle(2), (8, 3, 4)),
    "pixel unshuffle": (nn.PixelUnshuffle(2), (2, 6, 4)),
    "channel shuffle": (nn.ChannelShuffle(2), (6, 3, 4)),
    "unfold": (nn.Unfold(2, stride=2), (2, 6, 4)),
    "zero pad": (nn.ZeroPad2d((1, 2, 0, 3)), (2, 4, 5)),
    "cropping pad": (nn.ZeroPad2d((-1, 2, 1, -1)), (2, 4, 5)),
    "constant pad": (nn.ConstantPad2d((1, 2, 0, 3), 1.5), (2, 4, 5)),
    "reflection pad": (nn.ReflectionPad2d((1, 2, 0, 3)), (2, 4, 5)),
    "reflection pad 1d": (nn.ReflectionPad1d((1, 2)), (2, 5)),
    "replication pad 1d": (nn.ReplicationPad1d((1, 2)), (2, 5)),
    "replication pad": (nn.ReplicationPad2d((1, 2, 0, 3)), (2, 4, 5)),
    "residual": (nn.Sequential(nn.Conv2d(3, 3, 1), Function(lambda x: x + torch.relu(x) * 0.5)), (3, 4, 5)),
}


@pytest.mark.parametrize(("module", "shape"), LAYERS.values(), ids=list(LAYERS))
def test_layer(module: nn.Module, shape: tuple[int, ...]) -> None:
    check(module, shape)


ACTIVATIONS: dict[str, nn.Module] = {
    "relu": nn.ReLU(),
    "relu in place": nn.Sequential(nn.Linear(7, 7), nn.ReLU(inplace=True)),
    "relu6": nn.ReLU6(),
    "gelu": nn.GELU(),
    "gelu tanh": nn.GELU("tanh"),
    "silu": nn.SiLU(),
    "mish": nn.Mish(),
    "hardswish": nn.Hardswish(),
    "hardswish in place": nn.Sequential(nn.Linear(7, 7), nn.Hardswish(inplace=True)),
    "hardsigmoid": nn.Hardsigmoid(),
    "hardtanh": nn.Hardtanh(-0.5, 0.8),
    "leaky relu": nn.LeakyReLU(0.2),
    "prelu": nn.PReLU(),
    "elu": nn.ELU(1.3),
    "celu": nn.CELU(0.7),
    "selu": nn.SELU(),
    "softplus": nn.Softplus(),
    "softplus, beta": nn.Softplus(3.0),
    "softsign": nn.Softsign(),
    "sigmoid": nn.Sigmoid(),
    "log sigmoid": nn.LogSigmoid(),
    "tanh": nn.Tanh(),
    "tanhshrink": nn.Tanhshrink(),
    "hardshrink": nn.Hardshrink(),
    "softshrink": nn.Softshrink(),
    "threshold": nn.Threshold(0.1, -2.0),
    "softmax": nn.Softmax(-1),
    "softmax on the first axis": nn.Softmax(1),
    "softmin": nn.Softmin(-1),
    "log softmax": nn.LogSoftmax(-1),
    "glu": nn.Sequential(nn.Linear(7, 8), nn.GLU()),
}


@pytest.mark.parametrize("module", ACTIVATIONS.values(), ids=list(ACTIVATIONS))
def test_activation(module: nn.Module) -> None:
    check(module, (4, 7), draw=lambda shape: 3 * torch.randn(shape))


@pytest.mark.parametrize("name", ["gelu", "silu", "softplus", "log sigmoid", "elu", "softmax", "hardswish"])
def test_activation_far_out(name: str) -> None:
    """No overflow, no NaN, where exp does not fit float32."""
    check(ACTIVATIONS[name], (4, 7), draw=lambda shape: 120 * torch.randn(shape))
