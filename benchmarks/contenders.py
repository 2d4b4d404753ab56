"""What bench_kernels.py times: for each op the inputs, our call, and those it is compared with.

"eager" is the textbook formula in plain torch; "compile" is torch.compile of the same function; "liger" is the
algorithm of liger-kernel (Hsu et al. 2024) in plain torch: gradients made in the forward pass or by hand from what was
saved, and heads in chunks of tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from trialign.kernels.adamw import adamw_
from trialign.kernels.attention import packed_attention, sdpa_attention
from trialign.kernels.cross_entropy import cross_entropy
from trialign.kernels.gae import gae
from trialign.kernels.linear_logprob import linear_logprob
from trialign.kernels.logprob import logprob
from trialign.kernels.moe import grouped_matmul, permute, sort_by_expert, unpermute
from trialign.kernels.paged_attention import paged_attention
from trialign.kernels.ppo_loss import kl_estimate, policy_loss, value_loss
from trialign.kernels.rms_norm import add_rms_norm, rms_norm
from trialign.kernels.rope import rope_
from trialign.kernels.sampling import sample
from trialign.kernels.swiglu import swiglu

Run = Callable[[], tuple[Tensor, ...]]
N, VOCAB, HIDDEN = 512, 49_152, 576
"""Tokens, vocabulary and hidden size of the ops around the head: those of SmolLM2-135M."""


@dataclass
class Case:
    """One op: `runs` give the tensors that are compared; "ours" and "eager" always are among them."""

    size: str
    runs: dict[str, Run]
    compare: Callable[[tuple[Tensor, ...]], tuple[Tensor, ...]] = field(default=lambda results: results)
    """from a run's results to what must agree"""
    products: Run | None = None
    """of an op that recomputes, its matrix products alone: no form of it takes less time"""


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


def by_hand(forward: Callable, backward: Callable) -> Callable:
    """An autograd.Function: forward(*inputs) gives (output, what to save), backward(saved, grad) the gradients."""

    class Hand(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *inputs):
            output, saved = forward(*inputs)
            ctx.save_for_backward(*saved)
            return output

        @staticmethod
        def backward(ctx, *grads):
            return backward(ctx.saved_tensors, *grads)

    return Hand.apply


