"""Batches one ahead: in order, one at a time, nothing kept, errors where they belong."""

from __future__ import annotations

import threading
import time
import weakref

import pytest

from edgelocal.training.feed import Feed


class Made:
    def __init__(self, item: int) -> None:
        self.item = item


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_every_item_once_in_order(ahead: bool, count: int) -> None:
    with Feed(range(count), Made, ahead=ahead) as feed:
        assert [(item, feed.take().item) for item in feed] == [(n, n) for n in range(count)]


def test_the_next_is_made_while_the_current_is_used_and_no_more() -> None:
    begun: list[int] = []
    second = threading.Event()

    def make(item: int) -> int:
        begun.append(item)
        if item == 1:
            second.set()
        return item

    with Feed(range(5), make, ahead=True) as feed:
        for item in feed:
            assert feed.take() == item
            if item == 0:
                assert second.wait(10)  # made while the first is in use
            assert len(begun) <= item + 2


@pytest.mark.parametrize("ahead", [False, True])
def test_what_was_taken_is_not_kept(ahead: bool) -> None:
    with Feed(range(3), Made, ahead=ahead) as feed:
        for _ in feed:
            made = feed.take()
            seen = weakref.ref(made)
            del made
            assert seen() is None


@pytest.mark.parametrize("ahead", [False, True])
def test_an_error_comes_with_its_own_item(ahead: bool) -> None:
    def make(item: int) -> int:
        if item == 2:
            raise ValueError("the third")
        return item

    with Feed(range(5), make, ahead=ahead) as feed:
        items = iter(feed)
        for expected in (0, 1):
            assert next(items) == expected == feed.take()
        assert next(items) == 2
        with pytest.raises(ValueError, match="the third"):
            feed.take()


def test_leaving_early_ends_the_thread() -> None:
    with Feed(range(5), Made, ahead=True) as feed:
        next(iter(feed))
    assert not [t for t in threading.enumerate() if t.name.startswith("edgelocal-feed")]


def test_who_interrupts_does_not_wait_for_a_batch() -> None:
    begun, done = threading.Event(), threading.Event()

    def make(item: int) -> int:
        if item == 1:
            begun.set()
            done.wait(30)
        return item

    def interrupted() -> None:
        with Feed(range(3), make, ahead=True) as feed:
            for _ in feed:
                feed.take()
                begun.wait(10)
                raise KeyboardInterrupt

    started = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert time.monotonic() - started < 10
    done.set()
