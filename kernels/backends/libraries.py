"""Libraries whose kernels replace those of trialign on CUDA where they fit the call: torch's, and installed ones.

TRIALIGN_KERNELS (kernels/dispatch.py): auto and fp8 allow them, own does not.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ..dispatch import HALF, MODE, capability


@dataclass(frozen=True)
class Library:
    """A published function in place of an op."""

    module: str
    """Module to import."""
    function: str
    """Its name in the module."""
    fits: Callable[..., bool]
    """Whether the function can take a call of the op, from the op's arguments."""
    call: Callable[..., tuple[tuple, dict[str, Any]]]
    """The function's positional and keyword arguments, from the op's arguments."""
    modes: tuple[str, ...] = ("auto", "fp8")
    """Values of TRIALIGN_KERNELS that allow it."""
    needs: str = "torch"
    """Compiled module that it imports only when it is called."""
    result: Callable[[Any], torch.Tensor] | None = None
    """The op's output from the function's, where they differ."""


def _flash_fits(q, k, v, cu_seqlens, max_seqlen, scale, alibi_slopes, window) -> bool:
    """Common to the three: head dims of whole 16 bytes up to 256, above 192 where a block of the backward has room."""
    d, chip, amd = q.shape[2], capability(q), q.is_cuda and torch.version.hip is not None
    widest = 256 if amd or chip in ((8, 0), (9, 0), (10, 0)) else 192
    takes = q.dtype in HALF and d % 8 == 0 and d <= widest and (amd or chip >= (8, 0))
    return takes and max_seqlen > 0 and (window is None or window > 0)


def _flash_attention(q, k, v, cu_seqlens, max_seqlen, scale, alibi_slopes, window):
    bounds = cu_seqlens.int()
    return (q, k, v), {
        "cu_seqlens_q": bounds,
        "cu_seqlens_k": bounds,
        "max_seqlen_q": max_seqlen,
        "max_seqlen_k": max_seqlen,
        "softmax_scale": scale,
        "causal": True,
        "window_size": (-1, -1) if window is None else (window - 1, 0),  # keys to the left of the query's own
        "deterministic": True,  # else d q is summed in any order, and a resumed run would differ
    }


def _flash_attention_2(*arguments):
    positional, named = _flash_attention(*arguments)
    return positional, named | {"alibi_slopes": arguments[6]}


def _flash_attention_3_fits(*arguments) -> bool:
    """Hopper's own; no ALiBi; its backward of head dims above 192 has no fixed order."""
    q, alibi_slopes = arguments[0], arguments[6]
    return _flash_fits(*arguments) and capability(q)[0] == 9 and alibi_slopes is None and q.shape[2] <= 192


def _varlen_fits(*arguments) -> bool:
    """torch's flash-attn 2; no ALiBi in its backward."""
    fits = _flash_fits(*arguments) and arguments[6] is None and torch.version.hip is None
    return fits and torch.backends.cuda.is_flash_attention_available()


def _varlen(q, k, v, cu_seqlens, max_seqlen, scale, alibi_slopes, window):
    bounds = cu_seqlens.int()
    window_size = (-1, 0) if window is None else (window - 1, 0)
    return (q, k, v, bounds, bounds, max_seqlen, max_seqlen), {
        "scale": scale,
        "window_size": window_size,
        "enable_gqa": q.shape[1] != k.shape[1],
    }


_DETERMINISTIC: Any = torch.utils.deterministic  # a module with a property


def in_order(out: torch.Tensor) -> torch.Tensor:
    """`out` of varlen_attn, whose backward sums d q in one order: torch asks its global switch when that node runs."""
    node, found = out.grad_fn, []
    if node is not None:

        def begin(_) -> None:
            found.append((torch.get_deterministic_debug_mode(), _DETERMINISTIC.fill_uninitialized_memory))
            _DETERMINISTIC.fill_uninitialized_memory = False  # it would fill every buffer with NaN first
            torch.set_deterministic_debug_mode("error")

        def end(*_) -> None:
            mode, fill = found.pop()
            torch.set_deterministic_debug_mode(mode)
            _DETERMINISTIC.fill_uninitialized_memory = fill

        node.register_prehook(begin)
        node.register_hook(end)
    return out


def _grouped_fits(x, weight, offsets) -> bool:
    """bf16 on Hopper and Blackwell, elsewhere torch reads the counts back and loops; strides of whole 16 bytes."""
    if capability(x)[0] not in (9, 10) or not x.dtype == weight.dtype == torch.bfloat16 or x.numel() == 0:
        return False
    rows, columns = sorted(weight.stride()[1:])
    aligned = rows == 1 and columns % 8 == 0 and weight.stride(0) % 8 == 0 and weight.storage_offset() % 8 == 0
    return aligned and x.shape[1] % 8 == 0 and weight.shape[2] % 8 == 0 and 0 < len(weight) <= GROUPS


def _grouped_outer_fits(x, grad, offsets) -> bool:
    """As above, on Hopper: on Blackwell the gradient of an expert without rows is not zero (pytorch#172439)."""
    if capability(x)[0] != 9 or not x.dtype == grad.dtype == torch.bfloat16 or x.numel() == 0:
        return False
    return x.shape[1] % 8 == 0 and grad.shape[1] % 8 == 0 and 1 < len(offsets) <= GROUPS + 1


