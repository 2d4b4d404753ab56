"""The test law of the kernels: at most twice the error of plain torch in the same dtype, plus a tiny floor."""

from __future__ import annotations

import torch

FLOOR = {torch.float32: 5e-7, torch.bfloat16: 2e-3, torch.float16: 2.5e-4}


def assert_law(
    got: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor, what: str = "", floor: float | None = None
) -> None:
    """Compares largest errors against `exact` (fp64); `floor` is relative to the largest magnitude of `exact`."""
    assert got.shape == exact.shape and got.dtype == eager.dtype, f"{what}: {got.shape} {got.dtype}"
    if exact.numel() == 0:
        return
    assert got.isfinite().all(), f"{what}: not finite"
    error, allowed = ((x.double() - exact).abs().max().item() for x in (got, eager))
    allowed = 2 * allowed + (FLOOR[got.dtype] if floor is None else floor) * max(1.0, exact.abs().max().item())
    assert error <= allowed, f"{what}: error {error:.3g}, allowed {allowed:.3g}"
