"""Where offloaded experts live: all of them in host memory, some in slots on the device.

A bank is one block of slots with the layout of an experts module, so that any experts code runs on
it with slots in place of experts. Experts travel on a side stream of a GPU, from page-locked
memory; on other devices a copy is done when the call returns.

An expert of any layer has one number, its key. Notation: C slots.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from moesaic.routing.live import LiveCache

__all__ = ["Bank", "Lane", "Shelf", "Staging", "page_lock"]

Tensors = Mapping[str, torch.Tensor]

MOST_SLOTS = 512
"""Of one bank: grouped matrix products take fewer than 1,024 groups."""
_TRIED = 32  # guesses before they are judged
_LOCKED_FROM = 1 << 20  # bytes; smaller tensors share pages with others, and are copied


class Lane:
    """The way from the host to one device."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def send(
        self, to: Iterable[torch.Tensor], given: Iterable[torch.Tensor], *, after: Any
    ) -> torch.cuda.Event | None:
        """Begin to copy, once `after` has happened; return the event of its end."""
        pairs = zip(to, given, strict=True)
        if self.stream is None:
            for target, source in pairs:
                target.copy_(source)
            return None
        with torch.cuda.stream(self.stream):
            if after is not None:
                self.stream.wait_event(after)
            for target, source in pairs:
                target.copy_(source, non_blocking=True)
            return self.stream.record_event()

    def wait(self, event: Any) -> None:
        """Let what is computed from now on wait for `event`."""
        if event is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def mark(self) -> torch.cuda.Event | None:
        """Return the event of everything computed so far."""
        if self.stream is None:
            return None
        return torch.cuda.current_stream(self.device).record_event()

    def finish(self) -> None:
        """Wait until nothing travels and nothing computes."""
        if self.stream is not None:
            torch.cuda.synchronize(self.device)


class Bank:
    """`size` slots with the tensors of an experts module, on one device."""

    def __init__(self, like: Tensors, size: int, device: torch.device) -> None:
        with torch.inference_mode(False):
            self.tensors = {
                name: nn.Parameter(
                    torch.zeros((size, *tensor.shape[1:]), dtype=tensor.dtype, device=device),
                    requires_grad=False,
                )
                for name, tensor in like.items()
            }
        self.size = size
        self.keys: list[int | None] = [None] * size
        self.arrived: list[Any] = [None] * size
        """Event of each slot's copy, None once the computing stream waits for it."""
        self.read: Any = None
        """Event of the last computation that read slots, or wrote them."""

    @property
    def nbytes(self) -> int:
        """Bytes of all slots."""
        return sum(tensor.nbytes for tensor in self.tensors.values())

    def slot(self, number: int) -> list[torch.Tensor]:
        """Return the tensors of one slot."""
        return [tensor.data[number] for tensor in self.tensors.values()]

    def settle(self, numbers: Iterable[int], lane: Lane) -> None:
        """Let what is computed from now on wait for the copies to some slots."""
        for number in numbers:
            lane.wait(self.arrived[number])
            self.arrived[number] = None


class Staging:
    """A few slots of all layers together: for guesses, and for experts that pass through."""

    def __init__(self, bank: Bank) -> None:
        self.bank = bank
        self.where: dict[int, int] = {}
        self.guessed: set[int] = set()

    def put(self, key: int, host: list[torch.Tensor], lane: Lane, *, keep: Iterable[int]) -> bool:
        """Begin to bring an expert to a slot that holds none of `keep`; False if there is none."""
        bank = self.bank
        kept = set(keep)
        free = (n for n, held in enumerate(bank.keys) if held is None or held not in kept)
        number = next(free, None)
        if number is None:
            return False
        held = bank.keys[number]
        if held is not None:
            del self.where[held]
            self.guessed.discard(held)
        bank.arrived[number] = lane.send(bank.slot(number), host, after=bank.read)
        bank.keys[number] = key
        self.where[key] = number
        return True


