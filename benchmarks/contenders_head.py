"""Cases of the ops over the vocabulary: log-probabilities, the fused head and sampling, with their contenders."""

from __future__ import annotations

import torch
from case import HIDDEN, Case, Run, autograd_function, case, compiled
from torch import Tensor
from trialign.kernels.linear_logprob import linear_logprob
from trialign.kernels.logprob import logprob
from trialign.kernels.sampling import sample

N, VOCAB = 512, 49_152
"""Tokens, and the vocabulary of SmolLM2-135M."""


def eager_logprob(logits, labels):
    logp = logits.float().log_softmax(-1)
    return logp.gather(1, labels[:, None])[:, 0], -(logp.exp() * logp).sum(-1)


def head_logits(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return (torch.randn(N, VOCAB) * 2).to(dtype), torch.randint(VOCAB, (N,))


def logprob_forward(dtype: torch.dtype) -> Case:
    size = f"[{N}, {VOCAB}] with entropy"
    return case(size, head_logits(dtype), (), trialign=logprob, eager=eager_logprob, compile=compiled(eager_logprob))


def logprob_both(dtype: torch.dtype) -> Case:
    size = f"[{N}, {VOCAB}] with entropy"
    return case(size, head_logits(dtype), (0,), trialign=logprob, eager=eager_logprob, compile=compiled(eager_logprob))


TOKENS = 128
"""Tokens of a chunk in liger's algorithm. Its own rule gives 8, which on a CPU only reads the weight more often."""


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
"""Vocabulary columns of a chunk, as trialign has it at N tokens."""


def head_products(hidden: Tensor, weight: Tensor) -> Run:
    """The four products of a head without whole logits: logits forward, logits again, d hidden, d weight."""
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
    row = case(
        f"[{N}, {HIDDEN}] x [{VOCAB}, {HIDDEN}] with entropy",
        (hidden, weight, torch.randint(VOCAB, (N,))),
        (0, 1),
        trialign=linear_logprob,
        eager=eager_head,
        compile=compiled(eager_head),
        liger=autograd_function(chunked_head_forward, chunked_head_backward),
    )
    row.products = head_products(hidden, weight)
    return row


def draw(dtype: torch.dtype) -> Case:
    """Top-k and top-p with the token's logprob. Random numbers differ: the comparison is of each logprob with that of
    the drawn token in the exact distribution."""
    batch, k, p, temperature = 32, 50, 0.9, 0.7
    logits = (torch.randn(batch, VOCAB) * 3).to(dtype)
    settings = torch.full((batch,), temperature), torch.full((batch,), k).int(), torch.full((batch,), p)
    keys, counters = torch.arange(batch), torch.zeros(batch, dtype=torch.long)

    def truncated(logits):
        """As transformers' logits processors."""
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
    row = case(
        f"[{batch}, {VOCAB}], top-k {k}, top-p {p}",
        (logits,),
        (),
        trialign=lambda x: sample(x, *settings, keys, counters),
        eager=eager,
    )
    row.compare = lambda results: (results[1] - truth.gather(1, results[0][:, None])[:, 0] + 1,)
    return row
