"""The network's own code as a guest in our process: where it prints, how it fails, that it cannot end the process."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TextIO

from edgelocal.errors import EdgelocalError, ExportError

_LONGEST = 300  # characters of an error of PyTorch's, which may carry a trace of its C++ side


@contextlib.contextmanager
def guest(reference: str) -> Iterator[None]:
    """For as long as code of the network `reference` may run, what is printed goes to stderr: stdout is for results.

    This holds for the whole process, its other threads included. KeyboardInterrupt passes as it is.

    Raises:
        ExportError: the code called sys.exit(), which would look as if the export had ended well.
    """
    with contextlib.redirect_stdout(sys.stderr), _descriptor_to_stderr():
        try:
            yield
        except SystemExit as error:
            raise ExportError(
                f"{reference} called sys.exit({error.code!r}); code that is imported must not end the process: put "
                'what runs it as a script under  if __name__ == "__main__":'
            ) from error


@contextlib.contextmanager
def network_errors(where: str) -> Iterator[None]:
    """Code inside is the network's, or PyTorch's at its request, and may fail in any way.

    Raises:
        ExportError: it did; the message begins with `where`. Errors of our own pass as they are.
    """
    try:
        yield
    except EdgelocalError:
        raise
    except Exception as error:
        text = " ".join(str(error).split())[:_LONGEST]
        raise ExportError(f"{where} failed with {type(error).__name__}: {text}") from error


@contextlib.contextmanager
def _descriptor_to_stderr() -> Iterator[None]:
    """Descriptor 1 leads where 2 leads, for code that writes past sys.stdout."""
    if sys.__stdout__ is None or sys.__stderr__ is None:  # the process was started without them
        yield
        return
    _flush(sys.__stdout__)
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        _flush(sys.__stdout__)
        os.dup2(kept, 1)
        os.close(kept)


def _flush(stream: TextIO | None) -> None:
    """What is in the buffer goes where the descriptor leads now."""
    with contextlib.suppress(OSError, ValueError):  # full or closed: whoever prints the result will say so
        if stream is not None:
            stream.flush()
