"""The page of `edgelocal report`: whole, needing nothing else, and its drawings measured against the data."""

from __future__ import annotations

import copy
import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from device_tests.device.sample_report import MIB, loaded, sample_metrics, sample_report, write_run
from edgelocal.report.axes import log_ticks, spread, ticks
from edgelocal.report.load import load_report
from edgelocal.report.model import parse_report
from edgelocal.report.page import render_page

CHARTS = ("memory", "timeline", "loss", "accuracy", "time", "latency", "frontier")
SVG = "{http://www.w3.org/2000/svg}"
HOSTILE = "</title><script>alert(1)</script>&<b>\"'\x00\x1b[31m\ud800]]>"
SIZES = {"B": 1.0, "KiB": 1024.0, "MiB": float(MIB)}


def page(raw: dict[str, Any]) -> str:
    return render_page(parse_report(raw))


def drawings(html: str) -> dict[str, ET.Element]:
    """The svg of every chart that has one, parsed as XML."""
    found = {}
    for name, content in re.findall(r'<figure id="chart-([a-z]+)">(.*?)</figure>', html, re.DOTALL):
        svg = re.search(r"<svg .*?</svg>", content, re.DOTALL)
        if svg:
            found[name] = ET.fromstring(svg[0])
    return found


def of_class(svg: ET.Element, name: str) -> list[ET.Element]:
    return [e for e in svg.iter() if name in (e.get("class") or "").split()]


def places(element: ET.Element) -> list[tuple[float, float]]:
    return [(float(x), float(y)) for x, y in (pair.split(",") for pair in (element.get("points") or "").split())]


def axis(svg: ET.Element, vertical: bool, unit: dict[str, float]) -> Any:
    """The way back from places to data, from the labels of two ticks and the grid lines beside them."""
    known = []
    for label in of_class(svg, "tick"):
        match = re.fullmatch(r"([0-9.]+) ?(\D*)", label.text or "")
        lines = [
            float(g.get("y1" if vertical else "x1") or 0)
            for g in of_class(svg, "grid")
            if (g.get("y1") == g.get("y2")) == vertical
        ]
        place = float(label.get("y") or 0) - 4 if vertical else float(label.get("x") or 0)
        if match and match[2] in unit and any(abs(place - at) < 0.02 for at in lines):
            known.append((place, float(match[1]) * unit[match[2]]))
    (p0, v0), (p1, v1) = known[0], known[-1]
    return lambda place: v0 + (place - p0) * (v1 - v0) / (p1 - p0)


