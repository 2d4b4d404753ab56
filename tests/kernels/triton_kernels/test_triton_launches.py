"""Launches of Triton kernels, over the sizes of published models, equal the tables that tests/kernels/aot compiles."""

from collections import defaultdict

import launches
import pytest
import torch
from implementations import DTYPES, INTERPRET, interpreted_only
from trialign.kernels import flash_attention, nf4, paged_attention, rms_norm, swiglu

pytestmark = interpreted_only

if INTERPRET:
    from interp_shim import Monitor

op = torch.ops.trialign  # Triton kernels alone, in this mode
HEAD_DIMS = (16, 32, 64, 80, 96, 128, 192, 256)
HIDDEN = (32, 64, 128, 256, 576, 1024, 2048, 2560, 4096, 5120, 7168, 8192, 14336, 16384)
EXPERTS = (1, 4, 8, 16, 32, 60, 64, 128, 160, 256, 384, 512)
LABEL = torch.zeros(1, dtype=torch.long)


def launch_elementwise():
    x, mask = torch.ones(5), torch.ones(5, dtype=torch.bool)
    for out in (None, x.bfloat16()):
        op.adamw(x, x, x, x, out, 1e-3, 0.9, 0.95, 1e-8, 0.1, 1, 1.0)
    op.gae(x, x, mask, torch.tensor([0, 5]), 0.99, 0.95)
    for bound in (None, 3.0):
        op.policy_loss(x, x, x, 0.2, 0.2, bound)
        op.value_loss(x, x, x, bound)
    for kind in (1, 2, 3):
        op.kl_estimate(x, x, kind)


def launch_rows(dtype):
    for h in HIDDEN:
        x, weight = torch.ones(1, h, dtype=dtype), torch.ones(h, dtype=dtype)
        op.rms_norm(x, weight, 1e-5)
        op.add_rms_norm(x, x, weight, 1e-5)
        for through in (None, x):
            op.rms_norm_backward(x, x, weight, torch.ones(1), through)
    op.swiglu(x)
    op.swiglu_backward(x[:, ::2].contiguous(), x)
    one = torch.ones(1)
    op.sample(x, one, one.int(), one, LABEL, LABEL)
    op.logprob_stats(x, LABEL, 1.0, 0)
    weight = [*nf4.pack_nf4(torch.ones(3, 64))]
    op.nf4_unpack(weight, dtype)
    op.nf4_gemv(x[:, :64].contiguous(), weight)
    for grads in ((one, None), (None, one), (one, one)):
        op.logprob_backward(x, LABEL, torch.ones(4, 1), *grads, 1.0, 0)


