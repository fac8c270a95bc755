"""The batches of an epoch in order; for blocks on a device the next one is made while the current one computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

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
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="edgelocal-feed") if ahead else None
        self._current: Callable[[], Made] | None = None

    def __enter__(self) -> Feed[Item, Made]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._current = None
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)

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
        if self._pool is None:
            return lambda: self._make(item)
        future: Future[Made] = self._pool.submit(self._make, item)
        return future.result
