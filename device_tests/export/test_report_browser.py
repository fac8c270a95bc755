"""The page of `edgelocal report` in a real browser: every chart draws, nothing is cut or covered, on desk and phone.

The page is drawn in a frame, and a script around it writes down where everything came to lie; the page has none.
"""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from device_tests.device.runs import answer
from device_tests.device.sample_report import loaded
from device_tests.export.test_request import request as requested
from edgelocal.exporters.pack import export_bundle
from edgelocal.exporters.request import ExportRequest
from edgelocal.machine.profiles import idle_process_bytes
from edgelocal.report.load import load_report
from edgelocal.report.model import parse_report
from edgelocal.report.page import render_page

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next((path for path in map(shutil.which, NAMES) if path), None)
CHARTS = ("memory", "timeline", "loss", "accuracy", "time", "latency", "frontier")
HEIGHT = 9000  # the whole page at once, also on a phone
SCHEMES = {"dark": "--blink-settings=preferredColorScheme=0", "light": "--blink-settings=preferredColorScheme=1"}
CARD = {"light": (255, 255, 255), "dark": (24, 29, 35)}
TOLERANCE = 1.0  # pixels
MIB, BATCH = 1 << 20, 16

# A frame of the width of the device: a window of a browser without a head is at least 500 pixels wide.
FRAME = """<!DOCTYPE html><meta charset="utf-8"><body style="margin:0">
<iframe style="border:0;display:block" width="WIDTH" height="HEIGHT" srcdoc="PAGE"></iframe>
<pre id="measured" hidden></pre><script>
const box = e => { const r = e.getBoundingClientRect(); return [r.left, r.top, r.right, r.bottom]; };
const all = (e, kinds) => [...e.querySelectorAll(kinds)];
const overflows = (e, style) => e.scrollWidth > e.clientWidth + 1 && style.display !== 'inline';
onload = () => {
  const page = document.querySelector('iframe').contentDocument, charts = {};
  for (const figure of all(page, 'figure')) {
    const svg = figure.querySelector('svg'), shapes = 'svg :is(rect, polyline, polygon, circle, line)';
    charts[figure.id.slice(6)] = {card: box(figure), svg: svg && box(svg),
      shapes: all(figure, shapes).map(e => [e.getAttribute('class'), box(e)]),
      texts: all(figure, 'svg text').map(e => [e.textContent, box(e)])};
  }
  const boxes = all(page, 'main *').filter(e => !e.closest('svg, .scroll, .meter'));
  const wide = boxes.filter(e => overflows(e, getComputedStyle(e))).map(e => e.outerHTML.slice(0, 80));
  document.getElementById('measured').textContent = JSON.stringify({charts, wide,
    page: page.documentElement.scrollWidth, height: page.body.scrollHeight});
};
</script>
"""

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Drawn:
    """A page as the browser drew it."""

    charts: dict[str, Any]
    raw: dict[str, Any]
    image: Image.Image
    measured: dict[str, Any]


