"""Value loss per token: squared error with clipped values."""

from __future__ import annotations

from torch import Tensor

from ...kernels.ppo_loss import clipped_value_loss


def value_loss(
    values: Tensor, old_values: Tensor, returns: Tensor, clip: float = 0.0, coef: float = 0.5
) -> tuple[Tensor, Tensor]:
    """(loss, clipped), [targets] each: coef max((V - R)^2, (V_old + clip(V - V_old, ±c) - R)^2); 1 where it clips.

    Differentiable in `values`; clip 0 for none.
    """
    losses, clipped = clipped_value_loss(values, old_values, returns, clip or None)
    return losses * (coef / 0.5), clipped
