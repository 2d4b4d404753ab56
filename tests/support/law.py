"""The test law of every kernel: at most twice the error of plain torch in the same dtype, plus a tiny floor.

`check_law` runs a function and its reference by itself, gradients too; `assert_law` compares what was computed.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

FLOOR = {torch.float32: 5e-7, torch.bfloat16: 2e-4, torch.float16: 2.5e-5}  # units in the last place: 4, 1/20, 1/40


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


def _tuple(value) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def _run(fn: Callable, inputs: tuple[Tensor, ...], wanted: tuple[int, ...], upstream: list[Tensor] | None):
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    outputs = _tuple(fn(*leaves))
    smooth = [out for out in outputs if out.requires_grad]
    if upstream is None:
        generator = torch.Generator().manual_seed(0)
        upstream = [torch.randn(out.shape, dtype=torch.float64, generator=generator).to(out.device) for out in smooth]
    grads = torch.autograd.grad(
        smooth, [leaves[i] for i in wanted], [g.to(o.dtype) for g, o in zip(upstream, smooth, strict=True)]
    )
    return [x.detach() for x in (*outputs, *grads)], upstream


def check_law(fn: Callable, ref: Callable, inputs: tuple[Tensor, ...], wanted: tuple[int, ...], factor: float = 2.0):
    """`fn` and `ref` take the inputs (all of the tested dtype where floating); gradients of inputs `wanted` count too.

    The float64 truth is `ref` on the very same rounded numbers. Raises AssertionError with the errors of both.
    """
    truth, upstream = _run(ref, tuple(x.double() if x.is_floating_point() else x for x in inputs), wanted, None)
    upstream = [g.to(inputs[0].dtype).double() for g in upstream]
    truth, _ = _run(ref, tuple(x.double() if x.is_floating_point() else x for x in inputs), wanted, upstream)
    ours, _ = _run(fn, inputs, wanted, upstream)
    plain, _ = _run(ref, inputs, wanted, upstream)
    # A gradient whose terms cancel, as with a vocabulary of one, is 0 to within fp32's rounding of its terms.
    size = max([1.0, *(g.abs().max().item() for g in upstream if g.numel())])
    for place, (a, b, c) in enumerate(zip(ours, plain, truth, strict=True)):
        assert a.shape == c.shape and a.dtype == b.dtype, (
            f"result {place}: {a.shape} {a.dtype}, not {c.shape} {b.dtype}"
        )
        if c.numel() == 0:
            continue
        error, allowed, largest = (x.abs().max().item() for x in (a.double() - c, b.double() - c, c))
        floor = 5e-7 * largest if largest > 1e-6 * size else 2e-7 * size
        assert error <= factor * allowed + floor, f"result {place}: error {error:.3g}, torch's own {allowed:.3g}"
        assert torch.isfinite(a).all()
