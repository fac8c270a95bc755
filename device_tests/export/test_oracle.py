"""The eager reference against the method's numeric vectors, the losses against PyTorch's, and gradient isolation."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from edgelocal.bundle.spec import RuleSpec, TaskSpec
from edgelocal.errors import UsageError
from edgelocal.exporters.losses import loss, metrics
from edgelocal.exporters.oracle import Oracle
from edgelocal.exporters.partition import partition
from edgelocal.exporters.rules import LocalBlock, build_blocks
from edgelocal.exporters.units import Network, load_network

NUMERIC = json.loads((Path(__file__).parent / "vectors" / "auglocal_numeric.json").read_text())["resnet32_K16_d2"]
DEPTH1 = """2.327611 2.351172 2.414526 2.468295 2.361473 2.348178 2.160696 2.256303 2.105651 2.292637 2.256938 2.265315
2.260180 2.256429 2.306682"""


def task(kind: str = "cross_entropy", classes: int = 10, smoothing: float = 0.0) -> TaskSpec:
    return TaskSpec(kind, classes, smoothing, ())


def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, nesterov=True, weight_decay=1e-4)


def sines(shape: Sequence[int]) -> Tensor:
    return torch.sin(torch.arange(1, math.prod(shape) + 1, dtype=torch.float64)).reshape(tuple(shape))


def known_start(blocks: Sequence[LocalBlock]) -> None:
    """Weights from sines, so that no framework's generator matters."""
    for part in (m for block in blocks for m in block.double().modules()):
        if isinstance(part, nn.Conv2d):
            scale = math.sqrt(2 / (part.kernel_size[0] ** 2 * part.out_channels))
            part.weight.data = scale * sines(part.weight.shape)
        elif isinstance(part, nn.Linear):
            part.weight.data = 0.1 * sines(part.weight.shape)
            part.bias.data.zero_()


def known_batch() -> tuple[Tensor, Tensor]:
    index = torch.arange(4 * 3 * 32 * 32, dtype=torch.float64)
    return torch.cos(0.05 * index**1.1).reshape(4, 3, 32, 32), torch.tensor([0, 3, 7, 9])


def reference(depth: int) -> tuple[Network, Oracle]:
    network = load_network("resnet32", (3, 32, 32), 10, seed=0)
    cut = partition(network, blocks="per-unit", rule="auglocal", depth=depth, tail="merge")
    blocks = build_blocks(network, RuleSpec("auglocal", depth, 0.5, 1, "merge"), cut, seed=0)
    known_start(blocks)
    return network, Oracle(blocks, task(), sgd, torch.float64)


def grad_norm(network: Network, name: str) -> float:
    grad = network.module.get_parameter(name).grad
    assert grad is not None
    return float(grad.norm())


def test_three_steps_of_resnet32_are_the_reference() -> None:
    network, oracle = reference(depth=2)
    x, y = known_batch()
    for expected in NUMERIC:
        *local, final = (float(value) for value, _ in oracle.step(x, y, lr=0.05))
        assert local == pytest.approx(expected["local_losses"], abs=1e-6)
        assert final == pytest.approx(expected["final_loss"], abs=1e-6)
        assert grad_norm(network, "conv1.weight") == pytest.approx(expected["grad_norm_conv1"], abs=2e-6)
        norm = expected["grad_norm_layer2_0_conv1"]
        assert grad_norm(network, "layer2.0.conv1.weight") == pytest.approx(norm, abs=2e-6)
        assert grad_norm(network, "fc.weight") == pytest.approx(expected["grad_norm_fc"], abs=2e-6)


def test_first_losses_at_depth_one_are_the_reference() -> None:
    _, oracle = reference(depth=1)
    found = [float(value) for value, _ in oracle.step(*known_batch(), lr=0.05)]
    assert found == pytest.approx([float(value) for value in DEPTH1.split()], abs=1e-6)


