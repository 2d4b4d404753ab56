"""Packed attention against float64, forward and backward; documents stay apart."""

import pytest
import torch
from accuracy import FLOOR, check_accuracy, run
from implementations import DTYPES, INTERPRET, by_mode, cpp_only, device, interpreted_only  # noqa: F401 (a fixture)
from trialign.kernels import flash_attention
from trialign.kernels.attention import packed_attention, packed_attention_ref, sdpa_attention
from trialign.kernels.dispatch import choose

if INTERPRET:
    import launches
    from interp_shim import Monitor

# torch's fused backward is less accurate where the softmax has one entry.
SDPA_FLOOR = {torch.float32: 4e-6, torch.bfloat16: 4e-3, torch.float16: 4e-4}


def inputs(lengths, heads, kv_heads, d, dtype):
    total = sum(lengths)
    qkv = [torch.randn(total, h, d).to(dtype) for h in (heads, kv_heads, kv_heads)]
    return qkv, torch.tensor([0, *lengths]).cumsum(0)


def sdpa(q, k, v, cu_seqlens, max_seqlen, scale, alibi_slopes, window):
    return sdpa_attention(q, k, v, cu_seqlens, scale, alibi_slopes, window)


@pytest.mark.parametrize("function", [packed_attention, sdpa][: by_mode(2, 1)])
@pytest.mark.parametrize("dtype", DTYPES)
# A window of 2 reaches just one key, or one query, into the next block.
@pytest.mark.parametrize("alibi, window", [(False, None), (True, None), (False, 2), (True, 70), (True, 20)])
@pytest.mark.parametrize(
    "lengths, heads, kv_heads, d",
    by_mode(
        [
            ([5, 5, 5], 6, 2, 64),
            ([7, 1, 30, 29, 0, 3], 3, 3, 20),
            ([1], 4, 1, 80),
            ([131, 64, 65, 48, 49, 6], 6, 2, 64),
            ([131, 64, 65, 48, 49, 6], 4, 1, 80),
        ],
        [([33, 1, 0, 20], 2, 1, 16), ([70], 3, 3, 20)],
    ),
)
def test_error_against_float64(function, dtype, alibi, window, lengths, heads, kv_heads, d):
    qkv, cu = inputs(lengths, heads, kv_heads, d, dtype)
    slopes = 2.0 ** -torch.arange(1.0, heads + 1) if alibi else None
    if slopes is not None and INTERPRET:  # rows past a document's end must not overflow
        slopes[-1] = -0.5 if dtype == torch.float32 else -4.0
    rest = cu, max(lengths), d**-0.5, slopes, window
    fn, ref = (lambda *qkv, f=f: f(*qkv, *rest) for f in (function, packed_attention_ref))
    by_torch = function is sdpa or choose("attention", qkv[0]) == "reference"
    check_accuracy(fn, ref, qkv, (0, 1, 2), SDPA_FLOOR[dtype] if by_torch else FLOOR[dtype])


@pytest.mark.parametrize("arch", by_mode(["sm_80"], ["sm_80", "sm_90", "sm_100", "gfx942"]))
@pytest.mark.parametrize("d", [64, 80, 128, 256])
def test_error_at_every_head_dim(d, arch, monkeypatch):
    """Each set of the GPU kernels' block sizes, at lengths just past them."""
    if INTERPRET:
        monkeypatch.setattr(flash_attention, "architecture", lambda device: arch)
        monkeypatch.setattr(Monitor, "watch", staticmethod(lambda kernel, given: launches.check(kernel, given, arch)))
    qkv, cu = inputs([0, 1, 69, 2], 2, 1, d, torch.bfloat16)
    fn, ref = (lambda *qkv, f=f: f(*qkv, cu, 69, d**-0.5) for f in (packed_attention, packed_attention_ref))
    check_accuracy(fn, ref, qkv, (0, 1, 2), FLOOR[torch.bfloat16])


