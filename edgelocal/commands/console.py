"""Where commands tell what they are doing: stderr, for as long as somebody reads it."""

from __future__ import annotations

import sys
from typing import IO, Any

from rich.console import Console


class _Tolerant:
    """A text stream that falls silent when it can no longer be written: a full disk or a closed pipe behind a log must
    not end hours of training."""

    def __init__(self, stream: IO[str]) -> None:
        self._stream = stream
        self._silent = False

    def write(self, text: str) -> int:
        """As a text stream's."""
        if not self._silent:
            try:
                return self._stream.write(text)
            except (OSError, ValueError):
                self._silent = True
        return len(text)

    def flush(self) -> None:
        """As a text stream's."""
        if not self._silent:
            try:
                self._stream.flush()
            except (OSError, ValueError):
                self._silent = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def error_console() -> Console:
    """A console on stderr that prints text as it is and never fails."""
    stream: Any = _Tolerant(sys.stderr)
    return Console(file=stream, highlight=False, markup=False)