def launch_heads(dtype):
    cu, length = torch.tensor([0, 1]), torch.ones(1, dtype=torch.int32)
    for d in HEAD_DIMS:
        for interleaved in (False, True):
            op.rope_(torch.ones(1, 2, d, dtype=dtype), *torch.ones(2, 1, d // 2), interleaved, False)
        for heads, kv_heads in ((1, 1), (8, 2), (71, 1), (112, 112)):
            q, k = torch.ones(1, heads, d, dtype=dtype), torch.ones(1, kv_heads, d, dtype=dtype)
            cache = torch.ones(1, 4, kv_heads, d, dtype=dtype)
            if kv_heads * d <= 16384:
                op.write_kv(k, k, cache, cache, LABEL)
            for slopes in (None, torch.ones(heads)):
                for window in (None, 3):
                    op.paged_attention(q, cache, cache, LABEL[None].int(), length, 1.0, slopes, window)
                    if d <= flash_attention.MAX_HEAD_DIM[dtype]:
                        out, stats = op.attention(q, k, k, cu, 1, 1.0, slopes, window)
                        op.attention_backward(q, q, k, k, out, stats, cu, 1, 1.0, slopes, window)
    for d in (64, 128, 256):
        q, cache = torch.ones(1, 1, d, dtype=dtype), torch.ones(1, 4, 1, d, dtype=dtype)
        for splits in paged_attention._SPLITS:
            keys = splits * (paged_attention.LEAST if splits <= 16 else paged_attention.LONGEST)
            op.paged_attention(q, cache, cache, LABEL.int().expand(1, keys // 4), length, 1.0, None, None)


def launch_experts(dtype):
    x = torch.ones(1, 16, dtype=dtype)
    for experts in EXPERTS:
        for k in {1, min(2, experts), min(10, experts)}:
            logits, chosen = torch.zeros(1, experts, dtype=dtype), torch.zeros(1, k, dtype=torch.long)
            order, weights, rows = torch.arange(k), torch.ones(1, k), x.repeat(k, 1)
            for normalize in (True, False):
                op.route(logits, k, normalize)
                op.route_backward(weights, logits, weights, chosen, normalize)
            op.sort_by_expert(chosen, experts)
            op.permute(x, order, k)
            for given in (None, weights):
                op.unpermute(rows, order, given, k)
            op.unpermute_backward(x, rows, order, weights)
        offsets = torch.ones(experts + 1, dtype=torch.int32)
        op.grouped_matmul(x, torch.ones(experts, 16, 8, dtype=dtype), offsets)
        op.grouped_outer(x, x, offsets)


@pytest.mark.parametrize("arch", launches.ARCHITECTURES)
def test_launches_equal_the_tables(arch, monkeypatch):
    """Nothing is executed. Each launch is in its kernel's table, and each config in a table is launched."""
    launched = defaultdict(set)  # {kernel: {(fp32 or not, compile-time values)}}

    def watch(kernel, arguments):
        launches.check(kernel, arguments, arch)
        spec = launches.KERNELS[kernel][1]
        wide = spec.fp32_configs is not None and launches.is_wide(spec, arguments)
        launched[kernel].add((wide, launches.bound(arguments, spec)))

    monkeypatch.setattr(Monitor, "execute", False)
    monkeypatch.setattr(Monitor, "watch", staticmethod(watch))
    monkeypatch.setattr(rms_norm, "vendor", lambda: "hip" if arch.startswith("gfx") else "cuda")
    monkeypatch.setattr(flash_attention, "architecture", lambda device: arch)
    launch_elementwise()
    for dtype in DTYPES:
        for launch in (launch_rows, launch_heads, launch_experts):
            launch(dtype)
    for kernel, (name, spec) in launches.KERNELS.items():
        expected = {(False, launches.bound(config, spec)) for config in launches.table(spec, False, arch)}
        expected |= {(True, launches.bound(config, spec)) for config in spec.fp32_configs or ()}
        assert launched[kernel] == expected, f"{name}: in SPECS, but never launched"


def test_launches_outside_the_tables_are_refused(monkeypatch):
    x, rstd, constants = torch.ones(2, 8), torch.ones(2), rms_norm._constants(8)
    with pytest.raises(ValueError, match="rms_norm.forward is launched with add = 1, where SPECS has u1"):
        rms_norm._forward[(2,)](x, x, x[0], x, x, rstd, 2, 8, 1e-5, 1, **constants)
    with pytest.raises(ValueError, match="with rstd = torch.bfloat16, where SPECS has \\*fp32"):
        rms_norm._forward[(2,)](x, x, x[0], x, x, rstd.bfloat16(), 2, 8, 1e-5, True, **constants)
    for option in ({"num_warps": 2}, {"num_stages": 7}, {"BLOCK": 512}):
        with monkeypatch.context() as patch:
            patch.setattr(swiglu, "_CONFIG", swiglu._CONFIG | option)
            with pytest.raises(ValueError, match="swiglu.forward is launched with values that SPECS does not have"):
                op.swiglu(x)


@pytest.mark.parametrize(
    "launch, message",
    [
        (lambda: op.rms_norm(torch.ones(1, 16385), torch.ones(16385), 1e-5), "rows of 16385"),
        (lambda: op.route(torch.ones(1, 513), 2, True), "513 experts"),
        (lambda: op.route(torch.ones(1, 64), 17, True), "17 of 64 experts"),
        (lambda: paged_attention._write_constants(16385), "16385 numbers of keys"),
        (lambda: paged_attention._decode_constants(1, 257, 16, torch.float32), "head_dim 257"),
    ],
)
def test_sizes_beyond_the_tables_are_refused(launch, message):
    with pytest.raises(ValueError, match=message):
        launch()
