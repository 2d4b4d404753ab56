"""Bytes that every Triton kernel loads and stores, counted under the interpreter, as a table in Markdown.

TRITON_INTERPRET=1 python tests/support/kernels/traffic.py
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import implementations  # noqa: F401 (installs interp_shim)
import roofline
import torch
from interp_shim import Monitor, Traffic
from launches import KERNELS
from trialign.kernels.nf4 import pack_nf4

op = torch.ops.trialign  # Triton kernels alone, in this mode
BF16 = torch.bfloat16
HEAD = "| kernel | counted at | per | loaded | stored | each address once | ratio |\n" + "| --- " * 7 + "|"


ROOFLINE = """Bounds, not times, at the sizes of Llama-3-8B (mixtures: Mixtral-8x7B), in microseconds: the FLOPs or the
bytes, whichever take longer, over the data sheet's rates (A100 SXM 80 GB: 312 TFLOP/s in bf16, 2.0 TB/s; H100 SXM: 989
TFLOP/s, 3.35 TB/s). Moved: what the programs ask for; caches serve what is asked for again, so that a kernel of blocks
lies between the two. Least: each address once."""


class Case(NamedTuple):
    """A call that launches kernels, in bf16 where they take it, and the unit its bytes are counted per."""

    size: str
    per: str
    count: int
    call: Callable[[], object]


def cases() -> Iterator[Case]:
    """Ops along rows, then attention with 8 heads of 64 over 2, then products with experts' and with 4-bit weights."""
    torch.manual_seed(0)
    n = 4096
    a, b, c, d = torch.ones(4, n)
    mask, cu, hyper = torch.ones(n, dtype=torch.bool), torch.arange(9) * (n // 8), (1e-3, 0.9, 0.95, 1e-8, 0.1, 1, 1.0)
    yield Case(f"[{n}], bf16 copy-out", "parameter", n, lambda: op.adamw(a, b, c, d, a.to(BF16), *hyper))
    yield Case(f"8 sequences of {n // 8}", "token", n, lambda: op.gae(a, b, mask, cu, 0.99, 0.95))
    yield Case(f"[{n}]", "token", n, lambda: op.policy_loss(a, b, c, 0.2, 0.2, 3.0))
    yield Case(f"[{n}]", "token", n, lambda: op.value_loss(a, b, c, 0.2))
    yield Case(f"[{n}]", "token", n, lambda: op.kl_estimate(a, b, 3))

    n, h = 64, 1024
    (x, residual, grad), weight, rstd = torch.ones(3, n, h).to(BF16), torch.ones(h).to(BF16), torch.ones(n)
    size = f"[{n}, {h}] and residual"
    yield Case(size, "element", n * h, lambda: op.add_rms_norm(x, residual, weight, 1e-5))
    yield Case(size, "element", n * h, lambda: op.rms_norm_backward(grad, x, weight, rstd, residual))
    size, half = f"[{n}, 2 x {h // 2}]", grad.view(2, n, h // 2)[0]
    yield Case(size, "output", half.numel(), lambda: op.swiglu(x))
    yield Case(size, "output", half.numel(), lambda: op.swiglu_backward(half, x))

    n, v = 128, 4096
    logits, labels, ones = torch.randn(n, v).to(BF16), torch.randint(v, (n,)), torch.ones(n)
    rest = labels, op.logprob_stats(logits, labels, 1.0, 0), ones, ones, 1.0, 0
    size = f"[{n}, {v}]"
    yield Case(size, "logit", n * v, lambda: op.logprob_stats(logits, labels, 1.0, 0))
    yield Case(size, "logit", n * v, lambda: op.logprob_backward(logits, *rest))

    n, v = 4, 16384
    rows = torch.randn(n, v).to(BF16), torch.full((n,), 0.7), torch.full((n,), 50).int(), torch.full((n,), 0.9)
    keys = torch.arange(2 * n).view(2, n)
    yield Case(f"[{n}, {v}], top-k 50, top-p 0.9", "logit", n * v, lambda: op.sample(*rows, *keys))

    torch.manual_seed(0)
    n, d = 256, 64
    q, k, v = (torch.randn(n, heads, d).to(BF16) for heads in (8, 2, 2))
    angles, size = torch.ones(n, d // 2), "256 tokens, 8 heads of 64 over 2"
    yield Case("[256, 8, 64]", "element", q.numel(), lambda: op.rope_(q.clone(), angles, angles, False, False))
    rest, grad = (torch.tensor([0, n]), n, 0.125, None, None), torch.randn(n, 8, d).to(BF16)
    out = op.attention(q, k, v, *rest)
    yield Case(size, "token", n, lambda: op.attention(q, k, v, *rest))
    yield Case(size, "token", n, lambda: op.attention_backward(grad, q, k, v, *out, *rest))
    caches, slots = [torch.zeros(64, 16, 2, d, dtype=BF16) for _ in range(2)], torch.randperm(1024)[:n]
    yield Case("[256, 2, 64]", "token", n, lambda: op.write_kv(k, v, *caches, slots))
    cache = (*caches, torch.randperm(64).view(4, 16).int(), torch.full((4,), 256).int(), 0.125, None, None)
    size = "4 sequences of 256 keys, 8 heads of 64 over 2"
    yield Case(size, "key", 4 * 256, lambda: op.paged_attention(q[:4], *cache))

    torch.manual_seed(0)
    n, h, f, experts, k = 256, 128, 256, 8, 2
    x, logits = torch.randn(n, h).to(BF16), torch.randn(n, experts).to(BF16)
    given, chosen = op.route(logits, k, True)
    order, offsets = op.sort_by_expert(chosen, experts)
    offsets = offsets.int()
    permuted, size = op.permute(x, order, k), f"{n} tokens, {k} of {experts} experts"
    yield Case(size, "token", n, lambda: op.route(logits, k, True))
    yield Case(size, "token", n, lambda: op.route_backward(given.clone(), logits, given, chosen, True))
    yield Case(size, "token", n, lambda: op.sort_by_expert(chosen, experts))
    size = f"{size}, [{n}, {h}]"
    yield Case(size, "element", n * h, lambda: op.permute(x, order, k))
    yield Case(size, "element", n * h, lambda: op.unpermute(permuted, order, given, k))
    yield Case(size, "element", n * h, lambda: op.unpermute_backward(x, permuted, order, given))
    weight, grad = torch.randn(experts, h, f).to(BF16), torch.randn(n * k, f).to(BF16)
    size = f"[{n * k}, {h}] x [{experts}, {h}, {f}]"
    yield Case(size, "row", n * k, lambda: op.grouped_matmul(permuted, weight, offsets))
    yield Case(size, "row", n * k, lambda: op.grouped_outer(permuted, grad, offsets))
    f, h = 128, 1024
    packed = [*pack_nf4(torch.randn(f, h))]
    yield Case(f"[{f}, {h}]", "weight", f * h, lambda: op.nf4_unpack(packed, BF16))
    yield Case(f"[4, {h}] x [{f}, {h}]", "weight", f * h, lambda: op.nf4_gemv(torch.randn(4, h).to(BF16), packed))


def all_kernels() -> dict[str, tuple[Case, Traffic]]:
    """{kernel: (the first case that launches it, the launch's traffic)}, sorted by name."""
    found: dict[str, tuple[Case, Traffic]] = {}
    launched: list[tuple[str, Traffic]] = []
    Monitor.counting = True
    Monitor.done = staticmethod(lambda kernel: launched.append((KERNELS[kernel][0], Monitor.traffic())))
    try:
        for case in cases():
            launched.clear()  # launches for the case's inputs
            case.call()
            for name, traffic in launched:
                found.setdefault(name, (case, traffic))
    finally:
        Monitor.counting, Monitor.done = False, staticmethod(lambda kernel: None)
    return dict(sorted(found.items()))


def table(kernels: dict[str, tuple[Case, Traffic]]) -> list[str]:
    """Rows, one a kernel: bytes per element loaded, stored, and with each address accessed once; their ratio."""
    return [
        f"| {name} | {case.size} | {case.per} | {traffic.loaded / case.count:.5g} | {traffic.stored / case.count:.5g} "
        f"| {traffic.once / case.count:.5g} | {(traffic.loaded + traffic.stored) / traffic.once:.2f} |"
        for name, (case, traffic) in kernels.items()
    ]


if __name__ == "__main__":
    found = all_kernels()
    print("\n".join([HEAD, *table(found), "", ROOFLINE, "", roofline.HEAD, *roofline.table(found)]))
