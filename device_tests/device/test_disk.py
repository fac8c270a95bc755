"""What a user is told when the system refuses, and what is read as a file at all."""

from __future__ import annotations

import errno
import os
import socket
from pathlib import Path

import pytest

from edgelocal.errors import StorageError
from edgelocal.storage.disk import DISK, NotRegularError, is_there, open_regular, read_regular, storage_errors

ADVICE = {
    errno.ENOSPC: "make room or choose another folder",
    errno.EDQUOT: "make room or choose another folder",
    errno.EFBIG: "allow larger files",
    errno.EIO: "check the medium",
    errno.EROFS: "choose a folder that can be written",
    errno.EACCES: "check who may write there",
    errno.EPERM: "check who may write there",
    errno.ENOENT: "choose another folder",
    errno.EEXIST: "move away what is there",
    errno.ENOTDIR: "move away what is there",
    errno.ELOOP: "remove the link",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EBUSY: "choose another folder",
}


@pytest.mark.parametrize("number", ADVICE, ids=errno.errorcode.get)
def test_the_advice_fits_the_reason(tmp_path: Path, number: int) -> None:
    with pytest.raises(StorageError) as caught, storage_errors(tmp_path / "x", DISK, "writing"):
        raise OSError(number, os.strerror(number))
    message = str(caught.value)
    assert f"{os.strerror(number)} (writing, " in message
    assert f"is whole: {ADVICE[number]}" in message
    assert message.endswith(", then start again")
    assert ("make room" in message) == (number in (errno.ENOSPC, errno.EDQUOT))


def test_only_regular_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    os.mkfifo(tmp_path / "fifo")
    assert read_regular(tmp_path / "file") == b"0123456789"
    assert read_regular(tmp_path / "file", 4) == b"0123"
    for name, why in (("folder", "it is not a regular file"), ("fifo", "it is not a"), ("link", "it is a link")):
        with pytest.raises(NotRegularError, match=why):
            read_regular(tmp_path / name)
    with pytest.raises(NotRegularError, match="it is a link"):
        DISK.open_regular(tmp_path / "zeros")
    with pytest.raises(NotRegularError):
        open_regular(Path("/dev/zero"))
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "nothing")


def test_refusing_leaves_no_descriptor_open(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    before = os.open(tmp_path, os.O_RDONLY)
    os.close(before)
    for _ in range(5):
        with pytest.raises(NotRegularError):
            open_regular(tmp_path / "fifo")
    after = os.open(tmp_path, os.O_RDONLY)
    os.close(after)
    assert after == before


def test_a_socket_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)  # the name of a socket may have 108 bytes
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
        with pytest.raises(NotRegularError, match="it is a socket"):
            open_regular(Path("socket"))


def test_a_link_that_leads_nowhere_is_there(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("nowhere")
    assert is_there(tmp_path / "link")
    assert not is_there(tmp_path / "nothing")
    with pytest.raises(OSError, match="File name too long"):
        is_there(tmp_path / ("n" * 300))
