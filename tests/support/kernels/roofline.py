"""Bounds of every Triton kernel's time on an A100 and an H100, at the sizes of Llama-3-8B (mixtures: Mixtral-8x7B).

A bound is what no kernel of that traffic can beat: its bytes, moved or the least possible, over the memory's rate, or
its FLOPs over the matrix units' rate, whichever takes longer. It is no measured time. Bytes of kernels along rows are
those that traffic.py counts for a unit; those of products and attention follow from their blocks.
"""

from __future__ import annotations

from typing import NamedTuple

from trialign.kernels import flash_attention, grouped_matmul
from trialign.kernels.flash_attention import SPECS as ATTENTION

GPUS = {"A100": (312e12, 2.0e12), "H100": (989e12, 3.35e12)}
"""SXM, 80 GB, from their data sheets: dense bf16 FLOP/s and bytes/s."""
TOKENS, DOCUMENTS, LENGTH = 16384, 8, 2048
HIDDEN, HEADS, KV, D, INNER, VOCABULARY = 4096, 32, 8, 128, 14336, 128256
SEQUENCES, KEYS = 64, 4096
EXPERTS, CHOSEN = 8, 2
HEAD = (
    "| kernel | at | GFLOP | MB least | MB moved | A100, moved (least) | H100, moved (least) |\n| --- "
    + "| --- " * 6
    + "|"
)


class Work(NamedTuple):
    """One launch: a size in words, its FLOPs, the bytes with each address once, and those its programs ask for."""

    size: str
    flops: float
    least: float
    moved: float

    def bound(self, gpu: str, size: float) -> float:
        """Seconds."""
        rate, bandwidth = GPUS[gpu]
        return max(self.flops / rate, size / bandwidth)


UNITS = {  # kernels along rows: (size, units of traffic.py's table)
    "adamw.adamw": ("8.03e9 parameters", 8.03e9),
    "gae.scan": (f"{TOKENS} tokens", TOKENS),
    "logprob.": (f"[{TOKENS}, {VOCABULARY}] logits", TOKENS * VOCABULARY),
    "moe.permute": (f"[{TOKENS}, {HIDDEN}]", TOKENS * HIDDEN),
    "moe.unpermute": (f"[{TOKENS}, {HIDDEN}]", TOKENS * HIDDEN),
    "moe.": (f"{TOKENS} tokens, {CHOSEN} of {EXPERTS}", TOKENS),
    "nf4.": (f"[{INNER}, {HIDDEN}] weights", INNER * HIDDEN),
    "ppo_loss.": (f"{TOKENS} tokens", TOKENS),
    "rms_norm.": (f"[{TOKENS}, {HIDDEN}] and residual", TOKENS * HIDDEN),
    "rope.turn": (f"[{TOKENS}, {HEADS + KV}, {D}]", TOKENS * (HEADS + KV) * D),
    "sampling.sample": (f"[{SEQUENCES}, {VOCABULARY}]", SEQUENCES * VOCABULARY),
    "swiglu.": (f"[{TOKENS}, 2 x {INNER}]", TOKENS * INNER),
}


