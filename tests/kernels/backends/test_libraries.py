"""torch's own kernels, flash-attn, apex and Transformer Engine: called where they fit, ours elsewhere; stand-ins by the
rules of those that are not installed."""

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.attention.varlen as varlen
import torch.nn.functional as F
from tiny import tiny_llama
from torch.utils._python_dispatch import TorchDispatchMode
from trialign.algorithms.batch import pack
from trialign.algorithms.roles.role import stage_forward
from trialign.engine.mesh import build_mesh
from trialign.kernels import attention, dispatch, grouped_matmul, linear
from trialign.kernels.backends.libraries import LIBRARIES, in_order, library
from trialign.models.decoder import Decoder
from trialign.models.families.registry import read_config

DETERMINISTIC: Any = torch.utils.deterministic  # a module with a property


def by_rules(q, k, v, cu_seqlens, scale, window_size, alibi_slopes=None):
    """Attention with a window of (left, right) keys, -1 for all, one document after the other."""
    assert cu_seqlens.dtype == torch.int32
    out, (left, right) = torch.empty_like(q), window_size
    for start, end in pairwise(cu_seqlens.tolist()):
        i, j = torch.arange(end - start)[:, None], torch.arange(end - start)[None, :]
        visible = ((j >= i - left) | (left < 0)) & ((j <= i + right) | (right < 0))
        for head in range(q.shape[1]):
            of_group = head // (q.shape[1] // k.shape[1])
            scores = q[start:end, head] @ k[start:end, of_group].T * scale
            if alibi_slopes is not None:
                scores = scores - alibi_slopes[head].double() * (i - j).abs()
            out[start:end, head] = scores.masked_fill(~visible, -torch.inf).softmax(1) @ v[start:end, of_group]
    return out


def flash_attn_2(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None,
):  # fmt: skip
    """The signature of flash-attn 2.8; causal: no key to the right."""
    assert causal and deterministic and max_seqlen_q == max_seqlen_k and cu_seqlens_q is cu_seqlens_k
    return by_rules(q, k, v, cu_seqlens_q, softmax_scale, (window_size[0], 0), alibi_slopes)


def flash_attn_3(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_q=None, seqused_k=None, softmax_scale=None,
    causal=False, qv=None, q_descale=None, k_descale=None, v_descale=None, window_size=(-1, -1), attention_chunk=0,
    softcap=0.0, num_splits=1, pack_gqa=None, deterministic=False, sm_margin=0, return_attn_probs=False,
):  # fmt: skip
    """The signature of flash-attn 3, which has returned the log-sum-exp too."""
    assert causal and deterministic and max_seqlen_q == max_seqlen_k and cu_seqlens_q is cu_seqlens_k
    return by_rules(q, k, v, cu_seqlens_q, softmax_scale, (window_size[0], 0)), torch.zeros(1)


def varlen_attn(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, **options):
    """torch's, whose own check of the call runs first, on meta tensors."""
    case = [t.to("meta", torch.bfloat16) if t.is_floating_point() else t.to("meta") for t in (query, key, value)]
    assert varlen.varlen_attn(*case, *[cu_seq_q.to("meta")] * 2, max_q, max_k, **options).shape == query.shape
    assert max_q == max_k and cu_seq_q is cu_seq_k
    return by_rules(query, key, value, cu_seq_q, options["scale"], options["window_size"])


@pytest.mark.parametrize("row, function", [*enumerate([flash_attn_3, flash_attn_2, varlen_attn])])
@pytest.mark.parametrize("window, alibi", [(None, False), (3, True), (3, False), (1, False)])
def test_attention_calls_equal_the_reference_by_the_libraries_rules(row, function, window, alibi):
    if alibi and function is not flash_attn_2:
        return  # `fits` refuses
    torch.manual_seed(0)
    q, k, v = (torch.randn(12, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625]) if alibi else None
    entry, case = LIBRARIES["attention"][row], (q, k, v, torch.tensor([0, 5, 5, 12]), 7, 0.3, slopes, window)
    positional, named = entry.call(*case)
    out, exact = function(*positional, **named), attention.packed_attention_ref(*case)
    out = entry.result(out) if entry.result else out
    torch.testing.assert_close(out, exact, rtol=1e-12, atol=1e-12)


