"""Outputs appear whole or not at all: write beside the final name, then rename.

A directory under construction is called ``.NAME.partial-PID``; those left by a process that was
killed are removed by the next run that writes to the same name.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from moesaic.core.errors import UserError


def check_output(path: Path | str, *, overwrite: bool = False) -> Path:
    """Return `path`, absolute. Raises UserError when it is taken and `overwrite` is False."""
    path = Path(path).expanduser().absolute()
    if path.is_file():
        raise UserError(f"{path} is a file. Give a directory for the output.")
    if not overwrite and path.is_dir() and any(path.iterdir()):
        raise UserError(f"{path} exists and is not empty. Choose another -o, or remove it.")
    return path


@contextlib.contextmanager
def output_directory(path: Path | str, *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a partial directory: it becomes `path` on success and vanishes on failure.

    Raises:
        UserError: `path` is a file, or exists and is not empty while `overwrite` is False.
    """
    final = check_output(path, overwrite=overwrite)
    final.parent.mkdir(parents=True, exist_ok=True)
    _remove_stale(final)
    partial = final.parent / f".{final.name}.partial-{os.getpid()}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        make_readable(partial)
        _swap(partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
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
