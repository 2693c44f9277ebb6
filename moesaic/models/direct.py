"""Move large files past the page cache: from disk into reused memory and back.

A copy through the page cache costs a page of fresh memory for every page of file, which on a
virtual machine can take longer than the disk does; a conversion reads and writes every byte once,
so caching it helps nobody. Where the file system refuses direct access (tmpfs, some network disks)
the ordinary way is taken. Offsets, lengths and memory of direct access are multiples of BLOCK.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

BLOCK = 4096
_DIRECT = getattr(os, "O_DIRECT", 0)
_AT_ONCE = 64 << 20

Bytes = NDArray[np.uint8]


class Arena:
    """Page-aligned memory that is reused; it grows to the largest request."""

    def __init__(self, size: int = 0) -> None:
        self._bytes: Bytes = np.empty(0, np.uint8)
        self.reserve(size)

    def reserve(self, size: int) -> Bytes:
        """Return at least `size` bytes; earlier contents are lost when it has to grow."""
        if len(self._bytes) < size:
            self._bytes = np.empty(0, np.uint8)  # the old memory goes before the new one comes
            self._bytes = np.frombuffer(mmap.mmap(-1, _up(size)), np.uint8)
        return self._bytes


class DirectReader:
    """Read ranges of one file into given memory, past the page cache unless the file is in it."""

    def __init__(self, path: Path) -> None:
        self._plain = os.open(path, os.O_RDONLY)
        self._size = os.fstat(self._plain).st_size
        self._direct = -1
        if _DIRECT and not self._cached():
            with contextlib.suppress(OSError):
                self._direct = os.open(path, os.O_RDONLY | _DIRECT)

    @staticmethod
    def room(size: int) -> int:
        """Bytes of memory that reading `size` bytes from anywhere may need."""
        return _up(size) + BLOCK

    def read(self, offset: int, size: int, into: Bytes) -> Bytes:
        """Read a range into block-aligned memory of at least `room(size)`; return the view of it.

        Raises OSError, also when the file ends before the range does.
        """
        start = offset // BLOCK * BLOCK
        end = offset + size
        filled = start
        while filled < end:
            # A read that ends the file is short; anything else continues where it stopped.
            part: Any = into[filled - start : min(_up(end), filled + _AT_ONCE) - start]
            got = self._read(part, filled)
            if not got:
                raise OSError(errno.EIO, "the file ended while it was being read")
            filled += got
        return into[offset - start : end - start]

    def close(self) -> None:
        """Close the file."""
        for descriptor in (self._plain, self._direct):
            if descriptor >= 0:
                os.close(descriptor)
        self._plain = self._direct = -1

    def _read(self, part: Any, offset: int) -> int:
        if self._direct >= 0 and offset % BLOCK == 0:
            try:
                return os.preadv(self._direct, [part], offset)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                os.close(self._direct)
                self._direct = -1
        return os.preadv(self._plain, [part], offset)

    def _cached(self) -> bool:
        """Whether three sample pages are in the page cache: then the rest most likely is."""
        if not hasattr(os, "RWF_NOWAIT"):
            return False
        places = {0, self._size // 2, max(0, self._size - BLOCK)}
        try:
            return all(
                os.preadv(self._plain, [bytearray(1)], place, os.RWF_NOWAIT) for place in places
            )
        except OSError:
            return False

    def __del__(self) -> None:
        self.close()


class DirectWriter:
    """Write one file, mostly from front to back, past the page cache where that is possible.

    Consecutive writes are gathered into blocks; a write elsewhere first puts these down.
    """

    def __init__(self, path: Path, size: int) -> None:
        self._plain = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        self._direct = -1
        try:
            os.ftruncate(self._plain, size)
            if _DIRECT and size >= BLOCK:
                with contextlib.suppress(OSError):
                    self._direct = os.open(path, os.O_WRONLY | _DIRECT)
        except BaseException:
            self.close()
            raise
        self._arena = Arena(min(_up(size) + BLOCK, _AT_ONCE // 4))
        self._base = 0
        """File offset of the first byte of the arena; a multiple of BLOCK."""
        self._start = self._end = 0
        """The gathered range of the file."""

    def write(self, offset: int, data: Bytes) -> None:
        """Write bytes at an offset; they are gathered, so only `sync` makes sure of them."""
        if offset != self._end:
            self.flush()
            self._base = offset // BLOCK * BLOCK
            self._start = self._end = offset
        memory = self._arena.reserve(0)
        taken = 0
        while taken < len(data):
            place = self._end - self._base
            count = min(len(memory) - place, len(data) - taken)
            memory[place : place + count] = data[taken : taken + count]
            taken += count
            self._end += count
            if self._end - self._base == len(memory):
                self.flush()

    def flush(self) -> None:
        """Put down what was gathered."""
        first, last = min(_up(self._start), self._end), max(_down(self._end), self._start)
        if self._direct < 0 or first >= last:
            self._put(self._plain, self._start, self._end)
        else:
            # Blocks go directly, what sticks out at either end goes through the cache.
            self._put(self._plain, self._start, first)
            self._put(self._direct, first, last)
            self._put(self._plain, last, self._end)
        self._base, self._start = _down(self._end), self._end

    def sync(self) -> None:
        """Put down everything and wait until the disk has it."""
        self.flush()
        os.fsync(self._plain)

    def close(self) -> None:
        """Close the file without waiting."""
        for descriptor in (self._plain, self._direct):
            if descriptor >= 0:
                os.close(descriptor)
        self._plain = self._direct = -1

    def _put(self, descriptor: int, start: int, end: int) -> None:
        memory = self._arena.reserve(0)
        while start < end:
            part: Any = memory[
                start - self._base : min(end - self._base, start - self._base + _AT_ONCE)
            ]
            try:
                done = os.pwrite(descriptor, part, start)
            except OSError as error:
                if error.errno != errno.EINVAL or descriptor == self._plain:
                    raise
                done = 0
            start += done
            if not done or start % BLOCK:
                descriptor = self._plain  # a refused or short direct write ends in the plain way


def _up(number: int) -> int:
    return -(-number // BLOCK) * BLOCK


def _down(number: int) -> int:
    return number // BLOCK * BLOCK