def test_varlen_backward_sums_in_one_order():
    """Its node runs with torch's switch for deterministic algorithms on, without filling memory, and leaves it off."""
    seen = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if "varlen_attn" in str(func):
                fill = DETERMINISTIC.fill_uninitialized_memory
                seen.append((str(func), torch.are_deterministic_algorithms_enabled(), fill))
            return func(*args, **(kwargs or {}))

    q, k, v = (torch.empty(12, h, 64, dtype=torch.bfloat16, device="meta", requires_grad=True) for h in (4, 2, 2))
    bounds = torch.empty(3, dtype=torch.int32, device="meta")
    positional, named = LIBRARIES["attention"][2].call(q, k, v, bounds, 7, 0.5, None, None)
    function: Any = varlen.varlen_attn
    assert in_order(function(*(t.detach() for t in positional[:3]), *positional[3:], **named)).shape == q.shape
    out = in_order(function(*positional, **named))
    for _ in range(2):
        with Watch():
            torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True)
    assert seen == [("torch_attn._varlen_attn_backward.default", True, False)] * 2
    assert not torch.are_deterministic_algorithms_enabled() and DETERMINISTIC.fill_uninitialized_memory


@pytest.mark.parametrize("counts", [[8, 0, 16], [3, 1, 20]])
def test_grouped_mm_calls_equal_a_loop(counts):
    """torch has grouped_mm on the CPU too: the calls, with real numbers, on a transposed weight as experts have it."""
    torch.manual_seed(0)
    x, grad = torch.randn(24, 16, dtype=torch.bfloat16), torch.randn(24, 8, dtype=torch.bfloat16)
    weight = torch.randn(3, 8, 16, dtype=torch.bfloat16).transpose(1, 2)
    offsets = torch.tensor([0, *counts]).cumsum(0).int()
    for op, case, loop in (
        ("grouped_matmul", (x, weight), grouped_matmul.grouped_matmul_ref),
        ("grouped_matmul", (grad, weight.transpose(1, 2)), grouped_matmul.grouped_matmul_ref),
        ("grouped_outer", (x, grad), grouped_matmul.grouped_outer_ref),
    ):
        (row,) = LIBRARIES[op]
        positional, named = row.call(*case, offsets)
        assert row.function == F.grouped_mm.__name__
        torch.testing.assert_close(F.grouped_mm(*positional, **named), loop(*case, offsets), rtol=0.02, atol=0.02)