@pytest.mark.parametrize("name", ["resnet8", "vgg11", "vit", "mlp", "mobilenetv2"])
def test_a_block_does_not_depend_on_the_next(name: str) -> None:
    """Bit for bit: two trainings whose blocks from k on start differently agree before k."""
    left, right = (small_oracle(name) for _ in range(2))
    changed = len(left.blocks) // 2
    with torch.no_grad():
        for parameter in (p for block in right.blocks[changed:] for p in block.parameters()):
            parameter.mul_(1.5).add_(0.01)
    generator = torch.Generator().manual_seed(0)
    for _ in range(2):
        x, y = torch.randn(2, 3, 32, 32, generator=generator), torch.tensor([1, 4])
        results = [oracle.step(x, y, lr=0.05) for oracle in (left, right)]
    assert [float(v) for v, _ in results[0][:changed]] == [float(v) for v, _ in results[1][:changed]]
    assert float(results[0][changed][0]) != float(results[1][changed][0])
    for one, two in zip(left.blocks[:changed], right.blocks[:changed], strict=True):
        state = two.state_dict()
        assert all(torch.equal(value, state[key]) for key, value in one.state_dict().items())


def small_oracle(name: str) -> Oracle:
    network = load_network(name, (3, 32, 32), 5, seed=0)
    cut = partition(network, blocks=4, rule="auglocal", depth=1, tail="all")
    blocks = build_blocks(network, RuleSpec("auglocal", 1, 0.5, 1, "all"), cut, seed=0)
    return Oracle(blocks, task(classes=5), sgd, torch.float32)


def test_one_block_is_plain_backpropagation() -> None:
    network, twin = (load_network("resnet8", (3, 16, 16), 4, seed=0) for _ in range(2))
    blocks = build_blocks(network, RuleSpec("bp", 1, 0.5, 1, "all"), (range(4),), seed=0)
    oracle = Oracle(blocks, task(classes=4), sgd, torch.float64)
    twin.module.double()
    optimizer = sgd(list(twin.module.parameters()))
    x, y = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0)).double(), torch.tensor([0, 1, 2, 3])
    for _ in range(3):
        ((found, sums),) = oracle.step(x, y, lr=0.05)
        logits = twin.module(x)
        expected = functional.cross_entropy(logits, y)
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
        assert float(found) == pytest.approx(float(expected.detach()), rel=1e-10)
        assert int(sums["correct"]) == int((logits.argmax(1) == y).sum())


def test_the_learning_rate_is_the_step_s() -> None:
    oracle = small_oracle("mlp")
    before = [p.clone() for block in oracle.blocks for p in block.parameters()]
    oracle.step(torch.ones(2, 3, 32, 32), torch.tensor([0, 1]), lr=0.0)
    after = [p for block in oracle.blocks for p in block.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cross_entropy_is_torch_s(smoothing: float) -> None:
    logits = torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0, 1, 2, 3, 4, 0, 1])
    check_same(
        logits,
        loss(logits, y, task(smoothing=smoothing)),
        functional.cross_entropy(logits, y, None, label_smoothing=smoothing),
    )
    assert int(metrics(logits, y, task())["correct"]) == sum(
        int(row.argmax()) == label for row, label in zip(logits, y, strict=True)
    )


def test_bce_is_torch_s() -> None:
    logits = torch.tensor([[0.0, 3.0], [-2.0, 100.0], [-100.0, 0.5]], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([[1, 0], [0, 1], [1, 1]])
    check_same(logits, loss(logits, y, task("bce")), functional.binary_cross_entropy_with_logits(logits, y.double()))
    correct = metrics(logits, y, task("bce"))["correct"]
    assert correct.dtype == torch.int64
    assert int(correct) == 3


def test_mse_is_torch_s() -> None:
    logits = torch.randn(4, 1, requires_grad=True)
    y = torch.randn(4)
    check_same(logits, loss(logits, y, task("mse")), functional.mse_loss(logits, y[:, None]))
    total = metrics(logits.detach(), y, task("mse"))["absolute_error"]
    assert total.dtype == torch.float32
    assert float(total) == pytest.approx(float(functional.l1_loss(logits.detach(), y[:, None], reduction="sum")))


def check_same(logits: Tensor, found: Tensor, expected: Tensor) -> None:
    assert found.shape == ()
    torch.testing.assert_close(found, expected)
    gradients = (torch.autograd.grad(value, logits)[0] for value in (found, expected))
    torch.testing.assert_close(*gradients)


def test_an_unknown_loss_is_refused() -> None:
    for function in (loss, metrics):
        with pytest.raises(UsageError, match="no loss is called 'hinge'; choose one of cross_entropy"):
            function(torch.zeros(1, 2), torch.zeros(1), task("hinge"))