def eager_logprob(logits, labels):
    logp = logits.float().log_softmax(-1)
    return logp.gather(1, labels[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def head_logits(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return (torch.randn(N, VOCAB) * 2).to(dtype), torch.randint(VOCAB, (N,))


def logprob_forward(dtype: torch.dtype) -> Case:
    size = f"[{N}, {VOCAB}] with entropy"
    return case(size, head_logits(dtype), (), ours=logprob, eager=eager_logprob, compile=compiled(eager_logprob))


def logprob_both(dtype: torch.dtype) -> Case:
    size = f"[{N}, {VOCAB}] with entropy"
    return case(size, head_logits(dtype), (0,), ours=logprob, eager=eager_logprob, compile=compiled(eager_logprob))


TOKENS = 128
"""Tokens a chunk of the liger way. Its own rule would take 8 here, which on a CPU only reads the weight more often."""


def d_logits(logits, labels, g, g_entropy):
    """The gradient of logprob and entropy in the logits, in place of the fp32 log-softmax."""
    logp = logits.float().log_softmax(-1)
    p = logp.exp()
    entropy = -(p * logp).sum(-1, keepdim=True)
    grad = p.mul_(-g[:, None] - g_entropy[:, None] * (logp + entropy))
    grad[torch.arange(len(labels)), labels] += g
    return grad.to(logits.dtype)


def chunked_head_forward(hidden, weight, labels):
    parts = zip(hidden.split(TOKENS), labels.split(TOKENS), strict=True)
    outputs = [eager_logprob(rows @ weight.T, label) for rows, label in parts]
    return tuple(torch.cat(parts) for parts in zip(*outputs, strict=True)), (hidden, weight, labels)


def chunked_head_backward(saved, g, g_entropy):
    hidden, weight, labels = saved
    grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight, dtype=torch.float32)
    for i in range(0, len(hidden), TOKENS):
        at = slice(i, i + TOKENS)
        grad = d_logits(hidden[at] @ weight.T, labels[at], g[at], g_entropy[at])
        grad_hidden[at] = grad @ weight
        grad_weight += grad.T @ hidden[at]
    return grad_hidden, grad_weight.to(weight.dtype), None


def eager_head(hidden, weight, labels):
    return eager_logprob(hidden @ weight.T, labels)


PIECE = 2048
"""Columns of the vocabulary at a time, as ours has it at N tokens."""


def head_products(hidden: Tensor, weight: Tensor) -> Run:
    """The four products of a head whose logits are never whole: logits forward, logits again, d hidden, d weight."""
    logits, total = torch.zeros(len(hidden), PIECE, dtype=hidden.dtype), torch.empty_like(hidden)

    @torch.no_grad()
    def run() -> tuple[Tensor, ...]:
        for piece in weight.split(PIECE) * 2:  # forward, and again in backward
            torch.mm(hidden, piece.T, out=logits)
        return *(torch.mm(logits, piece, out=total) for piece in weight.split(PIECE)), *(
            torch.mm(logits.T, hidden) for _ in weight.split(PIECE)
        )

    return run


def linear_logprob_both(dtype: torch.dtype) -> Case:
    hidden, weight = torch.randn(N, HIDDEN).to(dtype), (torch.randn(VOCAB, HIDDEN) / 12).to(dtype)
    made = case(
        f"[{N}, {HIDDEN}] x [{VOCAB}, {HIDDEN}] with entropy",
        (hidden, weight, torch.randint(VOCAB, (N,))),
        (0, 1),
        ours=linear_logprob,
        eager=eager_head,
        compile=compiled(eager_head),
        liger=by_hand(chunked_head_forward, chunked_head_backward),
    )
    made.products = head_products(hidden, weight)
    return made


def gradient_in_forward(logits, labels):
    """Cross-entropy that leaves its gradient where the probabilities were, a block of rows at a time."""
    grad, losses = torch.empty_like(logits), []
    for i in range(0, len(logits), TOKENS):
        at = slice(i, i + TOKENS)
        logp = logits[at].float().log_softmax(-1)
        losses.append(-logp.gather(1, labels[at, None])[:, 0])
        p = logp.exp_()
        p[torch.arange(len(p)), labels[at]] -= 1
        grad[at] = p
    return torch.cat(losses), (grad,)


def cross_entropy_both(dtype: torch.dtype) -> Case:
    def eager(logits, labels):
        return F.cross_entropy(logits.float(), labels, reduction="none")

    liger = by_hand(gradient_in_forward, lambda saved, g: (saved[0].mul_(g[:, None]), None))
    return case(
        f"[{N}, {VOCAB}]",
        head_logits(dtype),
        (0,),
        ours=cross_entropy,
        eager=eager,
        compile=compiled(eager),
        liger=liger,
    )


def gae_forward(_dtype: torch.dtype) -> Case:
    rows, steps, gamma, lam = 64, 512, 0.99, 0.95
    rewards, values = torch.randn(2, rows, steps)
    mask, cu_seqlens = torch.ones(rows * steps, dtype=torch.bool), torch.arange(rows + 1) * steps

    def ours(rewards, values):
        return gae(rewards.view(-1), values.view(-1), mask, cu_seqlens, gamma, lam)

    def loop(rewards, values):
        """Padded rows, one time step after another, as TRL and OpenRLHF have it."""
        last, backwards = 0.0, []
        for t in reversed(range(steps)):
            following = values[:, t + 1] if t < steps - 1 else 0.0
            last = rewards[:, t] + gamma * following - values[:, t] + gamma * lam * last
            backwards.append(last)
        advantages = torch.stack(backwards[::-1], 1)
        return advantages.view(-1), (advantages + values).view(-1)

    return case(f"[{rows}, {steps}] against a loop over the steps", (rewards, values), (), ours=ours, eager=loop)


def per_token(dtype: torch.dtype, ours: Callable, eager: Callable, count: int = 3) -> Case:
    inputs = tuple(0.3 * torch.randn(32_768) for _ in range(count))
    return case("[32768] fp32", inputs, (0,), ours=ours, eager=eager, compile=compiled(eager))


def policy(dtype: torch.dtype) -> Case:
    def eager(logp, old, advantages):
        ratio = (logp - old).exp()
        free, held = -advantages * ratio, -advantages * ratio.clamp(0.8, 1.28)
        return torch.maximum(free, held), ratio.detach(), (held > free).float()

    return per_token(dtype, lambda logp, old, a: policy_loss(logp, old, a, 0.2, 0.28), eager)


def value(dtype: torch.dtype) -> Case:
    def eager(values, old, returns):
        free, held = (values - returns).square(), (old + (values - old).clamp(-0.2, 0.2) - returns).square()
        return 0.5 * torch.maximum(free, held), (held > free).float()

    case = per_token(dtype, lambda v, old, returns: value_loss(v, old, returns, 0.2), eager)
    case.compare = lambda results: (results[0], results[2])  # where rounding alone decides, the flags may differ
    return case


def kl(dtype: torch.dtype) -> Case:
    def eager(logp, ref):
        return torch.exp(ref - logp) - 1 + logp - ref

    return per_token(dtype, lambda logp, ref: kl_estimate(logp, ref, "k3"), eager, 2)


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
        ours=lambda x, w: rms_norm(x, w, EPS),
        eager=eager_norm,
        torch=lambda x, w: F.rms_norm(x, (HIDDEN,), w, EPS),
        compile=compiled(eager_norm),
        liger=by_hand(hand_norm_forward, hand_norm_backward),
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
        ours=lambda x, r, w: add_rms_norm(x, r, w, EPS),
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
        ours=lambda x, cos, sin: rope_(x.clone(), cos, sin),  # the others leave x as it is
        eager=turn,
        compile=compiled(turn),
        liger=by_hand(
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
        ours=swiglu,
        eager=eager,
        compile=compiled(eager),
        liger=by_hand(lambda x: (eager(x), (x,)), backward),
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
        ours=lambda q, k, v: packed_attention(q, k, v, cu_seqlens, length, scale),
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
        ours=lambda q, k, v: paged_attention(q, k, v, tables, lengths, scale),
        eager=gathered,
    )


def draw(dtype: torch.dtype) -> Case:
    """Top-k and top-p with the token's logprob. Each draws by random numbers of its own; what is compared is whether
    the logprob is that of the drawn token in the distribution both mean."""
    batch, k, p, temperature = 32, 50, 0.9, 0.7
    logits = (torch.randn(batch, VOCAB) * 3).to(dtype)
    settings = torch.full((batch,), temperature), torch.full((batch,), k).int(), torch.full((batch,), p)
    keys, counters = torch.arange(batch), torch.zeros(batch, dtype=torch.long)

    def truncated(logits):
        """As transformers' logits processors do it."""
        scores = logits.float() / temperature
        scores = scores.masked_fill(scores < scores.topk(k)[0][:, -1:], -torch.inf)
        ascending, order = scores.sort()
        beyond = ascending.softmax(-1).cumsum(-1) <= 1 - p
        beyond[:, -1] = False
        return scores.masked_fill(beyond.scatter(1, order, beyond), -torch.inf)

    def eager(logits):
        logp = truncated(logits).log_softmax(-1)
        tokens = logp.exp().multinomial(1)
        return tokens[:, 0], logp.gather(1, tokens)[:, 0]

    truth = truncated(logits).log_softmax(-1)
    made = case(
        f"[{batch}, {VOCAB}], top-k {k}, top-p {p}",
        (logits,),
        (),
        ours=lambda x: sample(x, *settings, keys, counters),
        eager=eager,
    )
    made.compare = lambda results: (results[1] - truth.gather(1, results[0][:, None])[:, 0] + 1,)
    return made


def optimizer(dtype: torch.dtype) -> Case:
    """Gradient scaled, stepped, and the compute copy written, as the engine needs it."""
    size, lr, beta1, beta2, eps, decay, scale = 8_000_000, 1e-6, 0.9, 0.95, 1e-8, 0.1, 0.5
    start, grad = torch.randn(size), torch.randn(size)
    master, first, second = start.clone(), torch.zeros(size), torch.zeros(size)
    copy, scaled, their_copy = start.to(dtype), torch.empty(size), start.to(dtype)
    parameter = torch.nn.Parameter(start.clone())
    fused = torch.optim.AdamW([parameter], lr, (beta1, beta2), eps, decay, fused=True)
    steps = [0]

    def ours():
        steps[0] += 1
        adamw_(master, first, second, grad, copy, lr, beta1, beta2, eps, decay, steps[0], scale)
        return master, copy

    def eager():
        parameter.grad = torch.mul(grad, scale, out=scaled)
        fused.step()
        their_copy.copy_(parameter.detach())
        return parameter.detach(), their_copy

    return Case(f"{size:,} parameters, against fused=True", {"ours": ours, "eager": eager})


def experts(dtype: torch.dtype) -> Case:
    tokens, count, k, width = 1024, 8, 2, 512
    x, weight = torch.randn(tokens, HIDDEN).to(dtype), (torch.randn(count, HIDDEN, width) / 24).to(dtype)
    gates, chosen = torch.randn(tokens, count).softmax(-1).topk(k)

    def ours(x, weight):
        order, offsets = sort_by_expert(chosen, count)
        return unpermute(grouped_matmul(permute(x, order, k), weight, offsets), order, gates)

    def eager(x, weight):
        """An expert after another, as transformers has it."""
        out = x.new_zeros(tokens, width)
        for expert in range(count):
            token, place = (chosen == expert).nonzero(as_tuple=True)
            rows = (x[token] @ weight[expert]) * gates[token, place, None].to(x.dtype)
            out = out.index_add(0, token, rows)
        return out

    return case(
        f"[{tokens}, {HIDDEN}] to {width}, top {k} of {count} experts", (x, weight), (0, 1), ours=ours, eager=eager
    )


CASES: dict[str, Callable[[torch.dtype], Case]] = {
    "logprob_fwd": logprob_forward,
    "logprob": logprob_both,
    "linear_logprob": linear_logprob_both,
    "cross_entropy": cross_entropy_both,
    "gae": gae_forward,
    "policy_loss": policy,
    "value_loss": value,
    "kl_estimate": kl,
    "rms_norm": norm,
    "add_rms_norm": add_norm,
    "rope": rotary,
    "swiglu": gated,
    "packed_attention": packed,
    "paged_attention": decode,
    "sampling": draw,
    "adamw": optimizer,
    "moe": experts,
}
