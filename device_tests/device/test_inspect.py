"""What `inspect` and `export` show of a bundle: the trade-off in 80 columns, and every verdict on back-propagation."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from device_tests.device.invented import Invented, manifest
from edgelocal.bundle.spec import FileSpec, FrontierSpec, MacsSpec, Manifest
from edgelocal.commands.inspect import bundle_table, describe_bundle, frontier_table
from edgelocal.memory.advice import advice_on

MIB = 1 << 20
GIGA = 10**9


def points(bp: tuple[int, int], kept: tuple[int, int], chosen: tuple[int, int]) -> tuple[FrontierSpec, ...]:
    """Three points from (MiB, MACs); a partition nobody chose comes first."""
    made = (("partition", 9 * 9, 9), ("bp", *bp), ("checkpointing", *kept), ("partition", *chosen))
    return tuple(
        FrontierSpec(kind, 1, size * MIB, macs, place == 3, 128, kind == "checkpointing")
        for place, (kind, size, macs) in enumerate(made)
    )


VERDICTS = {
    "plain is no larger and cheaper": ((100, 10), (50, 13), (100, 20), "^plain back-propagation would need no more"),
    "checkpointed is no larger and cheaper": (
        (400, 10),
        (100, 13),
        (100, 20),
        "^by .* no more memory and less compute",
    ),
    "checkpointed is cheaper and larger": ((400, 10), (150, 13), (100, 20), "less compute, but 1.50 times the memory"),
    "checkpointed is smaller and dearer": (
        (400, 10),
        (50, 13),
        (100, 12),
        "0.50 times .*, for more compute",
    ),
    "checkpointed is worse in both": ((400, 10), (150, 13), (100, 12), "no less memory and no less compute"),
}


@pytest.mark.parametrize("name", VERDICTS)
def test_every_verdict_follows_from_the_figures(name: str) -> None:
    bp, kept, chosen, _ = VERDICTS[name]
    found = advice_on(points(bp, kept, chosen))
    assert [other for other, (*_, pattern) in VERDICTS.items() if re.search(pattern, found)] == [name]


def test_checkpointed_back_propagation_learns_as_plain_does_and_is_called_better_only_where_it_is() -> None:
    better = advice_on(points((400, 10), (100, 13), (100, 20)))
    assert "it learns as plain back-propagation does" in better
    assert "better choice" in better
    for bp, kept, chosen, _ in list(VERDICTS.values())[2:]:
        assert "better choice" not in advice_on(points(bp, kept, chosen))


@pytest.mark.parametrize("missing", [1, 2, 3])
def test_without_one_of_the_three_nothing_is_said(missing: int) -> None:
    whole = points((400, 10), (100, 13), (100, 20))
    assert advice_on([point for place, point in enumerate(whole) if place != missing]) == ""


def shown(*parts: Any) -> list[str]:
    console = Console(width=80, highlight=False, markup=False)
    with console.capture() as capture:
        for part in parts:
            console.print(part, soft_wrap=isinstance(part, str))
    return capture.get().splitlines()


def bundle(*frontier: FrontierSpec) -> Manifest:
    made = manifest(Invented(), Invented())
    names = [n for b in made.blocks for n in (b.step.file, b.forward.file, b.weights)]
    files = {name: FileSpec(1, "0" * 64) for name in (*names, made.blocks[0].head.file)}  # type: ignore[union-attr]
    first = replace(made.blocks[0], macs=MacsSpec(1, 2, 3_000_000, 500_000, 250_000))
    return replace(made, files=files, blocks=(first, made.blocks[1]), frontier=frontier or None)


def test_the_trade_off_can_be_read_in_80_columns() -> None:
    given = [
        FrontierSpec("bp", 1, 1023 * MIB, 999 * GIGA, False, 64, True),
        FrontierSpec("checkpointing", 1, 512 * MIB, 1332 * GIGA, False, 64, True),
        FrontierSpec("partition", 12, 1023 * MIB // 4, 1998 * GIGA, True, 64, False),
        FrontierSpec("partition", 100, 100 * MIB, 3999 * GIGA, False, 64, False),
        FrontierSpec("per-unit", 100, 90 * MIB, 3 * GIGA, False, 64, False),
        FrontierSpec("linear", 100, 80 * MIB, 2 * GIGA, False, 64, False),
    ]
    table, advice = frontier_table(describe_bundle(bundle(*given)))
    lines = shown(table)
    assert max(map(len, lines)) <= 80
    assert "batch 64" in lines[0]
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in lines if line.startswith("│")]
    assert [row[0] for row in rows] == [
        "linear",
        "per unit",
        "partition",
        "-> chosen",
        "bp, checkpointed (estimate)",
        "bp (estimate)",
    ]
    assert rows[3][1:] == ["12", "255.8 MiB", "0.25", "2 T", "2.00"]
    assert advice == advice_on(given)


def test_a_bundle_that_could_not_be_compared_shows_its_blocks_alone() -> None:
    (table,) = frontier_table(describe_bundle(bundle(FrontierSpec("partition", 2, MIB, 5, True, 8, False))))
    (row,) = [line for line in shown(table) if line.startswith("│")]
    assert [cell.strip() for cell in row.strip("│").split("│")] == ["-> chosen", "2", "1 MiB", "-", "5", "-"]
    assert frontier_table(describe_bundle(bundle())) == ()


def test_what_a_block_computes_again_is_shown_and_counted() -> None:
    info = describe_bundle(bundle())
    assert info["blocks"][0]["macs"]["recomputed"] == 250_000
    rows = [line for line in shown(bundle_table(info)) if line.startswith("│")]
    assert [cell.strip() for cell in rows[0].strip("│").split("│")][-2:] == ["3.75 M", "250 k"]
    assert [cell.strip() for cell in rows[1].strip("│").split("│")][-2:] == ["-", "-"]