@interpreted_only
@pytest.mark.parametrize("window", [None, 5, 40, 75])
@pytest.mark.parametrize("programs, heads", [(1, 4), (64, 4), (64, 2), (9, 2)])
def test_gradients_for_any_number_of_programs(programs, heads, window, monkeypatch):
    """Blocks of keys dealt out to several programs, or all query heads of a group taken by one; parts of dq that some
    split does not have hold NaN."""
    qkv, cu = inputs([100, 3, 81], heads, 2, 16, torch.float32)
    planned = []
    plan = flash_attention._plan
    monkeypatch.setattr(flash_attention, "_plan", lambda *a: planned.append(plan(*a[:-1], programs)) or planned[-1])
    new_empty = torch.Tensor.new_empty

    def unwritten(*sizes, **dtype):
        made = new_empty(*sizes, **dtype)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    monkeypatch.setattr(torch.Tensor, "new_empty", unwritten)
    rest = cu, 100, 0.25, None, window
    fn, ref = (lambda *qkv, f=f: f(*qkv, *rest) for f in (packed_attention, packed_attention_ref))
    check_accuracy(fn, ref, qkv, (0, 1, 2), FLOOR[torch.float32])
    again, _ = run(fn, qkv, (0, 1, 2))
    assert all(torch.equal(a, b) for a, b in zip(run(fn, qkv, (0, 1, 2))[0], again, strict=True))
    share, splits = planned[0]
    assert (share, splits) == {(1, 4): (2, 1), (64, 4): (1, 6), (64, 2): (1, 7), (9, 2): (1, 2)}[programs, heads]


def test_memory_of_the_parts_of_dq_is_limited():
    """Splits as programs need them, at most one a block of keys, and beyond the first within PARTS."""
    mib = 1 << 20
    assert flash_attention._plan(32, 8, 64, 16, 268 * mib, 264) == (4, 1)  # documents enough: whole groups, one part
    assert flash_attention._plan(32, 8, 4, 32, 64 * mib, 264) == (1, 3)
    assert flash_attention._plan(32, 8, 1, 256, 512 * mib, 264) == (1, 3)  # 9 are wanted
    assert flash_attention._plan(4, 4, 1, 2, mib, 264) == (1, 2)
    assert flash_attention._plan(32, 32, 1, 256, 8 << 30, 264) == (1, 1)


def with_grads(qkv, *rest):
    return run(lambda *qkv: packed_attention(*qkv, *rest), qkv, (0, 1, 2))[0]


def test_wide_windows_and_many_documents(monkeypatch):
    """A window beyond every document changes nothing, nor do more documents than a grid can hold."""
    qkv, cu = inputs([3, 0, 5, 31, 1], 2, 1, 16, torch.float32)
    whole = with_grads(qkv, cu, 31, 0.25)
    monkeypatch.setattr(flash_attention, "DOCUMENTS", 2)
    for window in (None, 2**31 - 1, 2**40):
        for actual, expected in zip(with_grads(qkv, cu, 31, 0.25, None, window), whole, strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_documents_are_independent(dtype):
    qkv, cu = inputs([9, 17, 4], 2, 2, 32, dtype)
    part, alone = [t[9:26] for t in qkv], torch.tensor([0, 17], dtype=torch.int32)
    upstream = torch.randn(30, 2, 32).to(dtype)
    whole, _ = run(lambda *t: packed_attention(*t, cu, 17, 0.2), qkv, (0, 1, 2), [upstream])
    expected, _ = run(lambda *t: packed_attention(*t, alone, 17, 0.2), part, (0, 1, 2), [upstream[9:26]])
    assert all(torch.equal(a[9:26], b) for a, b in zip(whole, expected, strict=True))


def test_nan_stays_in_its_document():
    (q, k, v), cu = inputs([6, 5], 2, 1, 16, torch.float32)
    k[3] = torch.nan
    out, dq, dk, dv = with_grads((q, k, v), cu, 6, 0.3)
    assert out[3:6].isnan().all() and dq[3:6].isnan().all() and dk[:6].isnan().any()
    assert not any(t[6:].isnan().any() for t in (out, dq, dk, dv))


@cpp_only
@pytest.mark.parametrize(
    "bounds, longest, message",
    [([0, 5], 4, "within 0 and 4"), ([0, 3], 4, "from 0 to 4"), ([0, 4], 3, "document 0 has 4 tokens.*0 to 3")],
)
def test_invalid_document_bounds_are_refused(bounds, longest, message):
    qkv, _ = inputs([4], 4, 4, 8, torch.float32)
    with pytest.raises(RuntimeError, match=message):
        packed_attention(*qkv, torch.tensor(bounds), longest, 1.0)
