"""Hash of csrc/: compiled into trialign._C and compared with the sources beside it, to detect a stale build."""

import hashlib
from pathlib import Path


def source_hash(folder: Path) -> str:
    """SHA-256 over names and contents of every source under `folder`; "" where there are none (a wheel)."""
    sources = sorted(path for path in folder.rglob("*") if path.suffix in (".cpp", ".h", ".cu", ".cuh"))
    if not sources:
        return ""
    digest = hashlib.sha256()
    for path in sources:
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()
