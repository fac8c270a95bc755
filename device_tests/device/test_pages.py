"""Page files: what was written comes back, and what is left of them is removed without a word."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgelocal.bundle.spec import TensorSpec
from edgelocal.errors import StorageError
from edgelocal.runtime.pages import PREFIX, PageFile, clear_pages

SPECS = (TensorSpec("param/w", (2, 3), "float32"), TensorSpec("buf/n", (), "int64"))


def test_tensors_come_back_and_are_counted(tmp_path: Path) -> None:
    tensors = {"param/w": np.arange(6, dtype=np.float32).reshape(2, 3), "buf/n": np.array(7)}
    file = PageFile(tmp_path / "cache" / f"{PREFIX}00", SPECS)
    file.write(tensors)
    found = file.read()
    assert found.keys() == tensors.keys()
    for name, array in tensors.items():
        assert (found[name].dtype, found[name].tolist()) == (array.dtype, array.tolist())
    assert file.moved_bytes == 2 * (6 * 4 + 8)
    file.path.write_bytes(file.path.read_bytes()[:-1])
    with pytest.raises(StorageError, match="ends within buf/n"):
        file.read()


def test_what_is_left_goes_and_the_folder_with_it(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    for name in (f"{PREFIX}00", f"{PREFIX}01"):
        (cache / name).write_bytes(b"x")
    clear_pages(cache)
    assert not cache.exists()
    clear_pages(cache)  # nothing is there to remove


def test_what_is_not_a_page_stays(tmp_path: Path) -> None:
    for name in (f"{PREFIX}00", "outputs-1"):
        (tmp_path / name).write_bytes(b"x")
    clear_pages(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["outputs-1"]


def test_a_link_to_another_medium_stays(tmp_path: Path) -> None:
    elsewhere, cache = tmp_path / "elsewhere", tmp_path / "cache"
    elsewhere.mkdir()
    (elsewhere / f"{PREFIX}00").write_bytes(b"x")
    cache.symlink_to(elsewhere)
    clear_pages(cache)
    assert cache.is_symlink()
    assert list(elsewhere.iterdir()) == []


def test_what_cannot_be_removed_is_no_error(tmp_path: Path) -> None:
    """A run that ended must not end otherwise because of it."""
    (tmp_path / f"{PREFIX}00").mkdir()
    (tmp_path / f"{PREFIX}00" / "inside").write_bytes(b"x")
    clear_pages(tmp_path)
    assert (tmp_path / f"{PREFIX}00" / "inside").exists()
