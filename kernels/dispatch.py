"""Which implementation of an op runs: C++ on the CPU; a library or Triton on CUDA; the torch reference elsewhere.

TRIALIGN_KERNELS is the one switch, read when this module is imported:
    auto            (the default) what fits the tensor: LIBRARIES below where installed, our kernels else
    own             as auto, but never a library's kernel
    fp8             as auto, and decoder layers multiply in FP8 where Transformer Engine is installed: other numbers
    reference       plain torch everywhere
    avx2, baseline  as own, with the C++ of a lesser machine, for tests
A missing or stale trialign._C is said once: Triton still serves CUDA, and the references the CPU.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch._subclasses.fake_tensor import FakeTensor

from ..source_hash import source_hash  # pyright: ignore[reportMissingImports] (it lies in csrc/)
from .schemas import SCHEMAS

Implementation = Literal["cpp", "triton", "reference"]

MODES = ("auto", "own", "fp8", "reference", "avx2", "baseline")
HALF = (torch.bfloat16, torch.float16)
COMPILED_DTYPES = {
    "cpu": (torch.float32, torch.bfloat16),
    "cuda": (torch.float32, *HALF),
    "meta": (torch.float32, *HALF),
}


def _mode() -> str:
    mode = os.environ.get("TRIALIGN_KERNELS", "auto")
    if mode not in MODES:
        raise ValueError(f"TRIALIGN_KERNELS={mode!r}: allowed are {', '.join(MODES)}")
    return mode


def why_unusable(built_hash: str, built_torch: str, sources: Path) -> str | None:
    """What is wrong with a trialign._C built from `built_hash` against `built_torch`; None when it fits what is here.

    The extension uses torch's stable ABI, so another patch release fits; another minor release is rebuilt to be safe.
    """
    here = source_hash(sources)
    if here and here != built_hash:
        return "was built from other sources than those in csrc/"
    if built_torch.split(".")[:2] != torch.__version__.split(".")[:2]:
        return f"was built for torch {built_torch}, this is torch {torch.__version__}"
    return None


def _load() -> str | None:
    """Loads trialign._C, which registers torch.ops.trialign.*. Returns why it cannot be used, or None.

    What it was built from is read out of the file: a stale one must not register its ops.
    """
    spec = importlib.util.find_spec("trialign._C")
    if spec is None or spec.origin is None:
        return "is not built"
    module = Path(spec.origin)
    facts = re.search(rb"trialign\._C built from <(\w+)> for torch <([^>]+)>", module.read_bytes())
    built_hash, built_torch = (fact.decode() for fact in facts.groups()) if facts else ("", torch.__version__)
    problem = why_unusable(built_hash, built_torch, module.parent)
    if problem is None:
        try:
            importlib.import_module("trialign._C")
        except ImportError as error:
            problem = f"does not load ({error})"
    return problem


MODE = _mode()
PROBLEM = None if MODE == "reference" else _load()
EXTENSION = MODE != "reference" and PROBLEM is None
if PROBLEM and os.environ.get("RANK", "0") == "0":
    warnings.warn(
        f"trialign._C {PROBLEM}: plain torch serves instead, several times slower. "
        "`pip install -e . --no-build-isolation --no-deps -v` builds it and shows what it lacks.",
        RuntimeWarning,
        stacklevel=2,
    )


@functools.cache
def has_op(op: str) -> bool:
    """True when trialign._C is usable and has the op."""
    return EXTENSION and hasattr(torch.ops.trialign, op)


def has_cuda(op: str) -> bool:
    """True when the op has an implementation for CUDA tensors: CUDA C++ of trialign._C, or Triton's once registered."""
    name = f"trialign::{op}"
    return hasattr(torch.ops.trialign, op) and torch._C._dispatch_has_kernel_for_dispatch_key(name, "CUDA")


@functools.cache
def has_triton() -> bool:
    """True when Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def choose(op: str, tensor: torch.Tensor) -> Implementation:
    """The implementation of torch.ops.trialign.`op` that fits the tensor's device and, of numbers, its dtype."""
    device = tensor.device.type
    if device not in COMPILED_DTYPES or (tensor.is_floating_point() and tensor.dtype not in COMPILED_DTYPES[device]):
        return "reference"
    if device == "meta":  # the op's fake knows the shapes, whoever would serve
        return "cpp" if has_op(op) else "triton" if hasattr(torch.ops.trialign, op) else "reference"
    if device == "cpu":
        return "cpp" if has_op(op) else "reference"
    return "triton" if has_cuda(op) else "reference"


def holds_data(tensor: torch.Tensor) -> bool:
    """False for meta and fake tensors, whose numbers cannot be looked at."""
    return not (tensor.is_meta or isinstance(tensor, FakeTensor))


