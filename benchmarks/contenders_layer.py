"""Cases of the ops of a decoder layer and of its cache, with their contenders."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable

import torch
import torch.nn.functional as F
from case import HIDDEN, Case, Run, autograd_function, case, compiled
from torch import Tensor
from trialign.kernels.attention import packed_attention, sdpa_attention
from trialign.kernels.linear import linear
from trialign.kernels.moe import grouped_matmul, permute, route, sort_by_expert, unpermute
from trialign.kernels.nf4 import BLOCK, TABLE, dequantize_scales, nf4_linear, pack_nf4
from trialign.kernels.paged_attention import paged_attention, write_kv
from trialign.kernels.rms_norm import add_rms_norm, rms_norm
from trialign.kernels.rope import rope_
from trialign.kernels.swiglu import swiglu

EPS = 1e-5


def eager_norm(x, weight):
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)).to(x.dtype)


def hand_norm_forward(x, weight):
    wide = x.float()
    rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
    return weight * (wide * rstd).to(x.dtype), (x, weight, rstd)


def hand_norm_backward(saved, g):
    x, weight, rstd = saved
    wide, m = x.float(), g.float() * weight.float()
    grad_weight = (g.float() * wide * rstd).sum(0).to(weight.dtype)
    grad = rstd * (m - wide * (rstd * rstd * (m * wide).mean(-1, keepdim=True)))
    return grad.to(x.dtype), grad_weight


def norm(dtype: torch.dtype) -> Case:
    x, weight = torch.randn(4096, HIDDEN).to(dtype), torch.randn(HIDDEN).to(dtype)
    return case(
        f"[4096, {HIDDEN}]",
        (x, weight),
        (0, 1),
        trialign=lambda x, w: rms_norm(x, w, EPS),
        eager=eager_norm,
        torch=lambda x, w: F.rms_norm(x, (HIDDEN,), w, EPS),
        compile=compiled(eager_norm),
        liger=autograd_function(hand_norm_forward, hand_norm_backward),
    )


def add_norm(dtype: torch.dtype) -> Case:
    x, residual, weight = (torch.randn(4096, HIDDEN).to(dtype) for _ in range(3))

    def eager(x, residual, weight):
        total = x + residual
        return eager_norm(total, weight), total

    return case(
        f"[4096, {HIDDEN}]",
        (x, residual, weight[0].clone()),
        (0, 1, 2),
        trialign=lambda x, r, w: add_rms_norm(x, r, w, EPS),
        eager=eager,
        compile=compiled(eager),
    )


def rotary(dtype: torch.dtype) -> Case:
    def turn(x, cos, sin):
        a, b = x.chunk(2, -1)
        cos, sin = cos[:, None].to(x.dtype), sin[:, None].to(x.dtype)
        return x * torch.cat((cos, cos), -1) + torch.cat((-b, a), -1) * torch.cat((sin, sin), -1)

    angles = torch.arange(4096)[:, None] * 10_000.0 ** (-torch.arange(32) / 32)
    return case(
        "[4096, 9 heads, 64]",
        (torch.randn(4096, 9, 64).to(dtype), angles.cos(), angles.sin()),
        (0,),
        trialign=lambda x, cos, sin: rope_(x.clone(), cos, sin),  # out of place, as the others
        eager=turn,
        compile=compiled(turn),
        liger=autograd_function(
            lambda x, cos, sin: (turn(x, cos, sin), (cos, sin)),
            lambda saved, g: (turn(g, saved[0], -saved[1]), None, None),
        ),
    )


def gated(dtype: torch.dtype) -> Case:
    def eager(gate_up):
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up

    def backward(saved, g):
        gate, up = (half.float() for half in saved[0].chunk(2, -1))
        sigmoid, g = gate.sigmoid(), g.float()
        silu = gate * sigmoid
        return torch.cat((g * up * (silu * (1 - sigmoid) + sigmoid), g * silu), -1).to(saved[0].dtype)

    return case(
        "[4096, 2 x 1536]",
        (torch.randn(4096, 2 * 1536).to(dtype),),
        (0,),
        trialign=swiglu,
        eager=eager,
        compile=compiled(eager),
        liger=autograd_function(lambda x: (eager(x), (x,)), backward),
    )


def decode_product(dtype: torch.dtype) -> Case:
    """A product of few rows, as the generator calls it. In fp32 both are one call."""
    x, weight = torch.randn(32, HIDDEN).to(dtype), (torch.randn(1536, HIDDEN) / 24).to(dtype)
    size = f"[32, {HIDDEN}] x [1536, {HIDDEN}], forward"
    return case(size, (x, weight), (), trialign=lambda x, w: linear(x, w, frozen=True), eager=F.linear)


def quantized(dtype: torch.dtype) -> Case:
    """On a CPU trialign's is plain torch too. eager keeps the unpacked weight for its backward; trialign and
    bitsandbytes, where installed, unpack it again."""
    rows, outputs = 512, 2 * 1536
    x, weight = torch.randn(rows, HIDDEN).to(dtype), (torch.randn(outputs, HIDDEN) / 24).to(dtype)
    held, table = pack_nf4(weight), torch.tensor(TABLE)
    codes, absmax = held.codes, dequantize_scales(held.scales, held.groups, held.offsets)

    def eager(x):
        values = table[torch.stack((codes >> 4, codes & 15), -1).int()].view(outputs, -1, BLOCK)
        return x @ (values * absmax[:, :, None]).view(outputs, HIDDEN).to(x.dtype).T

    peers = {}
    if importlib.util.find_spec("bitsandbytes"):
        bitsandbytes = importlib.import_module("bitsandbytes")
        packed, state = bitsandbytes.functional.quantize_4bit(
            weight, blocksize=BLOCK, compress_statistics=False, quant_type="nf4"
        )
        peers["bitsandbytes"] = lambda x: bitsandbytes.matmul_4bit(x, packed, quant_state=state)
    return case(
        f"[{rows}, {HIDDEN}] x [{outputs}, {HIDDEN}] in NF4",
        (x,),
        (0,),
        trialign=lambda x: nf4_linear(x, held),
        eager=eager,
        compile=compiled(eager),
        **peers,
    )


def packed(dtype: torch.dtype) -> Case:
    documents, length, scale = 8, 256, 64**-0.5
    total = documents * length
    cu_seqlens = torch.arange(documents + 1) * length
    document = torch.arange(total) // length
    seen = (document[:, None] == document[None]).tril()  # [total, total]

    def masked(q, k, v):
        q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=scale, enable_gqa=True)[0].transpose(0, 1)

    return case(
        f"{documents} x {length} tokens, 9 heads of 64 over 3",
        tuple(torch.randn(total, heads, 64).to(dtype) for heads in (9, 3, 3)),
        (0, 1, 2),
        trialign=lambda q, k, v: packed_attention(q, k, v, cu_seqlens, length, scale),
        eager=masked,
        loop=lambda q, k, v: sdpa_attention(q, k, v, cu_seqlens, scale),
    )


def decode(dtype: torch.dtype) -> Case:
    batch, span, block, scale = 32, 512, 16, 64**-0.5
    caches = tuple(torch.randn(batch * span // block, block, 3, 64).to(dtype) for _ in range(2))
    tables = torch.randperm(len(caches[0])).view(batch, -1).int()
    lengths = torch.randint(span // 2, span + 1, (batch,)).int()
    seen = (torch.arange(span)[None] < lengths[:, None])[:, None, None]  # [batch, 1, 1, span]

    def gathered(q, keys, values):
        keys, values = (cache[tables.long()].flatten(1, 2).transpose(1, 2) for cache in (keys, values))
        out = F.scaled_dot_product_attention(q[:, :, None], keys, values, attn_mask=seen, scale=scale, enable_gqa=True)
        return out[:, :, 0]

    return case(
        f"{batch} sequences of {span // 2} to {span} keys, 9 heads of 64 over 3",
        (torch.randn(batch, 9, 64).to(dtype), *caches),
        (),
        trialign=lambda q, k, v: paged_attention(q, k, v, tables, lengths, scale),
        eager=gathered,
    )


def write(dtype: torch.dtype, length: int) -> Case:
    """Keys and values as views of one projection, each contender into caches of its own."""
    batch, pages, block, kv, d = 32, 8, 16, 3, 64
    k, v = torch.randn(batch * length, 15, d).to(dtype)[:, 9:].split(kv, 1)  # after 9 query heads
    tables = torch.randperm(batch * pages).view(batch, pages, 1)
    slots = (tables * block + torch.arange(block)).flatten(1)[:, :length].flatten()

    def index_copy(keys, values):
        """As transformers' static cache."""
        keys.view(-1, kv, d).index_copy_(0, slots, k)
        values.view(-1, kv, d).index_copy_(0, slots, v)

    def index_put(keys, values):
        keys.view(-1, kv, d)[slots] = k
        values.view(-1, kv, d)[slots] = v

    def into_own(function: Callable[[Tensor, Tensor], None]) -> Run:
        keys, values = torch.zeros(2, batch * pages, block, kv, d, dtype=dtype)

        def run() -> tuple[Tensor, ...]:
            function(keys, values)
            return keys, values

        return run

    functions = {
        "trialign": lambda keys, values: write_kv(k, v, keys, values, slots),
        "eager": index_copy,
        "index_put": index_put,
    }
    size = f"{batch} x {length} new tokens, {kv} heads of {d}"
    return Case(size, {name: into_own(function) for name, function in functions.items()})