AMP_C = """
calls = []
def multi_tensor_adam(chunk, noop_flag, tensor_lists, lr, beta1, beta2, epsilon, step, mode, bias_correction, decay):
    calls.append(chunk)
    for g, p, m, v in zip(*tensor_lists):
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).add_(g * g, alpha=1 - beta2)
        first, second = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1, 1)
        update = (m / first) / ((v / second).sqrt() + epsilon)
        p.sub_(lr * (update + decay * p if mode == 1 else update))
"""
APEX_NORM = """
calls = []
def fused_rms_norm_affine(input, weight, normalized_shape, eps=1e-6, memory_efficient=False):
    assert tuple(normalized_shape) == tuple(weight.shape)
    calls.append(eps)
    return weight * input * (input.pow(2).mean(-1, keepdim=True) + eps).rsqrt()
"""
FLASH = """
import torch
calls = []
def flash_attn_varlen_func(q, k, v, **named):
    calls.append(named)
    return torch.empty_like(q)
"""
# The signatures of transformer-engine 2.20.2 on PyPI.
TRANSFORMER_ENGINE = """
import contextlib, torch
calls = []
class Linear(torch.nn.Linear):
    def __init__(
        self, in_features, out_features, sequence_parallel=False, fuse_wgrad_accumulation=False, tp_group=None,
        tp_size=1, get_rng_state_tracker=None, rng_tracker_name=None, init_method=None, bias=True, return_bias=False,
        params_dtype=None, parallel_mode=None, parameters_split=None, device="cuda", ub_overlap_ag=False,
        ub_overlap_rs=False, ub_overlap_rs_dgrad=False, ub_bulk_dgrad=False, ub_bulk_wgrad=False, ub_name=None,
        delay_wgrad_compute=False, symmetric_ar_type=None, save_original_input=False, name=None,
    ):
        super().__init__(in_features, out_features, bias=bias, dtype=params_dtype, device=device)
    def forward(self, inp, is_first_microbatch=None, fp8_output=False, fp8_grad=False):
        assert calls and inp.dim() == 2 and inp.shape[0] % 32 == 0
        return super().forward(inp)
@contextlib.contextmanager
def autocast(enabled=True, calibrating=False, recipe=None, amax_reduction_group=None, _graph=False):
    assert enabled and type(recipe).__name__ == "Float8CurrentScaling"
    calls.append(recipe)
    yield
"""
STAND_INS = {  # module: its source, by the libraries' published rules
    "amp_C": AMP_C,
    "apex.normalization.fused_layer_norm": APEX_NORM,
    "flash_attn": FLASH,
    "flash_attn_interface": FLASH,
    "fused_layer_norm_cuda": "",
    "transformer_engine.common.recipe": "class Float8CurrentScaling: pass",
    "transformer_engine.pytorch": TRANSFORMER_ENGINE,
}
SCRIPT = """
import sys, torch
import torch.nn.attention.varlen as varlen
from dataclasses import replace
from torch._subclasses.fake_tensor import FakeTensorMode
from trialign.kernels.adamw import adamw_, adamw_ref_
from trialign.kernels.attention import packed_attention
from trialign.kernels.backends.libraries import LIBRARIES, library
from trialign.kernels.linear import layer_linear, linear
from trialign.kernels.rms_norm import rms_norm, rms_norm_ref
HYPER = (3e-3, 0.9, 0.95, 1e-8, 0.1, 7)
torch.cuda.get_device_capability = lambda device=None: CHIP
bf16 = {"dtype": torch.bfloat16, "device": "cuda"}
def calls(*names):
    return [len(sys.modules[name].calls) if name in sys.modules else 0 for name in names]
"""
APEX = """
with FakeTensorMode():
    buffers = [torch.empty(9, device="cuda") for _ in range(4)]
    adamw_(*buffers, None, *HYPER)
    adamw_(*buffers, torch.empty(9, **bf16), *HYPER)  # it has no copy-out
    adamw_(*buffers, None, *HYPER, 0.5)  # nor a clip scale
    x, weight = torch.empty(3, 8, **bf16), torch.empty(8, **bf16)
    assert rms_norm(x, weight, 1e-5).shape == x.shape
    rms_norm(x, weight.float(), 1e-5)  # nor two dtypes
print(calls("amp_C", "apex.normalization.fused_layer_norm"))
for op in ("adamw", "rms_norm"):  # the values, on the CPU
    LIBRARIES[op] = (replace(LIBRARIES[op][0], fits=lambda *_: True),)
actual = [torch.randn(50), torch.randn(50), torch.rand(50), torch.randn(50)]
expected = [t.clone() for t in actual]
adamw_(*actual, None, *HYPER)
adamw_ref_(*expected, None, *HYPER)
torch.testing.assert_close(actual, expected)
x, weight = torch.randn(3, 8), torch.randn(8)
torch.testing.assert_close(rms_norm(x, weight, 1e-5), rms_norm_ref(x, weight, 1e-5))
print(calls("amp_C", "apex.normalization.fused_layer_norm"))
"""
# What serves each case; TORCH: of torch's own libraries, VARLEN that its build has flash-attn.
ATTENTION = """
torch.backends.cuda.is_flash_attention_available = lambda: True
varlen.varlen_attn = lambda *a, f=varlen.varlen_attn, **k: served.append("varlen") or f(*a, **k)
served = []
for dtype, d, window, alibi in (
    (torch.bfloat16, 64, None, False), (torch.float16, 256, 3, False), (torch.float32, 64, None, False),
    (torch.bfloat16, 20, None, False), (torch.bfloat16, 96, None, True),
):
    before = calls("flash_attn_interface", "flash_attn")
    with FakeTensorMode():
        q, k, v = (torch.empty(12, heads, d, dtype=dtype, device="cuda") for heads in (4, 2, 2))
        cu, slopes = torch.empty(4, dtype=torch.int64, device="cuda"), torch.empty(4, device="cuda") if alibi else None
        count = len(served)
        out = packed_attention(q, k, v, cu, 7, 0.5, slopes, window)
        assert out.shape == q.shape and out.device.type == "cuda"
    new = [b - a for a, b in zip(before, calls("flash_attn_interface", "flash_attn"))]
    served += ["3"] * new[0] + ["2"] * new[1] if len(served) == count else []
    served += ["own"] if len(served) == count else []
print(*served)
"""
GROUPED = """
served = []
def serve(op, *case, shape):
    found = library(op, *case)
    if found is not None:
        assert found().shape == shape  # torch's own checks of the call
    served.append("own" if found is None else "torch")
with FakeTensorMode():
    on = lambda *shape, dtype=torch.bfloat16: torch.empty(*shape, dtype=dtype, device="cuda")
    offsets, half = on(4, dtype=torch.int32), {"dtype": torch.float16}
    for x, weight in (
        (on(24, 16), on(3, 16, 8)), (on(24, 16), on(3, 8, 16).transpose(1, 2)), (on(24, 16), on(3, 16, 12)),
        (on(24, 16, **half), on(3, 16, 8, **half)), (on(24, 16), on(3, 16, 24).narrow(2, 4, 8)),
        (on(0, 16), on(3, 16, 8)),
    ):
        serve("grouped_matmul", x, weight, offsets, shape=(len(x), weight.shape[2]))
    for x, grad in ((on(24, 16), on(24, 8)), (on(24, 16), on(24, 12))):
        serve("grouped_outer", x, grad, offsets, shape=(3, 16, grad.shape[1]))
print(*served)
"""
FP8 = """
with FakeTensorMode():
    x, weight, odd = (torch.empty(*s, 48, **bf16) for s in ((3, 5), (64,), (15,)))
    assert layer_linear(x, weight).shape == (3, 5, 64) and layer_linear(x, odd).shape == (3, 5, 15)
    linear(x, weight)  # as the head's: never in FP8
print(calls("transformer_engine.pytorch"))
"""


