"""flash-attn, apex and Transformer Engine: called where they fit, our kernels elsewhere; stand-ins by their rules."""

import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from tiny import tiny_llama
from trialign.algorithms.batch import pack
from trialign.algorithms.roles.role import stage_forward
from trialign.engine.mesh import build_mesh
from trialign.kernels import attention, dispatch, linear
from trialign.kernels.backends.libraries import LIBRARIES
from trialign.models.decoder import Decoder
from trialign.models.families.registry import read_config


def flash_attn_varlen_func(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None, causal=False,
    window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False, return_attn_probs=False,
    block_table=None,
):  # fmt: skip
    """flash-attn 2.8's function by its documented rules, one document after the other, with the published signature."""
    assert cu_seqlens_q.dtype == torch.int32 and causal and max_seqlen_q == max_seqlen_k and not dropout_p
    out, (left, right) = torch.empty_like(q), window_size
    for start, end in pairwise(cu_seqlens_q.tolist()):
        i, j = torch.arange(end - start)[:, None], torch.arange(end - start)[None, :]
        visible = (j <= i) & ((j >= i - left) | (left < 0)) & ((j <= i + right) | (right < 0))
        for head in range(q.shape[1]):
            of_group = head // (q.shape[1] // k.shape[1])
            scores = q[start:end, head] @ k[start:end, of_group].T * softmax_scale
            if alibi_slopes is not None:
                scores = scores - alibi_slopes[head].double() * (i - j).abs()
            out[start:end, head] = scores.masked_fill(~visible, -torch.inf).softmax(1) @ v[start:end, of_group]
    return out


@pytest.mark.parametrize("window, slopes", [(None, False), (3, True), (1, False)])
def test_flash_attention_call_equals_the_reference_by_its_rules(window, slopes):
    torch.manual_seed(0)
    q, k, v = (torch.randn(12, heads, 8, dtype=torch.float64) for heads in (4, 2, 2))
    alibi = torch.tensor([0.5, 0.25, 0.125, 0.0625]) if slopes else None
    row, case = LIBRARIES["attention"], (q, k, v, torch.tensor([0, 5, 5, 12]), 7, 0.3, alibi, window)
    assert row.function == flash_attn_varlen_func.__name__
    positional, named = row.call(*case)
    exact = attention.packed_attention_ref(*case)
    torch.testing.assert_close(flash_attn_varlen_func(*positional, **named), exact, rtol=1e-12, atol=1e-12)


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
    "fused_layer_norm_cuda": "",
    "transformer_engine.common.recipe": "class Float8CurrentScaling: pass",
    "transformer_engine.pytorch": TRANSFORMER_ENGINE,
}
SCRIPT = """
import sys, torch
from dataclasses import replace
from torch._subclasses.fake_tensor import FakeTensorMode
from trialign.kernels.adamw import adamw_, adamw_ref_
from trialign.kernels.attention import packed_attention
from trialign.kernels.backends.libraries import LIBRARIES
from trialign.kernels.linear import layer_linear, linear
from trialign.kernels.rms_norm import rms_norm, rms_norm_ref
HYPER = (3e-3, 0.9, 0.95, 1e-8, 0.1, 7)
torch.cuda.get_device_capability = lambda device=None: (9, 0)
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
    LIBRARIES[op] = replace(LIBRARIES[op], fits=lambda *_: True)
actual = [torch.randn(50), torch.randn(50), torch.rand(50), torch.randn(50)]
expected = [t.clone() for t in actual]
adamw_(*actual, None, *HYPER)
adamw_ref_(*expected, None, *HYPER)
torch.testing.assert_close(actual, expected)
x, weight = torch.randn(3, 8), torch.randn(8)
torch.testing.assert_close(rms_norm(x, weight, 1e-5), rms_norm_ref(x, weight, 1e-5))
print(calls("amp_C", "apex.normalization.fused_layer_norm"))
"""
ATTENTION = """
served = []
for dtype, d, window, alibi in (
    (torch.bfloat16, 64, None, False), (torch.float16, 256, 3, False), (torch.float32, 64, None, False),
    (torch.bfloat16, 20, None, False), (torch.bfloat16, 96, None, True),
):
    with FakeTensorMode():
        q, k, v = (torch.empty(12, heads, d, dtype=dtype, device="cuda") for heads in (4, 2, 2))
        cu, slopes = torch.empty(4, dtype=torch.int64, device="cuda"), torch.empty(4, device="cuda") if alibi else None
        out = packed_attention(q, k, v, cu, 7, 0.5, slopes, window)
        assert out.shape == q.shape and out.device.type == "cuda"
    served += calls("flash_attn")
print(served)
"""
FP8 = """
with FakeTensorMode():
    x, weight, odd = (torch.empty(*s, 48, **bf16) for s in ((3, 5), (64,), (15,)))
    assert layer_linear(x, weight).shape == (3, 5, 64) and layer_linear(x, odd).shape == (3, 5, 15)
    linear(x, weight)  # as the head's: never in FP8
print(calls("transformer_engine.pytorch"))
"""


