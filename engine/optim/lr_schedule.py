"""Learning rate over the optimizer steps of a run: linear warm-up, then cosine or linear decay to a floor."""

from __future__ import annotations

import math


def lr_at(step: int, total: int, *, peak: float, schedule: str, warmup_ratio: float, min_lr_ratio: float) -> float:
    """Learning rate of optimizer step `step` (from 0) of `total`.

    The warm-up takes ceil(total * warmup_ratio) steps and reaches the peak on the step after them. The decay ends at
    peak * min_lr_ratio with the last step.
    """
    warm_up = math.ceil(total * warmup_ratio)
    if step < warm_up:
        return peak * (step + 1) / (warm_up + 1)
    if schedule == "constant":
        return peak
    done = min(1.0, (step - warm_up) / max(1, total - 1 - warm_up))
    factor = 1 - done if schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return peak * (min_lr_ratio + (1 - min_lr_ratio) * factor)
