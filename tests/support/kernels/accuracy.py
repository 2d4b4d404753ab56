"""The accuracy required of every kernel: at most twice plain torch's error in the same dtype, plus a tiny floor.

`check_accuracy` runs a function and its reference, gradients included; `assert_accurate` compares given results.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

FLOOR = {torch.float32: 5e-7, torch.bfloat16: 2e-4, torch.float16: 2.5e-5}  # units in the last place: 4, 1/20, 1/40


def assert_accurate(
    actual: Tensor, eager: Tensor, exact: Tensor, name: str = "result", floor: float | None = None, factor: float = 2.0
) -> None:
    """Compares largest errors against `exact` (fp64); `floor` is relative to max(1, largest magnitude of `exact`)."""
    assert actual.shape == exact.shape and actual.dtype == eager.dtype, f"{name}: {actual.shape} {actual.dtype}"
    if exact.numel() == 0:
        return
    assert actual.isfinite().all(), f"{name}: not finite"
    error, allowed = ((x.double() - exact).abs().max().item() for x in (actual, eager))
    allowed = factor * allowed + (FLOOR[actual.dtype] if floor is None else floor) * max(1.0, exact.abs().max().item())
    assert error <= allowed, f"{name}: error {error:.3g}, allowed {allowed:.3g}"


def assert_all_accurate(actual: Sequence[Tensor], eager: Sequence[Tensor], exact: Sequence[Tensor]) -> None:
    """`assert_accurate` of each result; `eager` and `exact` may have more."""
    for place, (a, b, c) in enumerate(zip(actual, eager, exact, strict=False)):
        assert_accurate(a, b.detach(), c.detach(), f"result {place}")


def as_tuple(value) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def run(fn: Callable, inputs: Sequence[Tensor], wanted: Sequence[int], upstream: Sequence[Tensor] | None = None):
    """[*outputs of fn, *gradients of inputs `wanted`] and the upstream gradients (fp64; drawn where None)."""
    leaves = [x.detach().requires_grad_(x.is_floating_point()) for x in inputs]
    outputs = as_tuple(fn(*leaves))
    smooth = [out for out in outputs if out.requires_grad]
    if upstream is None:
        generator = torch.Generator().manual_seed(0)
        cpu = {"dtype": torch.float64, "generator": generator, "device": "cpu"}
        upstream = [torch.randn(out.shape, **cpu).to(out.device) for out in smooth]
    grads = torch.autograd.grad(
        smooth, [leaves[i] for i in wanted], [g.to(o.dtype) for g, o in zip(upstream, smooth, strict=True)]
    )
    return [x.detach() for x in (*outputs, *grads)], upstream


def check_accuracy(
    fn: Callable, ref: Callable, inputs: Sequence[Tensor], wanted: Sequence[int], floor: float | None = None
) -> None:
    """`fn` and `ref` take the inputs, all of the tested dtype where floating; gradients of inputs `wanted` count too.
    The truth is `ref` in float64 on the same inputs. floor: as there; None: fp32's, relative to a result."""
    doubles = [x.double() if x.is_floating_point() else x for x in inputs]
    _, upstream = run(ref, doubles, wanted)
    upstream = [g.to(inputs[0].dtype).double() for g in upstream]
    (actual, _), (eager, _), (exact, _) = (
        run(f, x, wanted, upstream) for f, x in ((fn, inputs), (ref, inputs), (ref, doubles))
    )
    # A gradient whose terms cancel, as with a vocabulary of one, is 0 to within fp32's rounding of its terms.
    size = max([1.0, *(g.abs().max().item() for g in upstream if g.numel())])
    for place, (a, b, c) in enumerate(zip(actual, eager, exact, strict=True)):
        limit = floor
        if floor is None and c.numel():
            largest = c.abs().max().item()
            limit = (5e-7 * largest if largest > 1e-6 * size else 2e-7 * size) / max(1.0, largest)
        assert_accurate(a, b, c, f"result {place}", limit)
