"""Where ONNX Runtime's arena puts what it is asked for: the peak of memory touched, exactly as the allocator works.

The arena is a best-fit allocator with coalescing (BFC): sizes are multiples of 256 bytes; free chunks lie in bins by
powers of two, sorted by size and then address; a request takes the first chunk that is large enough, from the smallest
bin on, and gives back what it does not need; a freed chunk joins its free neighbours. It is simulated as it is set up
in `edgelocal.runtime.arena`: one region, every remainder split off.
"""

from __future__ import annotations

from bisect import bisect_left, insort

ALIGNMENT = 256


def rounded(size: int) -> int:
    """What the arena sets aside for `size` bytes."""
    return max(1, -(-size // ALIGNMENT)) * ALIGNMENT


class Arena:
    """One region without end. `peak` is the highest address ever in use, in bytes.

    The untouched rest of a region that ends is a free chunk like any other: as long as it is no smaller than the chunk
    that is taken here, it is not taken there. `room` bytes are the least for that; in a region of so many, and at least
    `peak`, everything lies where it lies here. With `joins_rest` what is freed beside the rest becomes a part of it.
    """

    def __init__(self, *, joins_rest: bool = True) -> None:
        self._joins_rest = joins_rest
        self.peak = 0
        self.room = 0
        self.used = 0
        self._end = 0  # everything from here on is free and was never touched
        self._bins: dict[int, list[tuple[int, int]]] = {}
        self._free_at: dict[int, int] = {}  # start -> size of free chunks
        self._free_end: dict[int, int] = {}  # end -> start of free chunks
        self._taken: dict[int, int] = {}

    def copy(self) -> Arena:
        """The same moment, to go on from in another way."""
        other = Arena(joins_rest=self._joins_rest)
        other.peak, other.room, other.used, other._end = self.peak, self.room, self.used, self._end
        other._bins = {number: chunks[:] for number, chunks in self._bins.items() if chunks}
        other._free_at, other._free_end = dict(self._free_at), dict(self._free_end)
        other._taken = dict(self._taken)
        return other

    def allocate(self, size: int) -> int:
        """Set aside `size` bytes; returns the address."""
        need = rounded(size)
        start = self._take(need)
        self._taken[start] = need
        self.used += need
        self.peak = max(self.peak, start + need)
        return start

    def free(self, start: int) -> None:
        """Give back what `allocate` returned."""
        size = self._taken.pop(start)
        self.used -= size
        if start in self._free_end:
            before = self._free_end[start]
            size += self._drop(before)
            start = before
        if start + size in self._free_at:
            size += self._drop(start + size)
        if start + size == self._end and self._joins_rest:
            self._end = start
        else:
            self._add(start, size)

    def _take(self, need: int) -> int:
        for number in sorted(self._bins):
            chunks = self._bins[number]
            index = bisect_left(chunks, (need, 0))
            if index < len(chunks):
                size, start = chunks[index]
                self.room = max(self.room, self._end + size)
                self._drop(start)
                if size > need:
                    self._add(start + need, size - need)
                return start
        start = self._end
        self._end += need
        return start

    def _add(self, start: int, size: int) -> None:
        insort(self._bins.setdefault(_bin(size), []), (size, start))
        self._free_at[start] = size
        self._free_end[start + size] = start

    def _drop(self, start: int) -> int:
        size = self._free_at.pop(start)
        del self._free_end[start + size]
        chunks = self._bins[_bin(size)]
        del chunks[bisect_left(chunks, (size, start))]
        return size


def _bin(size: int) -> int:
    return min((size // ALIGNMENT).bit_length() - 1, 20)
