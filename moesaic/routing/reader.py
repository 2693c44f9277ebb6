"""Read samples ahead of the model: in a thread, or in a process of its own.

A GPU computes what one Python thread launches, and a small model keeps that thread busy. Another
thread that parses and cuts text takes the interpreter away from it, so that both take turns: then
reading belongs into another process. It is started with this module as its program, is told what
to read on its standard input, and answers with samples on its standard output. What cannot be told
to another process (a slow tokenizer, a source of the caller's own script) is read in a thread.
"""

from __future__ import annotations

import contextlib
import contextvars
import itertools
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import IO, Any

import numpy as np

from moesaic.core.errors import MoesaicError
from moesaic.data.sources import Source
from moesaic.routing.blocks import Delimiters, Sample, samples

__all__ = ["Text", "ahead"]

_READ_AHEAD = 64  # samples, of the thread
_TOGETHER = 16  # samples that travel together
_PIPE_BYTES = 1 << 20  # what the process is ahead; systems may allow less


@dataclass(frozen=True)
class Text:
    """What is to be read: the arguments of `blocks.samples`."""

    sources: Mapping[str, Source]
    tokenizer: Any
    around: Delimiters
    tokens: int
    length: int
    seed: int | None = None

    def samples(self) -> Iterator[Sample]:
        """Read it here and now."""
        return samples(
            self.sources, self.tokenizer, self.around,
            tokens=self.tokens, length=self.length, seed=self.seed,
        )  # fmt: skip


@contextlib.contextmanager
def ahead(text: Text, *, skip: int, apart: bool) -> Iterator[Iterator[Sample]]:
    """Read all samples but the first `skip` while the block runs; `apart`: in another process."""
    process = _start(text, skip) if apart else None
    with contextlib.ExitStack() as stack:

        def here() -> Iterator[Sample]:
            stream = itertools.islice(text.samples(), skip, None)
            return stack.enter_context(_in_a_thread(stream))

        if process is None:
            yield here()
        else:
            stack.callback(_stop, process)
            yield _received(process, here)


@contextlib.contextmanager
def _in_a_thread(stream: Iterator[Sample]) -> Iterator[Iterator[Sample]]:
    ready: queue.Queue[Sample | BaseException | None] = queue.Queue(_READ_AHEAD)
    stopped = threading.Event()

    def put(item: Sample | BaseException | None) -> None:
        while not stopped.is_set():
            with contextlib.suppress(queue.Full):
                ready.put(item, timeout=0.1)
                return

    def read() -> None:
        try:
            for sample in stream:
                put(sample)
                if stopped.is_set():
                    return
            put(None)
        except BaseException as error:  # raised again where the samples are used
            put(error)

    def samples_of() -> Iterator[Sample]:
        while (item := ready.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item

    # the notes and bars of tokenising go where the caller's go
    context = contextvars.copy_context()
    thread = threading.Thread(target=context.run, args=(read,), daemon=True, name="samples")
    thread.start()
    try:
        yield samples_of()
    finally:
        stopped.set()
        thread.join()


# ---------------------------------------------------------------------- the caller's side


@dataclass(frozen=True)
class _Fast:
    """What `samples` asks of a fast tokenizer, without transformers."""

    rules: str
    size: int
    bos_token_id: int | None
    eos_token_id: int | None

    def __len__(self) -> int:
        return self.size

    @cached_property
    def backend_tokenizer(self) -> Any:
        from tokenizers import Tokenizer

        return Tokenizer.from_str(self.rules)


def _start(text: Text, skip: int) -> subprocess.Popen[bytes] | None:
    """Start the process and tell it what to read; None where that cannot be."""
    tokenizer = text.tokenizer
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not sys.executable:
        return None
    fast = _Fast(backend.to_str(), len(tokenizer), tokenizer.bos_token_id, tokenizer.eos_token_id)
    asked = Text(dict(text.sources), fast, text.around, text.tokens, text.length, text.seed)
    try:
        request = pickle.dumps((asked, skip))
        process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
    except (pickle.PicklingError, AttributeError, TypeError, OSError):
        return None
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # then it is not ready either
        process.stdin.write(request)
        process.stdin.close()
    return process


def _stop(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            with contextlib.suppress(BrokenPipeError):
                pipe.close()


def _receive(process: subprocess.Popen[bytes]) -> Any:
    """Return what the process says next, None when it is gone."""
    assert process.stdout is not None
    try:
        return pickle.load(process.stdout)
    except (EOFError, pickle.UnpicklingError):
        return None


def _received(
    process: subprocess.Popen[bytes], otherwise: Callable[[], Iterator[Sample]]
) -> Iterator[Sample]:
    if _receive(process) != "ready":
        yield from otherwise()
        return
    while (said := _receive(process)) != "end":
        if said is None:
            raise MoesaicError(
                f"the process that reads the text is gone (exit code {process.wait()}). Was it "
                "killed for memory? The same call goes on where the recording stopped."
            )
        if isinstance(said, BaseException):
            raise said
        domains, lengths, ids, document = said
        ends = np.cumsum(lengths)
        ids, document = ids.astype(np.int64), document.astype(np.int64)
        for domain, start, end in zip(domains, ends - lengths, ends, strict=True):
            yield Sample(domain, ids[start:end], document[start:end])


# --------------------------------------------------------------------- the process's side


def _main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the caller decides
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whoever prints does not print into the answers
    with contextlib.suppress(ImportError, AttributeError, OSError):
        import fcntl

        fcntl.fcntl(answers.fileno(), fcntl.F_SETPIPE_SZ, _PIPE_BYTES)
    text, skip = pickle.load(sys.stdin.buffer)
    with contextlib.suppress(BrokenPipeError):
        _say("ready", answers)
        try:
            stream = itertools.islice(text.samples(), skip, None)
            while batch := list(itertools.islice(stream, _TOGETHER)):
                _say(_together(batch), answers)
            _say("end", answers)
        except MoesaicError as error:
            _say(error, answers)
        except BrokenPipeError:
            raise
        except Exception as error:
            _say(MoesaicError(f"reading the text failed: {error!r}"), answers)


def _say(what: Any, answers: IO[bytes]) -> None:
    pickle.dump(what, answers, protocol=5)
    answers.flush()


def _together(batch: list[Sample]) -> tuple[Any, ...]:
    """Lay samples end to end; in 32 bits, which token ids and counts of documents fit into."""
    return (
        [sample.domain for sample in batch],
        np.array([len(sample) for sample in batch]),
        np.concatenate([sample.ids for sample in batch]).astype(np.int32),
        np.concatenate([sample.document for sample in batch]).astype(np.int32),
    )


if __name__ == "__main__":
    # under the name by which the caller knows it, so that both mean the same classes
    from moesaic.routing import reader

    reader._main()