class Shelf:
    """The slots of one cache: after every call they hold what its policy holds.

    `host` returns the tensors of a key in host memory; `staging` is needed where the cache is
    smaller than all experts.
    """

    def __init__(
        self, live: LiveCache, banks: list[Bank], staging: Staging | None, lane: Lane, host: Any
    ) -> None:
        self.live = live
        self.banks = banks
        self.staging = staging
        self.lane = lane
        self.host = host
        self.where: dict[int, tuple[int, int]] = {}
        self.loads = 0
        """Experts that travelled because they were asked for."""
        self.guesses = 0
        """Experts that set out because they were guessed."""
        self.used_guesses = 0
        """Experts asked for that were on their way already."""

    @property
    def guesses_pay(self) -> bool:
        """False once most guesses have been wrong: each costs the time of a transfer."""
        return self.guesses < _TRIED or 2 * self.used_guesses >= self.guesses

    def preload(self) -> None:
        """Bring what the policy holds from the start."""
        self._fill(self.live.resident_E.nonzero()[0].tolist(), ())
        self.forget()

    def clear(self) -> None:
        """Empty the slots."""
        self.where.clear()
        for bank in self.banks:
            bank.keys = [None] * bank.size

    def forget(self) -> None:
        """Set the counts to 0."""
        self.loads = self.guesses = self.used_guesses = 0

    def has(self, key: int) -> bool:
        """Whether an expert is here, or on its way."""
        return key in self.where or (self.staging is not None and key in self.staging.where)

    def rounds(self, needed: list[int], *, at_once: bool) -> Iterator[list[tuple[Bank, Any]]]:
        """Bring the experts needed, a few at a time, and yield those that can be computed.

        Yields [(bank, {key: slot})], each expert once. To be called after the cache has served the
        requests. `at_once`: wait for all that fit instead of computing while others travel.
        """
        pending = dict.fromkeys(needed)
        while pending:
            here = [key for key in pending if self.has(key)]
            if len(here) < len(pending):
                self._bring(pending)
                now = [key for key in pending if self.has(key)]
                if at_once and len(now) == len(pending):
                    here = now
                here = here or now
            else:
                self._claim(here)
            ready: dict[int, tuple[Bank, dict[int, int]]] = {}
            for key in here:
                if key in self.where:
                    number, slot = self.where[key]
                    bank = self.banks[number]
                else:
                    assert self.staging is not None
                    bank, slot = self.staging.bank, self.staging.where[key]
                ready.setdefault(id(bank), (bank, {}))[1][key] = slot
            steps = list(ready.values())
            for bank, slots in steps:
                bank.settle(slots.values(), self.lane)
            yield steps
            done = self.lane.mark()
            for bank, _ in steps:
                bank.read = done
            for key in here:
                del pending[key]
        self._fill([k for k in needed if k not in self.where and self.live.resident_E[k]], ())
        if self.staging is not None:
            self._count_guesses(needed)

    def guess(self, keys: Iterable[int], *, most: int) -> None:
        """Begin to bring experts that may be asked for next, `most` of them."""
        if self.staging is None:
            return
        wanted = [key for key in keys if key not in self.where][:most]
        for key in wanted:
            if key not in self.staging.where and self.staging.put(
                key, self.host(key), self.lane, keep=wanted
            ):
                self.staging.guessed.add(key)
                self.guesses += 1

    def _bring(self, pending: Mapping[int, None]) -> None:
        """Begin to load: what stays into slots that are free now, what passes into staging."""
        stay = [k for k in pending if k not in self.where and self.live.resident_E[k]]
        self._fill(stay, pending)
        if self.staging is None:
            return
        room = max(1, self.staging.bank.size // 2)  # half arrives while the other half computes
        for key in pending:
            if room and not self.has(key) and not self.live.resident_E[key]:
                room -= 1
                if not self.staging.put(key, self.host(key), self.lane, keep=pending):
                    break
                self.loads += 1

    def _claim(self, here: list[int]) -> None:
        """Move what stays from staging into its slots."""
        stay = [k for k in here if k not in self.where and self.live.resident_E[k]]
        if stay:
            self._fill(stay, dict.fromkeys(here))

    def _fill(self, stay: list[int], pending: Any) -> None:
        """Put experts into slots that are empty, or hold what neither stays nor is pending."""
        if not stay:
            return
        resident_E = self.live.resident_E
        free = [
            (number, slot)
            for number, bank in enumerate(self.banks)
            for slot, held in enumerate(bank.keys)
            if held is None or not (held in pending or resident_E[held])
        ]
        for key, (number, slot) in zip(stay, free, strict=False):
            bank = self.banks[number]
            held = bank.keys[slot]
            if held is not None:
                del self.where[held]
            bank.keys[slot] = key
            self.where[key] = (number, slot)
            staged = None if self.staging is None else self.staging.where.get(key)
            if staged is None:
                bank.arrived[slot] = self.lane.send(
                    bank.slot(slot), self.host(key), after=bank.read
                )
                self.loads += 1
            else:
                bank.settle([slot], self.lane)
                self._from_staging(key, staged, bank, slot)

    def _from_staging(self, key: int, staged: int, to: Bank, slot: int) -> None:
        assert self.staging is not None
        source = self.staging.bank
        source.settle([staged], self.lane)
        for target, tensor in zip(to.slot(slot), source.slot(staged), strict=True):
            target.copy_(tensor, non_blocking=True)
        source.read = to.read = self.lane.mark()
        source.keys[staged] = None
        del self.staging.where[key]
        if key in self.staging.guessed:
            self.staging.guessed.discard(key)
            self.used_guesses += 1

    def _count_guesses(self, needed: list[int]) -> None:
        """Guesses that were computed where they lay."""
        assert self.staging is not None
        for key in needed:
            if key in self.staging.guessed:
                self.staging.guessed.discard(key)
                self.used_guesses += 1


@contextlib.contextmanager
def page_lock(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """Lock a host tensor's pages, so that a GPU fetches it by itself; yield it, or a locked copy.

    In place where the system allows it: torch's own pinned memory grows to the next power of two.
    """
    if tensor.is_pinned():
        yield tensor
        return
    if tensor.nbytes < _LOCKED_FROM or not tensor.is_contiguous():
        yield tensor.contiguous().pin_memory()
        return
    runtime: Any = torch.cuda.cudart()
    refused = int(runtime.cudaHostRegister(tensor.data_ptr(), tensor.nbytes, 1))
    if refused:
        # CUDA keeps the error for whoever asks next, and that would be some kernel's launch
        with contextlib.suppress(RuntimeError):
            torch.zeros(1, device="cuda")
        yield tensor.pin_memory()
        return
    try:
        yield tensor
    finally:
        runtime.cudaHostUnregister(tensor.data_ptr())
