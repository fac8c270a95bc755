"""What decoding costs a process that has warmed up its decoders, each time in a process of its own."""

from __future__ import annotations

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from device_tests.device.runs import ENVIRONMENT

Image = pytest.importorskip("PIL.Image")

SIDE = 64
KINDS: dict[str, dict[str, Any]] = {
    "bmp": {},
    "jpeg": {},
    "jpeg, progressive": {"progressive": True},
    "png": {},
    "png, palette": {"mode": "P"},
    "ppm": {},
    "webp": {},
    "webp, lossless": {"lossless": True},
    "webp, transparent": {"mode": "RGBA"},
}
DECODE = f"""
import sys
from edgelocal.machine.budget import PeakMeter
from edgelocal.data.formats import images
from edgelocal.runtime.arena import give_back, start
start()
if sys.argv[2] == "warm":
    images.warm_up()
data = open(sys.argv[1], "rb").read()
give_back()
with PeakMeter() as meter:
    for _ in range(3):
        images.decode(data, (3, {SIDE}, {SIDE}), "x")
print(meter.growth_bytes)
"""


def growth(path: Path, state: str) -> int:
    line = [sys.executable, "-c", DECODE, str(path), state]
    done = subprocess.run(line, capture_output=True, text=True, env=ENVIRONMENT, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def image_file(path: Path, kind: str) -> Path:
    options = dict(KINDS[kind])
    pixels = np.random.default_rng(3).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).convert(options.pop("mode", "RGB")).save(stream, kind.partition(",")[0], **options)
    path.write_bytes(stream.getvalue())
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_the_first_images_add_no_more_to_a_warm_process_than_the_pipeline_counts(tmp_path: Path, kind: str) -> None:
    """24 bytes a pixel, two copies of the file, and 256 KiB; measured 56 to 156 KiB."""
    path = image_file(tmp_path / "x", kind)
    assert growth(path, "warm") <= 24 * SIDE**2 + 2 * path.stat().st_size + (256 << 10)


def test_without_warming_up_they_add_megabytes(tmp_path: Path) -> None:
    assert growth(image_file(tmp_path / "x", "webp"), "cold") > 2 << 20