def run(
    script: str, path: Path, modules: dict[str, str], mode: str | None = None, chip: tuple[int, int] = (9, 0)
) -> subprocess.CompletedProcess:
    """The script in a process of its own, with these modules installed."""
    for name, source in modules.items():
        file = path.joinpath(*name.split(".")).with_suffix(".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        for folder in file.relative_to(path).parents[:-1]:
            (path / folder / "__init__.py").touch()
        file.write_text(source)
    env = {k: v for k, v in os.environ.items() if k not in ("TRIALIGN_KERNELS", "TRITON_INTERPRET")}
    env |= {"PYTHONPATH": str(path)} | ({"TRIALIGN_KERNELS": mode} if mode else {})
    command = [sys.executable, "-c", f"CHIP = {chip}{SCRIPT}{script}"]
    result = subprocess.run(command, env=env, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr[-2000:]
    return result


needs_triton = pytest.mark.skipif(not dispatch.has_triton(), reason="Triton is not installed")
needs_both = pytest.mark.skipif(not (dispatch.has_triton() and dispatch.EXTENSION), reason="needs Triton, trialign._C")


@pytest.mark.parametrize(
    "script, mode, calls",
    [
        pytest.param(APEX, "auto", ["[1, 1]", "[2, 2]"], marks=needs_both),
        pytest.param(APEX, "own", ["[0, 0]", "[0, 0]"], marks=needs_both),
        pytest.param(ATTENTION, "own", ["own own own own own"], marks=needs_triton),
        (FP8, "fp8", ["[1]"]),
        (FP8, "auto", ["[0]"]),
    ],
)
def test_installed_library_takes_the_calls_that_fit(script, mode, calls, tmp_path):
    assert run(script, tmp_path, STAND_INS, mode).stdout.splitlines()[: len(calls)] == calls


@needs_triton
@pytest.mark.parametrize(
    "installed, chip, served",
    [
        (("flash_attn_interface", "flash_attn"), (9, 0), "3 2 own own 2"),
        (("flash_attn_interface", "flash_attn"), (8, 0), "2 2 own own 2"),
        ((), (9, 0), "varlen varlen own own own"),
        ((), (8, 6), "varlen own own own own"),  # its backward of wide heads does not fit
        (("flash_attn",), (7, 5), "own own own own own"),
    ],
)
def test_attention_is_served_by_the_first_library_that_fits(installed, chip, served, tmp_path):
    result = run(ATTENTION, tmp_path, {name: STAND_INS[name] for name in installed}, "auto", chip)
    assert result.stdout == f"{served}\n" and "flash_attn" not in result.stderr


@pytest.mark.parametrize(
    "chip, served",
    [
        ((9, 0), "torch torch own own own own torch own"),
        ((10, 0), "torch torch own own own own own own"),
        ((8, 0), "own own own own own own own own"),
    ],
)
def test_grouped_mm_serves_where_it_fits(chip, served, tmp_path):
    assert run(GROUPED, tmp_path, {}, "auto", chip).stdout == f"{served}\n"


@needs_triton
def test_failing_library_warns_once_and_the_next_serves(tmp_path):
    result = run(ATTENTION, tmp_path, {"flash_attn": "raise ImportError('undefined symbol')"})
    assert result.stdout == "varlen varlen own own own\n"
    assert result.stderr.count("flash_attn.flash_attn_varlen_func cannot be used (undefined symbol)") == 1


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("d", [64, 128, 256])
def test_gpu_library_attention_equals_the_kernels_and_repeats_bit_for_bit(d, window):
    torch.manual_seed(0)
    q, k, v = (torch.randn(700, h, d, device="cuda", dtype=torch.bfloat16, requires_grad=True) for h in (8, 2, 2))
    bounds, upstream = torch.tensor([0, 300, 301, 700], device="cuda"), torch.randn_like(q)
    case = bounds, 399, d**-0.5, None, window
    kernel = torch.ops.trialign.attention(q, k, v, *case)[0]
    found = library("attention", q, k, v, *case)
    assert found is not None, "no library serves this GPU"
    expected = kernel, *torch.autograd.grad(kernel, (q, k, v), upstream)
    (out, *grads), (again, *repeated) = ((o, *torch.autograd.grad(o, (q, k, v), upstream)) for o in (found(), found()))
    torch.testing.assert_close((out, *grads), expected, rtol=0.03, atol=0.03)
    assert all(torch.equal(a, b) for a, b in zip((out, *grads), (again, *repeated), strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gpu_library_grouped_products_equal_the_kernels():
    torch.manual_seed(0)
    on = {"device": "cuda", "dtype": torch.bfloat16}
    x, grad, weight = torch.randn(300, 64, **on), torch.randn(300, 48, **on), torch.randn(5, 64, 48, **on)
    offsets = torch.tensor([0, 100, 100, 201, 299, 300], device="cuda", dtype=torch.int32)
    for op, case, own in (
        ("grouped_matmul", (x, weight), grouped_matmul.grouped_matmul_triton),
        ("grouped_outer", (x, grad), grouped_matmul.grouped_outer_triton),
    ):
        found = library(op, *case, offsets)
        if found is None:
            pytest.skip(f"{op}: torch's grouped_mm is not used on this GPU")
        torch.testing.assert_close(found(), own(*case, offsets), rtol=0.03, atol=0.05)


def test_the_head_is_never_multiplied_in_fp8(tmp_path, monkeypatch):
    """The sampler's head and the one training recomputes logprobs by must be one: every other matrix may be FP8."""
    model = Decoder(read_config(tiny_llama(tmp_path, tied=False)), build_mesh(), dtype=torch.float32)
    multiplied = set()
    monkeypatch.setattr(linear, "MODE", "fp8")
    monkeypatch.setattr(linear, "_fp8_linear", lambda x, w: multiplied.add(w.data_ptr()) or x @ w.T)
    model.logits(stage_forward(model, pack([[1, 2, 3]]), None))
    layers = {p.data_ptr() for name, p in model.named_parameters() if name.startswith("layers.") and p.dim() == 2}
    assert multiplied == layers and model.head is not None and model.head.weight.data_ptr() not in layers
