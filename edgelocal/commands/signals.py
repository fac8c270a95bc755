"""SIGINT and SIGTERM as a wish that is fulfilled between two steps, not in the middle of one."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType

NOTICE = b"\nedgelocal: stopping after this step; a second signal stops at once\n"


@contextlib.contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """The event is set by the first SIGINT or SIGTERM; a second one ends the process as usual.

    Outside the main thread, where Python delivers no signals, the event is never set.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def handle(number: int, frame: FrameType | None) -> None:
        stop.set()
        for each, handler in before.items():
            signal.signal(each, handler)
        with contextlib.suppress(OSError, ValueError):  # nobody may be reading
            os.write(sys.__stderr__.fileno() if sys.__stderr__ else 2, NOTICE)

    for number in before:
        signal.signal(number, handle)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