GROUPS = 1024
"""Experts that torch's grouped product takes at most."""


def _apex_adam_fits(
    master, exp_avg, exp_avg_sq, grad, param_out, lr, beta1, beta2, eps, weight_decay, step, scale
) -> bool:
    """Without clip scale and copy-out, which it lacks, and within its 32-bit indices."""
    return master.is_cuda and param_out is None and scale == 1.0 and 0 < master.numel() < 2**31


def _apex_adam(master, exp_avg, exp_avg_sq, grad, param_out, lr, beta1, beta2, eps, weight_decay, step, scale):
    chunk, decoupled, bias_correction = 2048 * 32, 1, 1
    unused = torch.zeros(1, dtype=torch.int32, device=master.device)  # its overflow flag
    tensors = [[grad], [master], [exp_avg], [exp_avg_sq]]
    numbers = (lr, beta1, beta2, eps, step, decoupled, bias_correction, weight_decay)
    return (chunk, unused, tensors, *numbers), {}


def _fp8_fits(x, weight) -> bool:
    """Inner and outer sizes are multiples of 16, and the device multiplies FP8."""
    if not x.is_cuda or x.dtype not in HALF or x.dtype != weight.dtype or x.numel() == 0:
        return False
    return all(size % 16 == 0 for size in weight.shape) and torch.cuda.get_device_capability(x.device) >= (8, 9)


# The first row of an op that is installed and fits serves. The three FP8 rows are parts of one call
# (kernels/linear.py): the layer, the region in which it multiplies in FP8, and the recipe, which keeps no history
# between calls (a checkpoint would have to store it).
LIBRARIES: dict[str, tuple[Library, ...]] = {
    "attention": (
        Library(
            "flash_attn_interface",
            "flash_attn_varlen_func",
            _flash_attention_3_fits,
            _flash_attention,
            result=lambda out: out[0] if isinstance(out, tuple) else out,  # before 3.0.0: with the log-sum-exp
        ),
        Library("flash_attn", "flash_attn_varlen_func", _flash_fits, _flash_attention_2),
        Library("torch.nn.attention.varlen", "varlen_attn", _varlen_fits, _varlen, result=in_order),
    ),
    "grouped_matmul": (
        Library(
            "torch.nn.functional",
            "grouped_mm",
            _grouped_fits,
            lambda x, weight, offsets: ((x, weight), {"offs": offsets.narrow(0, 1, len(offsets) - 1)}),
        ),
    ),
    "grouped_outer": (
        Library(
            "torch.nn.functional",
            "grouped_mm",
            _grouped_outer_fits,
            lambda x, grad, offsets: ((x.t(), grad), {"offs": offsets.narrow(0, 1, len(offsets) - 1)}),
        ),
    ),
    "rms_norm": (
        Library(
            "apex.normalization.fused_layer_norm",
            "fused_rms_norm_affine",
            lambda x, weight, eps: x.is_cuda and x.dtype == weight.dtype and x.numel() > 0,
            lambda x, weight, eps: ((x, weight), {"normalized_shape": tuple(weight.shape), "eps": eps}),
            needs="fused_layer_norm_cuda",
        ),
    ),
    "adamw": (Library("amp_C", "multi_tensor_adam", _apex_adam_fits, _apex_adam),),
    "fp8_linear": (
        Library(
            "transformer_engine.pytorch",
            "Linear",
            _fp8_fits,
            lambda x, weight: (
                (weight.shape[1], weight.shape[0]),
                {"bias": False, "params_dtype": weight.dtype, "device": "meta"},
            ),
            modes=("fp8",),
        ),
    ),
    "fp8_region": (
        Library(
            "transformer_engine.pytorch",
            "autocast",
            lambda recipe: True,
            lambda recipe: ((), {"enabled": True, "recipe": recipe}),
            modes=("fp8",),
        ),
    ),
    "fp8_recipe": (
        Library(
            "transformer_engine.common.recipe", "Float8CurrentScaling", lambda: True, lambda: ((), {}), modes=("fp8",)
        ),
    ),
}


@functools.cache
def _published(module: str, function: str, needs: str) -> Callable | None:
    """The library's function, or None where it is not installed; one that does not load gives one warning."""
    if any(importlib.util.find_spec(name) is None for name in (module.partition(".")[0], needs)):
        return None
    try:
        importlib.import_module(needs)
        return getattr(importlib.import_module(module), function)
    except (ImportError, OSError, AttributeError) as error:  # built for another torch, or too old to have it
        warnings.warn(
            f"{module}.{function} cannot be used ({error}): the kernel of trialign runs instead",
            RuntimeWarning,
            stacklevel=3,
        )
        return None


def _converted(call: Callable[[], Any], result: Callable[[Any], torch.Tensor]) -> torch.Tensor:
    return result(call())


def library(op: str, *arguments: Any) -> Callable[[], Any] | None:
    """The first of LIBRARIES[op] that is installed and fits the arguments, bound to them; else None."""
    for row in LIBRARIES[op]:
        if MODE in row.modes and row.fits(*arguments):
            function = _published(row.module, row.function, row.needs)
            if function is not None:
                positional, named = row.call(*arguments)
                call = functools.partial(function, *positional, **named)
                return call if row.result is None else functools.partial(_converted, call, row.result)
    return None
