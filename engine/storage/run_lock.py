"""One run at a time writes into a folder."""

from __future__ import annotations

import fcntl
import os
import sys
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


@contextmanager
def run_lock(folder: Path) -> Iterator[str]:
    """Keeps others that ask for the same folder out of it until the block or the process ends: a killed run is in
    nobody's way. The folder is made; where nothing is written into it, it is gone afterwards.

    Yields:
        What FOLDER/.lock holds meanwhile and no other file does: who reads it there sees this very folder.

    Raises:
        ValueError: another process is in it.
        OSError: the folder cannot be made or written to.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with open(folder / ".lock", "ab") as file:
            if not _lock(file):
                raise ValueError(f"{folder}: another run writes to it; wait until it has ended, or name another folder")
            token = uuid.uuid4().hex
            file.truncate(0)
            file.write(token.encode())
            file.flush()
            try:
                yield token
            finally:
                Path(file.name).unlink(missing_ok=True)
    finally:
        with suppress(OSError):  # what is not empty stays
            for path in made:
                path.rmdir()


def _lock(file: IO[bytes]) -> bool:
    """Whether this process has the file to itself. The lock is POSIX's: over NFS it holds between hosts too, and
    children that outlive a killed run do not have it."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        print(f"{file.name}: no locks on this disk ({error.strerror}), so runs are not kept apart", file=sys.stderr)
    return os.fstat(file.fileno()).st_nlink > 0  # else the one before has just deleted it
