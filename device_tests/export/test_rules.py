"""AugLocal against the reference vectors (see vectors/), and what every rule promises about its blocks."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from edgelocal.bundle.spec import RuleSpec
from edgelocal.errors import ExportError, UsageError
from edgelocal.exporters import zoo
from edgelocal.exporters.partition import partition, per_unit
from edgelocal.exporters.rules import LocalBlock, build_blocks, find
from edgelocal.exporters.rules.auglocal import changes, depths, select, strides
from edgelocal.exporters.units import Network, load_network
from edgelocal.exporters.zoo import custom

RESNET32 = json.loads((Path(__file__).parent / "vectors" / "auglocal_resnet32.json").read_text())


def auglocal(depth: int, tau: float = 0.5, tail: str = "merge") -> RuleSpec:
    return RuleSpec("auglocal", depth, tau, 1, tail)


@cache
def resnet32() -> Network:
    return load_network("resnet32", (3, 32, 32), 10, seed=0)


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("vector", RESNET32.values(), ids=list(RESNET32))
def test_resnet32_is_the_reference(vector: dict[str, Any]) -> None:
    network, depth = resnet32(), vector["d"]
    cut = partition(network, blocks="per-unit", rule="auglocal", depth=depth, tail="merge")
    assert len(cut) == vector["n_modules"]
    assert list(cut[-1]) == vector["final_module_layers"]
    assert list(depths(len(cut), depth, vector["tau"], 1)) == vector["depths"]
    blocks = build_blocks(network, auglocal(depth), cut, seed=0)
    assert len(blocks) == vector["n_aux"] + 1
    for row, block in zip(vector["rows"], blocks, strict=False):
        check_row(network, row, block)


def check_row(network: Network, row: dict[str, Any], block: LocalBlock) -> None:
    chosen = select(row["layer"], row["depth"], len(network.units))
    widths = [network.units[index].width for index in chosen]
    assert list(chosen) == row["selected"]
    assert widths == row["out_channels"]
    assert list(strides([row["channels"], *widths])) == row["strides"]
    assert block.auxiliary is not None
    assert count(block.auxiliary) == row["aux_params"]
    assert any(isinstance(m, nn.BatchNorm1d) for m in block.auxiliary.modules()) == row["bn1d_before_fc"]
    built = [m for name, m in block.auxiliary.named_modules() if name.endswith("conv1") and isinstance(m, nn.Conv2d)]
    assert [(m.out_channels, m.stride[0]) for m in built] == list(zip(widths, row["strides"], strict=True))


@pytest.mark.parametrize(
    ("depth", "expected"), [(3, (3,) * 25 + (2,) * 26), (6, (6,) * 10 + (5,) * 19 + (4,) * 19), (1, (1,) * 53)]
)
def test_resnet110_depths(depth: int, expected: tuple[int, ...]) -> None:
    assert depths(55 - depth, depth, 0.5, 1) == expected


@pytest.mark.parametrize(
    ("units", "depth", "unit", "expected"),
    [
        (55, 3, 0, (18, 36, 54)),
        (55, 3, 1, (19, 36, 54)),
        (55, 3, 24, (34, 44, 54)),
        (55, 2, 25, (40, 54)),
        (55, 2, 50, (52, 54)),
        (55, 6, 0, (9, 18, 27, 36, 45, 54)),
        (55, 5, 10, (19, 28, 36, 45, 54)),
        (55, 4, 29, (35, 42, 48, 54)),
        (55, 4, 47, (49, 50, 52, 54)),
    ],
)
def test_resnet110_selection(units: int, depth: int, unit: int, expected: tuple[int, ...]) -> None:
    assert select(unit, depth, units) == expected


RESNET34 = """4,8,12,16 5,8,12,16 6,9,12,16 6,10,13,16 7,10,13,16 8,10,13,16 8,11,14,16 9,12,14,16 10,12,14,16
11,12,14,16 12,13,14,16 12,14,15,16 13,14,15,16 14,15,16 15,16 16"""
VGG13 = "2,4,7,9 3,5,7,9 4,6,7,9 4,6,8,9 5,6,8,9 6,7,8,9 7,8,9 8,9 9"


@pytest.mark.parametrize(("units", "rows"), [(17, RESNET34), (10, VGG13)], ids=["resnet34", "vgg13"])
def test_selection_without_pyramid(units: int, rows: str) -> None:
    expected = [tuple(map(int, row.split(","))) for row in rows.split()]
    assert depths(units, 4, 0.0, 1) == (4,) * (units - 1)
    assert [select(unit, 4, units) for unit in range(units - 1)] == expected


@given(st.data(), st.integers(2, 120), st.integers(1, 12))
def test_selection_is_increasing_and_ends_in_the_last_unit(data: st.DataObject, units: int, depth: int) -> None:
    unit = data.draw(st.integers(0, units - 2))
    chosen = select(unit, depth, units)
    assert len(chosen) == min(depth, units - 1 - unit)
    assert list(chosen) == sorted(set(chosen))
    assert chosen[0] > unit
    assert chosen[-1] == units - 1


@given(st.integers(1, 120), st.integers(1, 12), st.floats(0, 1))
def test_depths_fall_from_the_first_to_the_last(modules: int, depth: int, tau: float) -> None:
    found = depths(modules, depth, tau, 1)
    assert len(found) == modules - 1
    assert list(found) == sorted(found, reverse=True)
    assert all(1 <= value <= depth for value in found)
    assert not found or found[0] == depth


def test_depths_at_the_ends() -> None:
    assert depths(1, 3, 0.5, 1) == ()
    assert depths(2, 3, 0.5, 1) == (3,)
    assert depths(3, 3, 1.0, 1) == (3, 1)
    assert depths(3, 4, 1.0, 2) == (4, 2)


@given(st.lists(st.sampled_from([16, 32, 64, 128, 256]), min_size=2, max_size=8).map(sorted))
def test_strides_halve_once_for_every_doubling(widths: list[int]) -> None:
    doublings = (widths[-1] // widths[0]).bit_length() - 1
    assert strides(widths).count(2) <= min(doublings, len(widths) - 1)
    steps = [*widths, *[widths[-1]] * 8]
    assert strides(steps).count(2) == doublings


def test_strides_are_exact_beyond_powers_of_two() -> None:
    assert strides([24, 32, 48]) == (1, 2)
    assert strides([32, 16, 32, 64]) == (1, 1, 2)
    assert changes([64, 256, 512, 512]) == (2, 2, 1)


def test_a_fresh_vgg_unit_pools_once_where_the_width_changes() -> None:
    network = load_network("vgg13", (3, 32, 32), 10, seed=0)
    first = build_blocks(network, auglocal(4, 0.0), per_unit(10, 5), seed=0)[0]
    assert first.auxiliary is not None
    assert sum(isinstance(m, nn.MaxPool2d) for m in first.auxiliary.modules()) == 3
    assert [m.out_features for m in first.auxiliary.modules() if isinstance(m, nn.Linear)] == [512, 512, 10]


@pytest.mark.parametrize("rule", ["auglocal", "linear"])
@pytest.mark.parametrize("name", zoo.names())
def test_every_block_of_the_zoo_runs(name: str, rule: str) -> None:
    small = name in ("mlp", "vit") or (name.startswith("resnet") and int(name[6:]) in (8, 14, 20, 32, 56, 110))
    network = load_network(name, (3, 32, 32) if small else (3, 64, 64), 4, seed=0)
    units = len(network.units)
    cut = (range(1), range(1, units // 2 + 1), range(units // 2 + 1, units))
    h = torch.randn(2, *network.input_shape)
    for block in build_blocks(network, RuleSpec(rule, 1, 0.5, 1, "all"), cut, seed=0):
        h, logits = block(h)
        assert logits.shape == (2, 4)
    assert h is logits


@pytest.mark.parametrize("name", ["resnet14", "vgg11", "vit", "mlp"])
def test_names_lead_back_to_the_original(name: str) -> None:
    network = load_network(name, (3, 32, 32), 10, seed=0)
    rule = auglocal(1, tail="all")
    blocks = build_blocks(network, rule, partition(network, blocks="per-unit", rule="auglocal", depth=1, tail="all"), 0)
    original = network.module.state_dict(keep_vars=True)
    seen: list[str] = []
    for block in blocks:
        own = block.state_dict(keep_vars=True)
        names = block.tensor_names()
        assert names.keys() == own.keys()
        seen += names.values()
        for key, contract in names.items():
            if contract.startswith("aux/"):
                assert contract.startswith(f"aux/{block.name}/")
                assert block.auxiliary is not None
                assert block.auxiliary.state_dict(keep_vars=True)[contract.split("/", 2)[2]] is own[key]
            else:
                assert original[contract] is own[key]
    assert len(seen) == len(set(seen))
    assert {name for name in seen if not name.startswith("aux/")} == set(original)
    assert [block.name for block in blocks] == [f"{index:02d}" for index in range(len(blocks))]


def test_auxiliaries_are_drawn_from_the_seed_each_apart() -> None:
    cut = per_unit(16, 3)
    first, again, other = (build_blocks(resnet32(), auglocal(2), cut, seed) for seed in (0, 0, 1))
    key = "auxiliary.0.conv1.weight"
    weights = [dict(blocks[4].named_parameters())[key] for blocks in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], dict(first[3].named_parameters())[key])


def test_depths_can_be_given() -> None:
    cut = (range(5), range(5, 10), range(10, 16))
    own = build_blocks(resnet32(), auglocal(4), cut, seed=0, depths=(2, 3))
    assert [len(block.auxiliary) - 1 for block in own if isinstance(block.auxiliary, nn.Sequential)] == [2, 3]
    chosen = build_blocks(resnet32(), auglocal(4, 0.5), cut, seed=0)
    same = build_blocks(resnet32(), auglocal(4, 0.5), cut, seed=0, depths=depths(3, 4, 0.5, 1))
    for one, other in zip(chosen, same, strict=True):
        state = one.state_dict()
        assert state.keys() == other.state_dict().keys()
        assert all(torch.equal(state[key], value) for key, value in other.state_dict().items())


@pytest.mark.parametrize(
    ("rule", "chosen", "message"),
    [
        (auglocal(2), (2,), r"found the auxiliary depths \[2\], expected 2 of at least 1, one for every block but"),
        (auglocal(2), (2, 2, 2), r"expected 2 of at least 1"),
        (auglocal(2), (2, 0), r"\[2, 0\], expected 2 of at least 1"),
        (auglocal(2, tau=1.5), (2, 1), "0 <= tau <= 1"),
        (RuleSpec("linear", 1, 0.5, 1, "all"), (1, 1), "auxiliary networks of rule linear have no depth"),
    ],
)
def test_depths_that_do_not_go_with_the_blocks_are_refused(
    rule: RuleSpec, chosen: tuple[int, ...], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        build_blocks(resnet32(), rule, (range(5), range(5, 10), range(10, 16)), seed=0, depths=chosen)


def test_bp_is_the_network_itself() -> None:
    network = load_network("resnet8", (3, 16, 16), 10, seed=0)
    (block,) = build_blocks(network, RuleSpec("bp", 1, 0.5, 1, "all"), (range(4),), seed=0)
    x = torch.randn(2, 3, 16, 16)
    h, logits = block.eval()(x)
    assert block.auxiliary is None
    assert h is logits
    assert torch.equal(logits, network.module(x))


@pytest.mark.parametrize(
    ("rule", "cut", "message"),
    [
        (auglocal(2), (range(2), range(3, 4)), "do not cover the 4 units"),
        (auglocal(2), (range(0), range(4)), "do not cover"),
        (RuleSpec("bp", 1, 0.5, 1, "all"), (range(2), range(2, 4)), "rule bp trains the network as one block, found 2"),
        (RuleSpec("auglocl", 1, 0.5, 1, "all"), (range(4),), "did you mean auglocal"),
        (auglocal(2, tau=1.5), (range(2), range(2, 4)), "0 <= tau <= 1"),
        (RuleSpec("auglocal", 1, 0.5, 2, "all"), (range(2), range(2, 4)), "1 <= least depth <= depth"),
    ],
)
def test_bad_settings_are_refused(rule: RuleSpec, cut: tuple[range, ...], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build_blocks(load_network("mlp", (6,), 3, seed=0), rule, cut, seed=0)


def test_a_unit_that_cannot_be_imitated_is_refused() -> None:
    tokens = nn.Sequential(nn.Linear(5, 8), nn.Linear(8, 6), nn.Sequential(nn.Flatten(), nn.Linear(24, 2)))
    network = custom.from_module(tokens, "tokens", (4, 5), 2)
    with pytest.raises(ExportError, match="use rule linear"):
        build_blocks(network, auglocal(1, tail="all"), per_unit(2, 1), seed=0)
    blocks = build_blocks(network, RuleSpec("linear", 1, 0.5, 1, "all"), per_unit(2, 1), seed=0)
    assert blocks[0](torch.zeros(2, 4, 5))[1].shape == (2, 2)
    assert find("linear").auxiliary is not None
