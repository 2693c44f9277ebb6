"""Outputs appear whole or not at all: write beside the final name, then rename.

A directory under construction is called ``.NAME.partial-PID``; those left by a process that was
killed are removed by the next run that writes to the same name.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from moesaic.core.errors import UserError

MADE_BY = "moesaic.json"
"""The file that every output directory of a command holds (see `lineage`)."""
_NO_PLACE = (
    errno.ENOENT,
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.ENAMETOOLONG,
    errno.EINVAL,
)


def check_output(path: Path | str, *, overwrite: bool = False) -> Path:
    """Return `path`, absolute. Raises UserError when it is taken and `overwrite` is False.

    `overwrite` removes whatever is there: a caller says so only of what it made itself (see
    `check_step`).
    """
    path = check_folder(path).absolute()
    if not overwrite and os.path.isdir(path) and any(path.iterdir()):
        raise UserError(f"{path} exists and is not empty. Choose another -o, or remove it.")
    return path


def check_folder(path: Path | str) -> Path:
    """Return `path` as given, `~` expanded. Raises UserError when it is or lies under a file."""
    path = Path(path).expanduser()
    whole = path.absolute()
    # os.path says False of a name that is too long, where Path raises.
    there = next(parent for parent in (whole, *whole.parents) if os.path.lexists(parent))
    if not there.is_dir():
        raise UserError(f"{there} is a file. Give a directory for the output.")
    return path


def check_step(path: Path | str, *, overwrite: bool, inputs: Iterable[object]) -> Path:
    """Return `path`, absolute, when the output of a step that reads `inputs` may appear there.

    Of the inputs, paths count, also inside lists and mappings. Raises UserError when `path` is
    taken and `overwrite` is False; and, since replacing a directory removes all of it, when it is
    or holds an input, or was not made by moesaic.
    """
    path = check_output(path, overwrite=overwrite)
    if not os.path.isdir(path) or not any(path.iterdir()):
        return path
    final = path.resolve()
    for given in _paths(inputs):
        if final in (given, *given.parents):
            raise UserError(f"{path} holds an input of this step: {given}. Choose another -o.")
    if not (path / MADE_BY).is_file():
        raise UserError(
            f"{path} holds no {MADE_BY}, so moesaic did not make it and does not replace it. "
            "Choose another -o, or remove it yourself."
        )
    return path


def _paths(given: object) -> Iterator[Path]:
    """Every existing path in `given`, resolved; names of methods and datasets are none."""
    if isinstance(given, (str, Path)):
        try:
            path = Path(given).expanduser()
            if str(given) and path.exists():
                yield path.resolve()
        except (OSError, RuntimeError, ValueError):  # too long, or no such user: no path
            return
    elif isinstance(given, Mapping):
        yield from _paths(list(given.values()))
    elif isinstance(given, Iterable):
        for item in given:
            yield from _paths(item)


@contextlib.contextmanager
def output_directory(path: Path | str, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a partial directory: it becomes `path` on success and vanishes on failure.

    Raises:
        UserError: `path` is a file, cannot be made, or is a directory that is not empty while
            `overwrite` is False.
    """
    final = check_output(path, overwrite=overwrite)
    made = [parent for parent in final.parents if not os.path.exists(parent)]
    partial = final.parent / f".{final.name}.partial-{os.getpid()}"
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(final)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
    except OSError as error:
        _remove_empty(made)
        if error.errno in _NO_PLACE:
            raise UserError(
                f"{path} cannot be made: {error.strerror}. Choose another -o."
            ) from error
        raise
    try:
        yield partial
        make_readable(partial)
        _swap(partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        _remove_empty(made)
        raise


def write_bytes(path: Path | str, data: bytes) -> None:
    """Write a file atomically: readers see the old content or the new, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name)
        raise


def write_text(path: Path | str, text: str) -> None:
    """Write a UTF-8 text file atomically."""
    write_bytes(path, text.encode("utf-8"))


def make_readable(folder: Path) -> None:
    """Give files the permissions of the user's umask: safetensors makes them for the owner only."""
    mode = 0o666 & ~_umask()
    for file in folder.rglob("*"):
        if file.is_file() and not file.is_symlink():
            file.chmod(file.stat().st_mode | mode)


def _remove_empty(folders: Iterable[Path]) -> None:
    """Remove parents that were made for an output which did not come; deepest first."""
    for folder in folders:
        with contextlib.suppress(OSError):
            folder.rmdir()


def _swap(partial: Path, final: Path) -> None:
    if not final.exists():
        os.rename(partial, final)
        return
    old = final.parent / f".{final.name}.partial-{os.getpid()}-old"
    os.rename(final, old)
    os.rename(partial, final)
    shutil.rmtree(old, ignore_errors=True)


def _remove_stale(final: Path) -> None:
    for leftover in final.parent.glob(f".{final.name}.partial-*"):
        pid = leftover.name.rpartition(".partial-")[2].partition("-")[0]
        if pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(leftover, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