def run(script: str, path: Path, modules: dict[str, str], mode: str | None = None) -> subprocess.CompletedProcess:
    """The script in a process of its own, with these modules installed."""
    for name, source in modules.items():
        file = path.joinpath(*name.split(".")).with_suffix(".py")
        file.parent.mkdir(parents=True, exist_ok=True)
        for folder in file.relative_to(path).parents[:-1]:
            (path / folder / "__init__.py").touch()
        file.write_text(source)
    env = {k: v for k, v in os.environ.items() if k not in ("TRIALIGN_KERNELS", "TRITON_INTERPRET")}
    env |= {"PYTHONPATH": str(path)} | ({"TRIALIGN_KERNELS": mode} if mode else {})
    command = [sys.executable, "-c", SCRIPT + script]
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
        pytest.param(ATTENTION, "auto", ["[1, 2, 2, 2, 3]"], marks=needs_triton),
        pytest.param(ATTENTION, "own", ["[0, 0, 0, 0, 0]"], marks=needs_triton),
        (FP8, "fp8", ["[1]"]),
        (FP8, "auto", ["[0]"]),
    ],
)
def test_installed_library_takes_the_calls_that_fit(script, mode, calls, tmp_path):
    assert run(script, tmp_path, STAND_INS, mode).stdout.splitlines()[: len(calls)] == calls


@needs_triton
def test_missing_library_is_silent_and_a_failing_one_warns_once(tmp_path):
    result = run(ATTENTION, tmp_path, {})
    assert result.stdout == "[0, 0, 0, 0, 0]\n" and "flash_attn" not in result.stderr
    result = run(ATTENTION, tmp_path, {"flash_attn": "raise ImportError('undefined symbol')"})
    assert result.stdout == "[0, 0, 0, 0, 0]\n"
    assert result.stderr.count("flash_attn.flash_attn_varlen_func cannot be used (undefined symbol)") == 1


def test_the_head_is_never_multiplied_in_fp8(tmp_path, monkeypatch):
    """The sampler's head and the one training recomputes logprobs by must be one: every other matrix may be FP8."""
    model = Decoder(read_config(tiny_llama(tmp_path, tied=False)), build_mesh(), dtype=torch.float32)
    multiplied = set()
    monkeypatch.setattr(linear, "MODE", "fp8")
    monkeypatch.setattr(linear, "_fp8_linear", lambda x, w: multiplied.add(w.data_ptr()) or x @ w.T)
    model.logits(stage_forward(model, pack([[1, 2, 3]]), None))
    layers = {p.data_ptr() for name, p in model.named_parameters() if name.startswith("layers.") and p.dim() == 2}
    assert multiplied == layers and model.head is not None and model.head.weight.data_ptr() not in layers
