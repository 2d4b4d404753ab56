"""Run lock: at most one run at a time in a folder."""

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
    """Locks a folder until the block or the process ends. Creates the folder; deletes it if it is empty afterwards.

    Yields:
        A random token, the content of FOLDER/.lock: a host that reads the same one sees the same folder.

    Raises:
        ValueError: another process holds the lock.
        OSError: the folder cannot be created or written to.
    """
    created = [path for path in (folder, *folder.parents) if not path.exists()]
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
        with suppress(OSError):  # not empty
            for path in created:
                path.rmdir()


def _lock(file: IO[bytes]) -> bool:
    """Whether the file could be locked. A POSIX lock works between hosts over NFS, and is not inherited by children,
    which may outlive a killed run."""
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError as error:
        print(
            f"{file.name}: the file system has no locks ({error.strerror}): concurrent runs are not detected",
            file=sys.stderr,
        )
    return os.fstat(file.fileno()).st_nlink > 0  # 0: the previous holder has just deleted it
