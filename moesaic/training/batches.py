"""Batches drawn ahead of the model by a thread, each with the data cursor that follows it.

The cursor travels with the batch because the thread runs ahead: what a saved state must remember is
where the *model* is, not where the thread is. One prefetch covers a stretch of updates in which the
domain weights do not change; the next stretch starts from the cursor of the last batch used.

    ids_ABT   token ids of one update: A forward passes of B sequences of T tokens
"""

from __future__ import annotations

import queue
import threading
from collections import Counter
from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from moesaic.core.errors import MoesaicError
from moesaic.data import Block


class Stream(Protocol):
    """What the loop needs of `moesaic.data`'s mixture: blocks without end and a cursor."""

    def next(self) -> Block:
        """Return the next block."""

    def state_dict(self) -> dict[str, Any]:
        """Return the cursor as JSON."""


@dataclass(frozen=True)
class Batch:
    """The data of one update; `packed` holds positions and labels, of conversations only."""

    ids_ABT: torch.Tensor
    packed: dict[str, torch.Tensor]
    domains: Counter[str]
    cursor: dict[str, Any]


def draw(stream: Stream, *, accumulation: int, size: int, length: int, pin: bool) -> Batch:
    """Draw the blocks of one update. Raises MoesaicError for a block of another length."""
    blocks = [stream.next() for _ in range(accumulation * size)]
    for block in blocks:
        if len(block.ids) != length:
            raise MoesaicError(
                f"the data stream gave a block of {len(block.ids)} tokens, not {length}."
            )

    def stacked(rows: list[np.ndarray]) -> torch.Tensor:
        found_ABT = torch.from_numpy(np.stack(rows)).view(accumulation, size, length)
        return found_ABT.pin_memory() if pin else found_ABT

    labels = [block.labels for block in blocks if block.labels is not None]
    packed = {}
    if labels:
        packed["position_ABT"] = stacked([block.position for block in blocks])
        packed["labels_ABT"] = stacked(labels)
    domains = Counter(block.domain for block in blocks)
    return Batch(stacked([block.ids for block in blocks]), packed, domains, stream.state_dict())


def prefetch(
    stream: Stream,
    *,
    updates: int,
    accumulation: int,
    size: int,
    length: int,
    pin: bool,
    depth: int = 4,
) -> Generator[Batch]:
    """Yield the batches of `updates` updates, drawn by a thread that stays at most `depth` ahead.

    An error in the thread is raised here. The thread ends with the iterator.
    """
    ready: queue.Queue[Batch | BaseException] = queue.Queue(maxsize=depth)
    stop = threading.Event()

    def put(item: Batch | BaseException) -> None:
        while not stop.is_set():
            try:
                return ready.put(item, timeout=0.1)
            except queue.Full:
                continue

    def work() -> None:
        try:
            for _ in range(updates):
                if stop.is_set():
                    return
                put(draw(stream, accumulation=accumulation, size=size, length=length, pin=pin))
        except BaseException as error:  # carried over to the thread that iterates
            put(error)

    thread = threading.Thread(target=work, name="moesaic-prefetch", daemon=True)
    thread.start()
    try:
        for _ in range(updates):
            item = ready.get()
            if isinstance(item, BaseException):
                raise item
            yield item
    finally:
        stop.set()
        thread.join()
