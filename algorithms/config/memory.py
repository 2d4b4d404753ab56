"""Options that lower the memory of a phase, for the report of a failed allocation (engine/memory.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ...engine.memory import Holder

SAMPLING = ("rollout", "responses")  # phases of the generator
LAYOUT = ("parallel.tp", "parallel.pp")
OPTIONS: dict[Holder, tuple[str, ...]] = {
    "parameters": (*LAYOUT, "lora.quantize", "model.dtype"),
    "gradients": (*LAYOUT, "lora.rank"),
    "optimizer": ("parallel.dp", *LAYOUT, "lora.rank", "actor.ema_decay", "grpo.ema_decay"),
    "cache": ("rollout.cache_gib", "rollout.cache_fraction", "rollout.max_running", "rollout.max_new_tokens"),
}


def memory_options(values: Mapping[str, Any], phase: str, holder: Holder) -> str:
    """The options of a script that lower what `holder` has in a phase, with their values.

    Args:
        values: option -> value of the run.
    """
    if holder != "activations":
        names = OPTIONS[holder]
    elif phase in SAMPLING:
        names = ("rollout.max_running", *LAYOUT)
    else:
        micro = [name for size in ("micro_batch_tokens", "micro_batch_size") for name in values if name.endswith(size)]
        names = (*micro, "parallel.recompute", *LAYOUT)
    return ", ".join(f"{name}={values[name]}" for name in names if name in values)
