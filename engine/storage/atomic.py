"""Atomic writes: a file or folder is written under a temporary name, fsynced and renamed."""

from __future__ import annotations

import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def fsync(path: Path) -> None:
    """Flushes a file, or a folder's list of names, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Yields a temporary path, whose file replaces `path` after the block, or is deleted if the block fails.

    Creates the folder if it does not exist.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.new")
    try:
        yield aside
        fsync(aside)
        os.replace(aside, path)
        fsync(path.parent)
    finally:
        aside.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Writes a text file by `atomic_file`."""
    with atomic_file(path) as aside:
        aside.write_text(text, encoding="utf-8")


def delete_folder(folder: Path) -> None:
    """Deletes a folder; a kill leaves no incomplete one of its name."""
    shutil.rmtree(_rename_deleted(folder))


def _rename_deleted(folder: Path) -> Path:
    """Renames a folder, if it exists, to the returned name of one that is being deleted."""
    doomed = folder.with_name(f".{folder.name}.deleted")
    shutil.rmtree(doomed, ignore_errors=True)  # of a process that was killed
    if folder.exists():
        folder.rename(doomed)
    return doomed


def replace_folder(folder: Path, new: Path) -> None:
    """Renames the complete folder `new`, which is beside `folder`, to it; an existing `folder` is deleted."""
    doomed = _rename_deleted(folder)
    new.rename(folder)  # before the slow deletion: a kill during it would leave neither
    fsync(folder.parent)
    shutil.rmtree(doomed, ignore_errors=True)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Yields a new folder, which is renamed to `folder` after the block, or deleted if the block fails.

    Leftovers of killed processes are reported on stderr, but kept: another process may still be writing them.

    Args:
        folder: must be empty or not exist. A symbolic link stands for its target.

    Raises:
        ValueError: `folder` is not empty, or cannot be renamed to, as a mount point.
        OSError: the disk is full.
    """
    folder = Path(os.path.realpath(folder))
    if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: exists and is not an empty folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = re.compile(rf"\.{re.escape(folder.name)}\.[0-9a-f]+\.unfinished")
    left = sorted(str(path) for path in folder.parent.iterdir() if unfinished.fullmatch(path.name))
    if left:
        message = f"left over from an interrupted conversion, unless one still runs: {', '.join(left)}; may be deleted"
        print(message, file=sys.stderr)
    aside = _temporary_folder(folder)
    try:
        yield aside
        for path in (*aside.rglob("*"), aside):
            fsync(path)
        aside.rename(folder)  # replaces an empty folder
        fsync(folder.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)  # renamed after a success


def _temporary_folder(folder: Path) -> Path:
    """Creates the temporary folder; an existing `folder` is first replaced by an empty one, to test the rename."""
    # A random name: in a container the next process may have the process id of the killed one.
    aside = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.unfinished")
    if folder.exists():
        try:
            aside.mkdir()
            aside.rename(folder)
        except OSError as error:
            with suppress(OSError):
                aside.rmdir()
            raise ValueError(
                f"{folder}: a folder written beside it cannot be renamed to it ({error.strerror}), as to a mount point;"
                " name a folder inside it"
            ) from None
    aside.mkdir()
    return aside
