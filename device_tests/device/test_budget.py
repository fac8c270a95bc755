"""Sizes, budgets and the memory meters."""

from __future__ import annotations

import contextlib
import mmap
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgelocal.errors import UsageError
from edgelocal.machine.budget import (
    PeakMeter,
    format_size,
    parse_budget,
    parse_size,
    peak_rss_bytes,
    reset_peak,
    rss_bytes,
    size_up,
)

MIB = 1 << 20


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        ("100000000", 100_000_000),
        ("12B", 12),
        ("2KB", 2000),
        ("3MB", 3_000_000),
        ("1.5GB", 1_500_000_000),
        ("1KiB", 1024),
        ("96MiB", 96 * MIB),
        (" 0.5 gib ", 512 * MIB),
        ("1.9999", 1),
        ("0.1KB", 100),  # not 99, as binary floating point would have it
        ("4.35MB", 4_350_000),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize(
    "text", ["", "MiB", "0", "0.5B", "-1", "1e9", "1.GB", "96 M", "1TB", "nan", "60%", "1,5GB", "٣", "9" * 19, "1 2"]
)
def test_what_is_no_size_is_refused_with_examples(text: str) -> None:
    with pytest.raises(UsageError, match=r"is not a size; write for example 96MiB, 1\.5GB"):
        parse_size(text)


@given(st.text())
def test_only_a_usage_error_leaves(text: str) -> None:
    with contextlib.suppress(UsageError):
        assert parse_size(text) >= 1
    with contextlib.suppress(UsageError):
        assert parse_budget(text, MIB) >= 0


@pytest.mark.parametrize(
    ("text", "budget"), [("auto", 800), (" AUTO ", 800), ("60%", 600), ("12.5 %", 125), ("100%", 1000), ("2KB", 2000)]
)
def test_budgets(text: str, budget: int) -> None:
    assert parse_budget(text, 1000) == budget


@pytest.mark.parametrize("text", ["0%", "100.1%", "-5%", "%", "5%%", "five%"])
def test_a_share_outside_the_memory_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a share of memory"):
        parse_budget(text, 1000)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (MIB - 1, "1 MiB"),
        (96 * MIB, "96 MiB"),
        (1536 * MIB, "1.5 GiB"),
        (1 << 42, "4096 GiB"),
        (-3 * 1024, "-3 KiB"),
    ],
)
def test_formatted_sizes(size: int, text: str) -> None:
    assert format_size(size) == text


@given(st.integers(1, 1 << 45))
def test_a_formatted_size_reads_back_to_within_its_digits(size: int) -> None:
    assert parse_size(format_size(size)) == pytest.approx(size, rel=0.05)


@given(st.integers(1, 1 << 50))
def test_a_need_is_never_shown_as_less_and_at_most_a_tenth_of_the_unit_more(size: int) -> None:
    shown = parse_size(size_up(size))
    assert size <= shown
    unit = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}[size_up(size).split()[1]]
    assert shown - size <= unit / 10 + 1


def test_meters_read_the_status_of_the_process(tmp_path: Path) -> None:
    (tmp_path / "status").write_text("Name:\tpython\nVmHWM:\t    2000 kB\nVmRSS:\t    1500 kB\n")
    assert rss_bytes(tmp_path) == 1500 * 1024
    assert peak_rss_bytes(tmp_path) == 2000 * 1024
    assert not reset_peak(tmp_path)
    (tmp_path / "clear_refs").write_text("")
    assert reset_peak(tmp_path)
    assert (tmp_path / "clear_refs").read_text() == "5"


def test_without_proc_the_lifetime_peak_bounds_from_above(tmp_path: Path) -> None:
    slack = 4 * MIB  # the kernel batches its counters
    assert rss_bytes(tmp_path) + slack >= rss_bytes()
    assert peak_rss_bytes(tmp_path) + slack >= rss_bytes()
    with PeakMeter(tmp_path) as meter:
        pass
    assert not meter.exact
    assert meter.growth_bytes >= 0


def test_a_peak_that_may_not_be_reset_is_said(tmp_path: Path) -> None:
    (tmp_path / "clear_refs").mkdir()
    assert not reset_peak(tmp_path)


def _touch(size_bytes: int) -> None:
    """Fresh pages, given back at once: arrays may be laid into memory that an earlier test left resident."""
    with mmap.mmap(-1, size_bytes) as pages:
        pages[:: mmap.PAGESIZE] = bytes(size_bytes // mmap.PAGESIZE)


def test_the_meter_sees_a_peak_that_is_gone_again_and_no_older_one() -> None:
    if not reset_peak():
        pytest.skip("this system cannot reset the peak")
    _touch(96 * MIB)  # gone before the meter starts
    with PeakMeter() as meter:
        _touch(64 * MIB)
    assert meter.exact
    assert 60 * MIB < meter.growth_bytes < 80 * MIB