def routing(dtype: torch.dtype) -> Case:
    tokens, count, k = 4096, 128, 8
    # No two of a token are equal, in bf16 either: which of equals is chosen, and has the gradient, is left to each.
    logits = ((torch.rand(tokens, count).argsort(1) - count // 2) / 16).to(dtype)

    def eager(logits):
        """As in transformers."""
        weights, chosen = logits.softmax(-1, dtype=torch.float32).topk(k)
        weights /= weights.sum(-1, keepdim=True)
        return weights, chosen

    return case(
        f"[{tokens}, {count}], top {k}, normalized",
        (logits,),
        (0,),
        trialign=lambda logits: route(logits, k),
        eager=eager,
        compile=compiled(eager),
    )


def experts(dtype: torch.dtype) -> Case:
    tokens, count, k, width = 1024, 8, 2, 512
    x, weight = torch.randn(tokens, HIDDEN).to(dtype), (torch.randn(count, HIDDEN, width) / 24).to(dtype)
    gates, chosen = torch.randn(tokens, count).softmax(-1).topk(k)

    def fused(x, weight):
        order, offsets = sort_by_expert(chosen, count)
        return unpermute(grouped_matmul(permute(x, order, k), weight, offsets), order, gates)

    def eager(x, weight):
        """One expert after another, as in transformers."""
        out = x.new_zeros(tokens, width)
        for expert in range(count):
            token, place = (chosen == expert).nonzero(as_tuple=True)
            rows = (x[token] @ weight[expert]) * gates[token, place, None].to(x.dtype)
            out = out.index_add(0, token, rows)
        return out

    return case(
        f"[{tokens}, {HIDDEN}] to {width}, top {k} of {count} experts", (x, weight), (0, 1), trialign=fused, eager=eager
    )
