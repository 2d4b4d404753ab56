"""Atomic writes: a file or a folder is written aside under another name, fsynced and renamed: whole or not at all."""

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
    """Waits until a file, or a folder's list of names, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def atomic_file(path: Path) -> Iterator[Path]:
    """Gives the path of a new file, which is on the disk as `path` once the block ends, and gone where it fails.

    A file of that name is replaced; the folder is made where there is none.
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
    """Writes a text file as `atomic_file` does."""
    with atomic_file(path) as aside:
        aside.write_text(text, encoding="utf-8")


def replace_folder(folder: Path, new: Path) -> None:
    """Gives the whole folder `new`, which lies beside `folder`, the name of that one, which is deleted."""
    shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)
    fsync(folder.parent)


@contextmanager
def atomic_folder(folder: Path) -> Iterator[Path]:
    """Gives a new, empty folder, which is on the disk as `folder` once the block ends, and gone where it fails.

    What killed processes left beside it is named on stderr and stays: another process may still be filling it.

    Args:
        folder: must not exist, or be empty. Of a symbolic link the folder that it points at is meant.

    Raises:
        ValueError: `folder` is not empty, or no other can take its name: it is a mount point, say.
        OSError: the disk is full.
    """
    folder = Path(os.path.realpath(folder))
    if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder}: exists and is not an empty folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = re.compile(rf"\.{re.escape(folder.name)}\.[0-9a-f]+\.unfinished")
    left = sorted(str(path) for path in folder.parent.iterdir() if unfinished.fullmatch(path.name))
    if left:
        print(
            f"left over from an interrupted conversion, unless one still runs: {', '.join(left)}; may be deleted",
            file=sys.stderr,
        )
    aside = _begin(folder)
    try:
        yield aside
        for path in (*aside.rglob("*"), aside):
            fsync(path)
        aside.rename(folder)  # replaces an empty folder
        fsync(folder.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)  # after a success it is no longer there


def _begin(folder: Path) -> Path:
    """The new folder, after one that was empty too has taken the name: what cannot be renamed so is found out now."""
    # The name is random: in a container the next process has the killed one's number.
    aside = folder.with_name(f".{folder.name}.{secrets.token_hex(8)}.unfinished")
    if folder.exists():
        try:
            aside.mkdir()
            aside.rename(folder)
        except OSError as error:
            with suppress(OSError):
                aside.rmdir()
            raise ValueError(
                f"{folder}: the output is made beside it and then takes its name, which fails here ({error.strerror}),"
                " as on a mount point; name a folder in it"
            ) from None
    aside.mkdir()
    return aside