def attention(kernel: str) -> Work:
    """Causal over DOCUMENTS of LENGTH, with the blocks of sm_90: a program reads the other side's blocks again."""
    size = f"{DOCUMENTS} x {LENGTH} tokens, {HEADS} heads of {D} over {KV}"
    pairs = DOCUMENTS * HEADS * LENGTH * (LENGTH + 1) / 2
    q, kv, rows = 2 * TOKENS * HEADS * D, 2 * TOKENS * KV * D, 4 * TOKENS * HEADS
    config = ATTENTION[kernel].on("sm_90")[1]
    if kernel == "forward":
        again = pairs / config["BLOCK_M"] * 4 * D  # k and v of a block of queries
        return Work(size, 4 * D * pairs, 2 * q + 2 * kv + 2 * rows, 2 * q + 2 * rows + again)
    share, splits = flash_attention._plan(HEADS, KV, DOCUMENTS, LENGTH // 128, 2 * q, 2 * 132)
    part, heads = 2 * q * splits, HEADS // share
    kv_out = 2 * kv if heads == KV else 4 * kv * heads // KV
    if kernel == "rows":
        return Work(size, 0, 2 * q + 4 * rows, 2 * q + 4 * rows)
    if kernel == "join":
        return Work(size, 0, part + q, part + q)
    again = pairs / config["BLOCK_N"] * (4 * D + 8 * D)  # q and do of a block of keys, and dq read and written
    least = 2 * q + 2 * kv + 2 * rows + part + kv_out
    return Work(size, 10 * D * pairs, least, again + 2 * kv * HEADS // KV + kv_out)


def paged(kernel: str) -> Work:
    """Decoding of SEQUENCES with KEYS each, in splits as on 132 multiprocessors."""
    size, rows = f"{SEQUENCES} x {KEYS} keys, {HEADS} heads of {D} over {KV}", SEQUENCES * HEADS
    cache, splits = 4 * SEQUENCES * KEYS * KV * D, 2
    if kernel == "write":
        bytes_ = 8 * SEQUENCES * KV * D + 8 * SEQUENCES
        return Work(f"{SEQUENCES} tokens, {KV} heads of {D}", 0, bytes_, bytes_)
    part = rows * splits * 4 * (D + 2)
    if kernel == "combine":
        return Work(size, 0, part + 2 * rows * D, part + 2 * rows * D)
    bytes_ = cache + 2 * rows * D + part
    return Work(size, 4 * D * rows * KEYS, bytes_, bytes_)


def grouped(kernel: str) -> Work:
    """One product of Mixtral's experts: 2 of 8 for each token."""
    n = CHOSEN * TOKENS
    x, w, out = 2 * n * HIDDEN, 2 * EXPERTS * HIDDEN * INNER, 2 * n * INNER
    config = grouped_matmul.SPECS[kernel].on("sm_90")[0]
    m, n_block = config["BLOCK_M"], config["BLOCK_N"]
    rows, columns, inner = (n, INNER, HIDDEN) if kernel == "matmul" else (HIDDEN, INNER, n)
    tiles = rows / m * (columns / n_block)
    moved = tiles * (m + n_block) * inner * 2 + (out if kernel == "matmul" else w)
    return Work(f"[{n}, {HIDDEN}] x [{EXPERTS}, {HIDDEN}, {INNER}]", 2 * n * HIDDEN * INNER, x + w + out, moved)


SHAPED = {"flash_attention": attention, "paged_attention": paged, "grouped_matmul": grouped}


def works(kernels: dict) -> dict[str, Work]:
    """{kernel: its work}; `kernels` as traffic.all_kernels() gives them."""
    found = {}
    for name, (case, traffic) in kernels.items():
        module, _, kernel = name.partition(".")
        if module in SHAPED:
            found[name] = SHAPED[module](kernel)
        else:
            size, units = next(unit for start, unit in UNITS.items() if name.startswith(start))
            moved = (traffic.loaded + traffic.stored) / case.count * units
            found[name] = Work(size, 0, traffic.once / case.count * units, moved)
    return found


def duration(seconds: float) -> str:
    """In microseconds, three digits."""
    return f"{seconds * 1e6:.3g}" if seconds < 1e-3 else f"{seconds * 1e6:.0f}"


def table(kernels: dict) -> list[str]:
    """Rows of HEAD; times in microseconds."""
    rows = []
    for name, work in works(kernels).items():
        times = [f"{duration(work.bound(g, work.moved))} ({duration(work.bound(g, work.least))})" for g in GPUS]
        flops = f"{work.flops / 1e9:.4g}" if work.flops else ""
        sizes = [f"{size / 1e6:.4g}" for size in (work.least, work.moved)]
        rows.append(f"| {' | '.join([name, work.size, flops, *sizes, *times])} |")
    return rows
