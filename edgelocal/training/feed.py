"""The batches of an epoch in order; for blocks on a device the next one is made while the current one computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Thread
from types import TracebackType
from typing import Any, Generic, TypeVar

Item = TypeVar("Item")
Made = TypeVar("Made")


class Feed(Generic[Item, Made]):
    """Iterates over `items`; `take` gives what `make` makes of the current one, and keeps nothing of it.

        with Feed(items, make, ahead=True) as feed:
            for item in feed:
                use(feed.take())

    With `ahead` a thread makes the next one meanwhile, and only one at a time. What `make` raises, `take` raises for
    the item it was raised for; the items before it are whole.
    """

    def __init__(self, items: Iterable[Item], make: Callable[[Item], Made], *, ahead: bool) -> None:
        self._items = iter(items)
        self._make = make
        self._worker = _Worker() if ahead else None
        self._current: Callable[[], Made] | None = None

    def __enter__(self) -> Feed[Item, Made]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._current = None
        if self._worker is not None:
            # Who interrupts does not wait for a batch, which may take long.
            self._worker.end(wait=error is None or isinstance(error, Exception))

    def __iter__(self) -> Iterator[Item]:
        waiting: tuple[Item, Callable[[], Made]] | None = None
        for item in self._items:
            following = item, self._begin(item)
            if waiting is not None:
                here, self._current = waiting
                del waiting  # or what was made would live as long as its turn
                yield here
            waiting = following
            del following
        if waiting is not None:
            here, self._current = waiting
            del waiting
            yield here

    def take(self) -> Made:
        """What was made of the current item; once."""
        assert self._current is not None, "one is taken for each item, inside of the loop"
        make, self._current = self._current, None
        return make()

    def _begin(self, item: Item) -> Callable[[], Made]:
        """Start making it, or put it off until it is taken."""
        if self._worker is None:
            return lambda: self._make(item)
        return self._worker.submit(lambda: self._make(item)).result


class _Worker:
    """A thread that does one thing after the other. A process does not wait for it when it ends."""

    def __init__(self) -> None:
        self._tasks: SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = SimpleQueue()
        self._ended = False
        self._thread = Thread(target=self._work, name="edgelocal-feed", daemon=True)
        self._thread.start()

    def submit(self, task: Callable[[], Made]) -> Future[Made]:
        """Do it after what was given before."""
        future: Future[Made] = Future()
        self._tasks.put((future, task))
        return future

    def end(self, *, wait: bool) -> None:
        """Begin nothing more; `wait` for what is being done."""
        self._ended = True
        self._tasks.put(None)
        if wait:
            self._thread.join()

    def _work(self) -> None:
        while (given := self._tasks.get()) is not None and not self._ended:
            future, task = given
            try:
                future.set_result(task())
            except BaseException as error:  # noqa: BLE001 (raised where the result is taken)
                future.set_exception(error)
            del given, future, task  # what was made lives as long as who takes it wants