def browse(folder: Path, raw: dict[str, Any], width: int, scheme: str) -> Drawn:
    """Draw the page of a report in a window of `width` pixels."""
    if BROWSER is None:
        if os.environ.get("EDGELOCAL_REQUIRE_BROWSER"):
            pytest.fail("no Chromium was found, and EDGELOCAL_REQUIRE_BROWSER is set: install chromium")
        pytest.skip(f"none of {', '.join(NAMES)} is installed")
    page = folder / "page.html"
    content = html.escape(render_page(parse_report(raw)))
    page.write_text(FRAME.replace("WIDTH", str(width)).replace("HEIGHT", str(HEIGHT)).replace("PAGE", content))
    options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--force-device-scale-factor=1"]
    options += [f"--user-data-dir={folder / 'profile'}", f"--window-size=1300,{HEIGHT}", SCHEMES[scheme]]
    line = [BROWSER, *options, "--dump-dom", f"--screenshot={folder / 'page.png'}", page.as_uri()]
    done = subprocess.run(line, capture_output=True, text=True, timeout=120, check=True)
    found = re.search(r'<pre id="measured" hidden="">(.*?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr
    measured = json.loads(html.unescape(found[1]))
    assert measured["height"] <= HEIGHT
    image = Image.open(folder / "page.png").convert("RGB").crop((0, 0, width, HEIGHT))
    return Drawn(measured["charts"], raw, image, measured)


CASES = [(1, 1280, "light"), (4, 390, "dark"), (14, 1280, "dark"), (14, 390, "light"), (54, 1280, "light")]
CASES += [(54, 360, "light"), (0, 1280, "light"), (0, 390, "dark")]  # 0: a run that took place


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(map(str, case)))
def drawn(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Drawn:
    blocks, width, scheme = request.param
    if blocks:
        raw = loaded(blocks, "sequential" if blocks == 14 else "interleaved")
    else:
        raw = request.getfixturevalue("trained")
    return browse(tmp_path_factory.mktemp("page"), raw, width, scheme)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The report of a run: ResNet-8, its partition chosen for a budget, two epochs of images that tell their class."""
    folder = tmp_path_factory.mktemp("run")
    budget = idle_process_bytes(0) + 24 * MIB
    asked: ExportRequest = requested(blocks="auto", rule="linear", batch=BATCH)
    export_bundle(replace(asked, budget_bytes=budget), folder / "bundle", lambda text: None)
    labels = np.arange(6 * BATCH) % 10
    noise = np.random.default_rng(0).integers(0, 40, (len(labels), 3, 32, 32))
    images = (noise + 20 * labels[:, None, None, None]).astype(np.uint8)
    kept = {"x_train": images[BATCH:], "y_train": labels[BATCH:], "x_test": images[:BATCH], "y_test": labels[:BATCH]}
    np.savez(folder / "data.npz", **kept)
    given = (
        "--out",
        folder / "run",
        "--epochs",
        2,
        "--batch",
        BATCH,
        "--no-augment",
        "--memory-budget",
        budget + 64 * MIB,
    )
    answer("train", folder / "bundle", "--data", folder / "data.npz", *given)
    raw = load_report(folder / "run")
    assert len(raw["blocks"]) > 1
    return raw


def test_every_chart_draws_what_the_run_has(drawn: Drawn) -> None:
    """Shapes of the expected number that take up room; then pixels that differ from the card's colour."""
    count = len(drawn.raw["blocks"])
    expected = {
        "memory": ("measured", count),
        "timeline": ("series", 1),
        "loss": ("curve", count),
        "time": ("bar", count),
    }
    expected |= {"accuracy": ("curve", count), "latency": ("p50", count), "frontier": ("chosen", 1)}
    for name in CHARTS:
        kind, number = expected[name]
        boxes = [box for shape, box in drawn.charts[name]["shapes"] if kind in shape.split()]
        assert len(boxes) == number, name
        assert all(right - left > 1 and bottom - top > 1 for left, top, right, bottom in boxes), name
    background = drawn.image.getpixel((drawn.image.width - 2, 2))
    dark = sum(background[:3]) < 3 * 128  # type: ignore[index]
    card = CARD["dark" if dark else "light"]
    for name in CHARTS:
        region = drawn.image.crop(tuple(round(side) for side in drawn.charts[name]["svg"]))
        colours = region.getcolors(region.width * region.height) or []
        inked = sum(n for n, colour in colours if max(abs(a - b) for a, b in zip(colour, card, strict=True)) > 24)  # type: ignore[arg-type]
        assert inked > 0.01 * region.width * region.height, name
        vivid = sum(n for n, colour in colours if max(colour) - min(colour) > 60)  # type: ignore[arg-type, type-var, operator]
        assert vivid > 60, f"{name} has no colours"


def test_the_page_is_no_wider_than_the_window(drawn: Drawn) -> None:
    assert drawn.measured["page"] <= drawn.image.width
    assert drawn.measured["wide"] == []


def test_nothing_is_cut_off(drawn: Drawn) -> None:
    for name, chart in drawn.charts.items():
        for what, box in chart["texts"] + chart["shapes"]:
            assert inside(box, chart["card"]), f"{name}: {what} at {box} is outside {chart['card']}"
            assert box[1] >= chart["svg"][1] - 4, f"{name}: {what} is above its drawing"
            assert box[3] <= chart["svg"][3] + TOLERANCE, f"{name}: {what} is below its drawing"


def test_no_text_covers_another(drawn: Drawn) -> None:
    """Boxes of lines of text have room above and below the letters: half a line may overlap, letters may not."""
    for name, chart in drawn.charts.items():
        for (one, a), (other, b) in combinations(chart["texts"], 2):
            a, b = letters(a), letters(b)
            apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
            assert apart, f"{name}: {one!r} {a} and {other!r} {b}"


def test_text_can_be_read_on_a_phone(drawn: Drawn) -> None:
    for name, chart in drawn.charts.items():
        heights = [bottom - top for _, (_, top, _, bottom) in chart["texts"]]
        assert min(heights) >= 12, name


def test_a_run_with_nothing_recorded_says_so_in_every_place(tmp_path: Path) -> None:
    found = browse(tmp_path, {"blocks": [{"name": "00"}]}, 390, "light")
    assert set(found.charts) == set(CHARTS)
    for name, chart in found.charts.items():
        assert chart["svg"] is None, name
        left, top, right, bottom = chart["card"]
        assert right - left > 300, name
        assert bottom - top > 80, name


def inside(box: Box, card: Box) -> bool:
    sides = zip(box[:2], card[:2], strict=True), zip(box[2:], card[2:], strict=True)
    return all(a >= b - TOLERANCE for a, b in sides[0]) and all(a <= b + TOLERANCE for a, b in sides[1])


def letters(box: Box) -> Box:
    left, top, right, bottom = box
    room = 0.2 * (bottom - top)
    return left, top + room, right, bottom - room