_definitions = torch.library.Library("trialign", "FRAGMENT")


def register(
    op: str,
    fake: Callable,
    setup_context: Callable | None = None,
    backward: Callable | None = None,
    triton: Callable | None = None,
) -> None:
    """Gives torch.ops.trialign.`op` its shapes for FakeTensor and meta runs, its gradient and its Triton launcher.

    The schema, the CPU implementation and, where nvcc was found, CUDA C++ ones come from csrc/ (those go before
    Triton's). Without a usable trialign._C the schema is that of SCHEMAS and Triton's the only implementation.
    """
    if not has_op(op):
        if MODE == "reference" or triton is None or not has_triton():
            return
        _definitions.define(op + SCHEMAS[op])
    torch.library.register_fake(f"trialign::{op}", fake)
    if triton is not None and has_triton() and not has_cuda(op):
        torch.library.impl(f"trialign::{op}", "CUDA")(triton)
    if backward is not None:
        torch.library.register_autograd(f"trialign::{op}", backward, setup_context=setup_context)


@dataclass(frozen=True)
class Library:
    """A published function that serves an op where its package is installed."""

    module: str
    """What is imported."""
    function: str
    """Its name in the module."""
    fits: Callable[..., bool]
    """Whether the function can serve a call, by the arguments of ours."""
    call: Callable[..., tuple[tuple, dict[str, Any]]]
    """Its positional and keyword arguments, by the arguments of ours."""
    modes: tuple[str, ...] = ("auto", "fp8")
    """The modes in which it may serve."""
    needs: str = "torch"
    """A compiled module that it imports only when it is called."""


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
        "window_size": (-1, -1) if window is None else (window - 1, 0),  # keys to the left, the query's own apart
        "alibi_slopes": alibi_slopes,
        "deterministic": True,  # its gradient of q otherwise sums in any order, and a resumed run would differ
    }


def _apex_adam_fits(
    master, exp_avg, exp_avg_sq, grad, param_out, lr, beta1, beta2, eps, weight_decay, step, scale
) -> bool:
    """It has neither a clip scale that leaves the gradient alone nor a copy-out, and indexes by 32 bits."""
    return master.is_cuda and param_out is None and scale == 1.0 and 0 < master.numel() < 2**31


def _apex_adam(master, exp_avg, exp_avg_sq, grad, param_out, lr, beta1, beta2, eps, weight_decay, step, scale):
    chunk, decoupled, bias_correction = 2048 * 32, 1, 1
    unused = torch.zeros(1, dtype=torch.int32, device=master.device)  # its overflow flag
    tensors = [[grad], [master], [exp_avg], [exp_avg_sq]]
    numbers = (lr, beta1, beta2, eps, step, decoupled, bias_correction, weight_decay)
    return (chunk, unused, tensors, *numbers), {}


def _fp8_fits(x, weight) -> bool:
    """Its products take inner and outer sizes that are multiples of 16, on a device that multiplies FP8."""
    if not x.is_cuda or x.dtype not in HALF or x.dtype != weight.dtype or x.numel() == 0:
        return False
    return all(size % 16 == 0 for size in weight.shape) and torch.cuda.get_device_capability(x.device) >= (8, 9)


# Who serves an op on CUDA where it is installed; never required. The three rows of FP8 are parts of one call
# (kernels/linear.py): the layer, the region in which it multiplies in FP8, and the recipe, which keeps no history
# between calls that a checkpoint would have to carry.
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
        "transformer_engine.common.recipe",
        "Float8CurrentScaling",
        lambda: True,
        lambda: ((), {}),
        modes=("fp8",),
    ),
}


@functools.cache
def _published(module: str, function: str, needs: str) -> Callable | None:
    """The library's function, or None where it is not installed; one that is there but does not load is said once."""
    if any(importlib.util.find_spec(name) is None for name in (module.partition(".")[0], needs)):
        return None
    try:
        importlib.import_module(needs)
        return getattr(importlib.import_module(module), function)
    except (ImportError, OSError, AttributeError) as error:  # built for another torch, or too old to have it
        warnings.warn(f"{module}.{function} cannot be used ({error}): our own serves", RuntimeWarning, stacklevel=3)
        return None


def library(op: str, *arguments: Any) -> Callable[[], Any] | None:
    """The call of LIBRARIES[op], ready to be made, if its package is here and serves such arguments; else None."""
    row = LIBRARIES[op]
    if MODE not in row.modes or not row.fits(*arguments):
        return None
    function = _published(row.module, row.function, row.needs)
    if function is None:
        return None
    positional, named = row.call(*arguments)
    return functools.partial(function, *positional, **named)
