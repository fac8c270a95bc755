"""Multiply-accumulates against counts by hand, and against published totals."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from torch import Tensor, nn

from edgelocal.bundle.spec import MacsSpec, RuleSpec
from edgelocal.errors import ExportError
from edgelocal.exporters.macs import Counter, Work, block_macs, chain
from edgelocal.exporters.partition import per_unit
from edgelocal.exporters.rules import LocalBlock, build_blocks
from edgelocal.exporters.units import Network, load_network
from edgelocal.exporters.zoo import custom


@cache
def network(name: str, size: int = 32, classes: int = 10) -> Network:
    return load_network(name, (3, size, size), classes, seed=0)


def whole(found: Network) -> LocalBlock:
    (block,) = build_blocks(found, RuleSpec("bp", 1, 0.0, 1, "all"), (range(len(found.units)),), seed=0)
    return block


def work(module: nn.Module, *shape: int, dtype: torch.dtype = torch.float32) -> Work:
    return Counter().piece(module, shape, dtype).work


class Attention(nn.Module):
    """One projection to queries, keys and values, and PyTorch's own attention: 5 tokens, 2 heads of 4."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.qkv(x).reshape(-1, 5, 3, 2, 4).permute(2, 0, 3, 1, 4)
        return nn.functional.scaled_dot_product_attention(query, key, value)


@pytest.mark.parametrize(
    ("module", "shape", "forward"),
    [
        (nn.Linear(5, 7), (5,), 5 * 7),
        (nn.Linear(5, 7), (3, 5), 3 * 5 * 7),
        (nn.Conv2d(8, 16, 3, padding=1), (8, 5, 6), 5 * 6 * 16 * 8 * 9),
        (nn.Conv2d(8, 16, 3, stride=2, padding=1), (8, 6, 6), 3 * 3 * 16 * 8 * 9),
        (nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=4), (8, 6, 6), 3 * 3 * 16 * 2 * 9),
        (nn.Conv2d(8, 8, 3, groups=8), (8, 6, 6), 4 * 4 * 8 * 9),
        (nn.Conv1d(4, 6, 3), (4, 10), 8 * 6 * 4 * 3),
        (nn.ConvTranspose2d(8, 16, 3, stride=2), (8, 5, 5), 5 * 5 * 8 * 16 * 9),
        (nn.ConvTranspose2d(8, 16, 3, stride=2, groups=2), (8, 5, 5), 5 * 5 * 8 * 8 * 9),
        (nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)), (4, 6, 6), 0),
    ],
    ids=str,
)
def test_a_layer_costs_the_same_forward_and_for_either_gradient(
    module: nn.Module, shape: tuple[int, ...], forward: int
) -> None:
    found = work(module, *shape)
    assert (found.forward, found.first, found.inner) == (forward, 2 * forward, 3 * forward)
    assert found.trains


def test_attention_has_no_weights_but_two_gradients() -> None:
    projection, products = 5 * 8 * 24, 2 * (2 * 5 * 5 * 4)
    assert work(Attention(), 5, 8) == Work(
        projection + products, 2 * projection + 3 * products, 3 * (projection + products), trains=True
    )


def test_what_has_no_weights_before_the_first_that_has_is_not_trained() -> None:
    product = Work(forward=6, first=6, inner=12, trains=False)
    layer = Work(forward=10, first=20, inner=30, trains=True)
    assert chain([product, layer, product]) == Work(22, 6 + 20 + 12, 12 + 30 + 12, trains=True)
    assert chain([product, product]) == Work(12, 12, 24, trains=False)
    assert chain([]) == Work(0, 0, 0, trains=False)


def test_frozen_weights_have_no_gradient() -> None:
    layer = nn.Linear(5, 7).requires_grad_(False)
    assert work(layer, 5) == Work(35, 35, 70, trains=False)


def test_tokens_have_no_gradient() -> None:
    found = work(nn.Sequential(nn.Embedding(11, 8), nn.Linear(8, 4)), 6, dtype=torch.int64)
    assert found == Work(6 * 8 * 4, 3 * 6 * 8 * 4, 3 * 6 * 8 * 4, trains=True)


