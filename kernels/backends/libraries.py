"""Optional libraries whose kernels replace those of trialign on CUDA where they are installed and fit the call.

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

from ..dispatch import HALF, MODE


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


def _flash_attention_fits(q, k, v, cu_seqlens, max_seqlen, scale, alibi_slopes, window) -> bool:
    wide = q.shape[2] > 256 or q.shape[2] % 8 != 0
    return q.is_cuda and q.dtype in HALF and not wide and max_seqlen > 0 and (window is None or window > 0)


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
        "alibi_slopes": alibi_slopes,
        "deterministic": True,  # else d q is summed in any order, and a resumed run would differ
    }


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


# The three FP8 rows are parts of one call (kernels/linear.py): the layer, the region in which it multiplies in FP8, and
# the recipe, which keeps no history between calls (a checkpoint would have to store it).
LIBRARIES = {
    "attention": Library("flash_attn", "flash_attn_varlen_func", _flash_attention_fits, _flash_attention),
    "rms_norm": Library(
        "apex.normalization.fused_layer_norm",
        "fused_rms_norm_affine",
        lambda x, weight, eps: x.is_cuda and x.dtype == weight.dtype and x.numel() > 0,
        lambda x, weight, eps: ((x, weight), {"normalized_shape": tuple(weight.shape), "eps": eps}),
        needs="fused_layer_norm_cuda",
    ),
    "adamw": Library("amp_C", "multi_tensor_adam", _apex_adam_fits, _apex_adam),
    "fp8_linear": Library(
        "transformer_engine.pytorch",
        "Linear",
        _fp8_fits,
        lambda x, weight: (
            (weight.shape[1], weight.shape[0]),
            {"bias": False, "params_dtype": weight.dtype, "device": "meta"},
        ),
        modes=("fp8",),
    ),
    "fp8_region": Library(
        "transformer_engine.pytorch",
        "autocast",
        lambda recipe: True,
        lambda recipe: ((), {"enabled": True, "recipe": recipe}),
        modes=("fp8",),
    ),
    "fp8_recipe": Library(
        "transformer_engine.common.recipe", "Float8CurrentScaling", lambda: True, lambda: ((), {}), modes=("fp8",)
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


def library(op: str, *arguments: Any) -> Callable[[], Any] | None:
    """LIBRARIES[op] bound to the arguments, if it is installed and fits them; else None."""
    row = LIBRARIES[op]
    if MODE not in row.modes or not row.fits(*arguments):
        return None
    function = _published(row.module, row.function, row.needs)
    if function is None:
        return None
    positional, named = row.call(*arguments)
    return functools.partial(function, *positional, **named)
