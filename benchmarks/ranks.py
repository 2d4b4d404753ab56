"""Ranks that torchrun starts, for benchmarks that measure one process."""

from __future__ import annotations

import os


def refuse_ranks(script: str) -> None:
    """Ends a benchmark that several ranks would run as independent copies, each slowing the others down.

    Raises:
        SystemExit: there is more than one rank.
    """
    if (world := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise SystemExit(
            f"error: {script} measures one process: start it with python, not torchrun (WORLD_SIZE={world})"
        )
