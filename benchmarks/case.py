"""A row of bench_kernels.py: one op's inputs and the calls that are timed on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

HIDDEN = 576
"""The hidden size of SmolLM2-135M."""
Run = Callable[[], tuple[Tensor, ...]]


@dataclass
class Case:
    """One op: `runs`, "trialign" and "eager" among them, return the tensors that are compared."""

    size: str
    runs: dict[str, Run]
    compare: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] = field(default=lambda results: results)
    """from a run's results to the tensors that must agree"""
    products: Run | None = None
    """the matrix products alone, of an op that recomputes: a lower bound of its time"""


def case(size: str, inputs: tuple, wanted: tuple[int, ...], **functions: Callable) -> Case:
    """Each function of the inputs, forward, and backward for the inputs `wanted` (none: forward only, no graph)."""
    leaves = tuple(x.requires_grad_() if i in wanted else x for i, x in enumerate(inputs))
    upstream: list[Tensor] = []

    def run(function: Callable) -> tuple[Tensor, ...]:
        if not wanted:
            with torch.no_grad():
                return as_tuple(function(*leaves))
        outputs = as_tuple(function(*leaves))
        smooth = [out for out in outputs if out.requires_grad]
        if not upstream:
            upstream.extend(torch.randn_like(out) for out in smooth)
        grads = torch.autograd.grad(smooth, [leaves[i] for i in wanted], upstream)
        return *(out.detach() for out in outputs), *grads

    return Case(size, {name: lambda f=function: run(f) for name, function in functions.items()})


def compiled(function: Callable) -> Callable:
    return torch.compile(function, dynamic=False)


def as_tuple(value: Any) -> tuple[Tensor, ...]:
    return value if isinstance(value, tuple) else (value,)


def autograd_function(forward: Callable, backward: Callable) -> Callable:
    """An autograd.Function of forward(*inputs) -> (output, saved tensors) and backward(saved, grad) -> gradients."""

    class Function(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            output, saved = forward(*inputs)
            ctx.save_for_backward(*saved)
            return output

        @staticmethod
        def backward(ctx, *grads):
            return backward(ctx.saved_tensors, *grads)

    return Function.apply