class Wellformed(HTMLParser):
    """Fails where tags do not nest; keeps ids, tags and attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.attributes: set[str] = set()
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read_page(html: str) -> Wellformed:
    parser = Wellformed()
    parser.feed(html)
    parser.close()
    assert parser.open == []
    assert len(set(parser.ids)) == len(parser.ids)
    return parser


@pytest.mark.parametrize("schedule", ["interleaved", "sequential"])
@pytest.mark.parametrize("blocks", [1, 2, 11, 54])
def test_the_page_is_whole_and_needs_nothing_else(blocks: int, schedule: str) -> None:
    html = page(loaded(blocks, schedule))
    parsed = read_page(html)
    assert {f"chart-{name}" for name in CHARTS} <= set(parsed.ids)
    assert not parsed.tags & {"script", "link", "img", "iframe", "object", "image", "use", "a", "base"}
    assert not parsed.attributes & {"src", "href", "xlink:href", "srcset", "action", "onclick", "onload"}
    assert re.sub(r'xmlns="http://www\.w3\.org/2000/svg"', "", html).count("http") == 0
    assert not re.search(r"url\(|@import|@font-face", html)
    assert "viewport" in html
    for name, svg in drawings(html).items():
        assert svg.tag == f"{SVG}svg"
        assert svg.get("role") == "img", name
        assert len(svg.get("aria-label") or "") > 20, name
    assert set(drawings(html)) == set(CHARTS)
    assert len(html) < 400_000


def test_the_same_run_gives_the_same_page() -> None:
    assert page(loaded(5)) == page(copy.deepcopy(loaded(5)))


def test_text_of_a_run_never_becomes_markup() -> None:
    raw = loaded(3)
    raw |= {"network": HOSTILE, "rule": HOSTILE, "notes": [HOSTILE], "runtime": {HOSTILE: HOSTILE}}
    raw |= {"loss": HOSTILE, "schedule": HOSTILE, "cache": {"precision": HOSTILE}, "unfinished": HOSTILE}
    raw["frontier"][0]["kind"] = HOSTILE
    raw["run"] = {"bundle": HOSTILE, "data": [HOSTILE], "config": {HOSTILE: {HOSTILE: HOSTILE}}}
    raw["blocks"][1] |= {"name": HOSTILE, "units": [HOSTILE]}
    for record in raw["metrics"]:
        record["blocks"][HOSTILE] = record["blocks"].pop("01")
    html = page(raw)
    html.encode()
    parsed = read_page(html)
    assert "script" not in parsed.tags
    assert "\x00" not in html
    assert "\x1b" not in html
    text = "".join(parsed.text)
    assert text.count("<script>alert(1)</script>&<b>\"'��[31m�]]>") >= 10
    assert set(drawings(html)) == set(CHARTS)  # each is well-formed XML


def test_bars_of_memory_are_as_long_as_their_bytes() -> None:
    raw = loaded(4)
    svg = drawings(page(raw))["memory"]
    value = axis(svg, False, SIZES)
    ends = [value(float(e.get("x1") or 0)) for e in of_class(svg, "predicted")]
    idle = raw["idle_bytes"]
    assert ends == pytest.approx([idle + b["predicted"]["total"] for b in raw["blocks"]], rel=2e-3)
    middles = [value(sum(x for x, _ in places(e)) / 4) for e in of_class(svg, "measured")]
    assert middles == pytest.approx([idle + b["working_set_bytes"] for b in raw["blocks"]], rel=2e-3)
    (budget,) = of_class(svg, "budget")
    assert value(float(budget.get("x1") or 0)) == pytest.approx(raw["budget_bytes"], rel=2e-3)
    widths = [float(e.get("width") or 0) for e in of_class(svg, "k-activations")]
    assert widths[0] / widths[3] == pytest.approx(
        raw["blocks"][0]["predicted"]["activations"] / raw["blocks"][3]["predicted"]["activations"], rel=1e-2
    )
    groups = [e for e in svg.iter(f"{SVG}rect") if "k-idle" not in (e.get("class") or "")]
    assert len(groups) == 4 * 7


def test_a_budget_far_away_does_not_squeeze_the_bars() -> None:
    html = page(loaded(2) | {"budget_bytes": 64 << 30})
    assert not of_class(drawings(html)["memory"], "budget")
    assert html.count("The budget, 64 GiB, is beyond the scale.") == 2


def test_the_timeline_is_the_recorded_one() -> None:
    raw = loaded(4, "sequential")
    svg = drawings(page(raw))["timeline"]
    bytes_of, seconds_of = axis(svg, True, SIZES), axis(svg, False, {"": 1.0})
    (series,) = of_class(svg, "series")
    found = places(series)
    assert len(found) == len(raw["timeline"])
    assert [bytes_of(y) for _, y in found] == pytest.approx([p[1] for p in raw["timeline"]], rel=3e-3)
    assert [seconds_of(x) for x, _ in found] == pytest.approx([p[0] for p in raw["timeline"]], abs=0.05)
    strip = of_class(svg, "depth")
    assert [e[0].text.split(" from")[0] for e in strip] == [f"block {b['name']}" for b in raw["blocks"]]  # type: ignore[union-attr]
    assert sum(float(e.get("width") or 0) for e in strip) == pytest.approx(found[-1][0] - found[1][0], abs=0.5)


def test_turns_too_quick_to_draw_are_said() -> None:
    raw = loaded(3)
    raw["timeline"] = [[0.1 * i, 60 * MIB, i % 3] for i in range(900)]
    html = page(raw)
    assert "3 blocks took turns, too quickly to be drawn one by one." in html
    assert not of_class(drawings(html)["timeline"], "depth")


def test_what_lies_between_the_steps_of_a_block_does_not_cut_its_stretch() -> None:
    raw = loaded(2)
    order = [-1, 0, -1, 0, 0, -1, 1, -1, 1, -1]
    raw["timeline"] = [[float(i), 60 * MIB, block] for i, block in enumerate(order)]
    svg = drawings(page(raw))["timeline"]
    (series,) = of_class(svg, "series")
    assert len(places(series)) == len(order)
    seconds_of = axis(svg, False, {"": 1.0})
    ends = [
        [float(e.get("x") or 0), float(e.get("x") or 0) + float(e.get("width") or 0)] for e in of_class(svg, "depth")
    ]
    assert [[round(seconds_of(x), 1) for x in pair] for pair in ends] == [[1, 5], [6, 9]]


@pytest.mark.parametrize("blocks", [1, 10, 11, 54])
def test_curves_are_the_recorded_losses(blocks: int) -> None:
    raw = loaded(blocks)
    svg = drawings(page(raw))["loss"]
    curves = of_class(svg, "curve")
    assert len(curves) == blocks
    log = "log scale" in "".join(e.text or "" for e in of_class(svg, "axis"))
    for block, curve in zip(raw["blocks"], curves, strict=True):
        losses = [record["blocks"][block["name"]]["loss"] for record in raw["metrics"]]
        heights = [math.log10(v) if log else v for v in losses]
        ys = [y for _, y in places(curve)]
        shares = [(y - ys[0]) / (ys[-1] - ys[0]) for y in ys]
        assert shares == pytest.approx([(h - heights[0]) / (heights[-1] - heights[0]) for h in heights], abs=3e-3)
    names = [e.text for e in of_class(svg, "name")]
    assert sorted(names) == ([b["name"] for b in raw["blocks"]] if blocks <= 10 else [])
    assert len(of_class(svg, "held")) == 1


def test_one_epoch_is_dots() -> None:
    raw = loaded(3)
    raw["metrics"] = raw["metrics"][:1]
    svg = drawings(page(raw))["accuracy"]
    assert len(list(svg.iter(f"{SVG}circle"))) == 4
    assert not of_class(svg, "curve")


def test_times_and_their_spread_are_the_recorded_ones() -> None:
    raw = loaded(5)
    found = drawings(page(raw))
    widths = [float(e.get("width") or 0) for e in of_class(found["time"], "bar")]
    times = [b["train_s"] for b in raw["blocks"]]
    assert [w / widths[0] for w in widths] == pytest.approx([t / times[0] for t in times], rel=2e-3)
    value = axis(found["latency"], False, {"": 0.001})
    p50 = [value(float(e.get("cx") or 0)) for e in of_class(found["latency"], "p50")]
    p99 = [value(float(e.get("x1") or 0)) for e in of_class(found["latency"], "p99")]
    assert p50 == pytest.approx([b["latency_s"]["p50"] for b in raw["blocks"]], rel=3e-3)
    assert p99 == pytest.approx([b["latency_s"]["p99"] for b in raw["blocks"]], rel=3e-3)


def test_the_frontier_marks_what_was_chosen_and_names_the_rest() -> None:
    raw = loaded(6)
    svg = drawings(page(raw))["frontier"]
    bytes_of, macs_of = axis(svg, False, SIZES), axis(svg, True, {"G": 1e9})
    (chosen,) = of_class(svg, "chosen")
    point = next(p for p in raw["frontier"] if p["chosen"])
    assert bytes_of(float(chosen.get("cx") or 0)) == pytest.approx(point["working_set_bytes"], rel=3e-3)
    assert macs_of(float(chosen.get("cy") or 0)) == pytest.approx(point["training_macs"], rel=3e-3)
    assert len(of_class(svg, "p-partition")) == 8
    names = {e.text for e in of_class(svg, "name")}
    assert {"bp", "checkpointing (estimate)", "per-unit", "linear", "6 blocks"} <= names


def test_the_page_says_what_was_run_where(tmp_path: Path) -> None:
    report = sample_report(2)
    raw = load_report(write_run(tmp_path / "run", report, sample_metrics(report)))
    found = read_page(page(raw)).text
    assert found[found.index("threads") + 1] == "3"  # of the process that wrote the report; 2 when the run was begun
    text = "\n".join(found)
    for part in ("1.31.1", "CPUExecutionProvider", "x86_64", "/data/bundles/resnet32", "/data/images"):
        assert part in text
    for setting, value in raw["run"]["config"].items():
        assert setting.replace("_", " ") in text
        assert value is True or value is False or value == {} or str(value) in text


# Ticks and labels


@given(
    low=st.floats(0, 1e12, allow_subnormal=False),
    span=st.floats(1e-6, 1e12),
    unit=st.sampled_from([1, 1024, MIB, 60, 0.001]),
)
def test_ticks_are_even_and_inside(low: float, span: float, unit: float) -> None:
    high = low + span
    if span < 1e-9 * high:
        return
    found = ticks(low, high, 5, unit)
    assert 2 <= len(found) <= 7
    room = 1e-5 * span + 1e-9 * high
    assert all(low - room <= value <= high + room for value in found)
    steps = [b - a for a, b in pairwise(found)]
    assert steps == pytest.approx([steps[0]] * len(steps), rel=1e-3)


def test_ticks_of_a_single_value_and_of_decades() -> None:
    assert ticks(3, 3) == [3]
    assert log_ticks(0.03, 4) == pytest.approx([0.05, 0.1, 0.2, 0.5, 1, 2])
    assert log_ticks(1e-7, 10) == pytest.approx([10.0**e for e in range(-7, 2)])


@given(st.lists(st.floats(0, 200), max_size=10))
def test_labels_keep_apart_and_in_order(wanted: list[float]) -> None:
    found = spread(wanted, 15, 0, 200)
    assert all(-1e-9 <= place <= 200 + 1e-9 for place in found)
    ordered = sorted(found)
    assert all(b - a >= 15 - 1e-9 for a, b in pairwise(ordered))
    assert [found[i] for i in sorted(range(len(wanted)), key=lambda i: wanted[i])] == ordered
