"""Refusal of torchrun by benchmarks that measure one process."""

from __future__ import annotations

import os


def refuse_ranks(script: str) -> None:
    """Ends a benchmark started with several ranks, which would be independent copies that slow each other down.

    Raises:
        SystemExit: there is more than one rank.
    """
    if (world := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        raise SystemExit(f"error: {script} measures one process: start it by python, not with WORLD_SIZE={world}")