@pytest.mark.parametrize(
    ("name", "size", "classes", "millions", "within"),
    [
        ("resnet32", 32, 10, 69.5, 0.02),
        ("resnet110", 32, 10, 255, 0.02),
        ("resnet18", 224, 1000, 1814, 0.01),
        ("mobilenetv2", 224, 1000, 300.8, 0.01),
    ],
)
def test_totals_are_the_published_ones(name: str, size: int, classes: int, millions: float, within: float) -> None:
    found = network(name, size, classes)
    macs = block_macs(whole(found), found.input_shape, found.input_dtype)
    assert macs.forward / 1e6 == pytest.approx(millions, rel=within)
    assert macs.forward_auxiliary == macs.training_auxiliary == 0


def test_a_network_saves_the_gradient_of_its_input() -> None:
    found = network("resnet32")
    macs = block_macs(whole(found), found.input_shape, found.input_dtype)
    assert macs.training == 3 * macs.forward - 32 * 32 * 3 * 16 * 9


def test_a_block_and_its_auxiliary_by_hand() -> None:
    """Unit 1 of ResNet-32 reads 16 maps of 32x32; its auxiliary of depth 1 imitates the last unit with stride 2."""
    found = network("resnet32")
    block = build_blocks(found, RuleSpec("auglocal", 1, 0.0, 1, "merge"), per_unit(16, 2), seed=0)[1]
    conv = 32 * 32 * 16 * 16 * 9
    halved = 16 * 16
    auxiliary = halved * 64 * 16 * 9 + halved * 64 * 64 * 9 + halved * 64 * 16 + 64 * 10
    assert block_macs(block, (16, 32, 32), torch.float32) == MacsSpec(2 * conv, auxiliary, 5 * conv, 3 * auxiliary)


@pytest.mark.parametrize("name", ["vit", "vgg11", "mobilenetv2"])
def test_pieces_add_up_to_the_block_run_in_one_go(name: str) -> None:
    found = network(name)
    block = build_blocks(found, RuleSpec("auglocal", 2, 0.0, 1, "all"), per_unit(len(found.units), 1), seed=0)[0]
    assert block.auxiliary is not None
    macs = block_macs(block, found.input_shape, found.input_dtype)
    at_once = work(nn.Sequential(block.body, block.auxiliary), *found.input_shape)
    assert macs.forward + macs.forward_auxiliary == at_once.forward
    assert macs.training + macs.training_auxiliary == at_once.first


def test_behind_a_frozen_body_the_auxiliary_is_first() -> None:
    found = custom.from_module(nn.Sequential(nn.Linear(8, 6), nn.Linear(6, 4), nn.Linear(4, 3)), "frozen", (8,), 3)
    found.units[0].module.requires_grad_(False)
    block = build_blocks(found, RuleSpec("linear", 1, 0.0, 1, "all"), per_unit(2, 1), seed=0)[0]
    assert block_macs(block, (8,), torch.float32) == MacsSpec(8 * 6, 6 * 3, 8 * 6, 2 * 6 * 3)


def test_equal_structures_are_of_one_kind_and_others_are_not() -> None:
    counter = Counter()
    kinds = [
        counter.piece(module, shape, torch.float32).kind
        for module, shape in [
            (nn.Linear(4, 4), (4,)),
            (nn.Linear(4, 4), (4,)),
            (nn.Linear(4, 4), (2, 4)),
            (nn.Linear(4, 4, bias=False), (4,)),
        ]
    ]
    assert kinds == [0, 0, 1, 2]


def test_counting_leaves_the_network_alone() -> None:
    found = network("resnet8")
    before = {key: value.clone() for key, value in found.module.state_dict().items()}
    rng = torch.random.get_rng_state()
    block_macs(whole(found), found.input_shape, found.input_dtype)
    assert all(torch.equal(before[key], value) for key, value in found.module.state_dict().items())
    assert all(p.grad is None for p in found.module.parameters())
    assert torch.equal(rng, torch.random.get_rng_state())


def test_what_does_not_run_is_named() -> None:
    with pytest.raises(ExportError, match=r"counting the operations of Linear on input \(N, 5\) failed with"):
        work(nn.Linear(4, 4), 5)
