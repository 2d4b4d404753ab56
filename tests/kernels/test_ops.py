"""What holds for every op: opcheck passes, wrong sizes are refused, and every public function runs without data."""

import importlib
from pathlib import Path

import pytest
import torch
import trialign.kernels
from torch import Tensor, empty, ones, rand, randn, tensor, zeros
from torch._subclasses.fake_tensor import FakeTensorMode
from trialign.kernels import (
    adamw,
    attention,
    gae,
    linear_logprob,
    logprob,
    moe,
    nf4,
    paged_attention,
    ppo_loss,
    rms_norm,
    rope,
    sampling,
    swiglu,
)
from trialign.kernels.backends.schemas import SCHEMAS
from trialign.kernels.dispatch import EXTENSION

pytestmark = pytest.mark.skipif(not EXTENSION, reason="trialign._C is not built")

N, H, V, K = 4, 6, 9, 2
ROWS = (randn(N, H), randn(N, H))
LABELS, STATS, GRADS = torch.arange(N), rand(4, N) + 1, (rand(N), rand(N))
BOUNDS = tensor([0, 1, N])
QKV = (randn(N, 4, 8), randn(N, 2, 8), randn(N, 2, 8))
CACHES = (randn(3, 4, 2, 8), randn(3, 4, 2, 8))
TABLES, LENGTHS = tensor([[0, 1], [2, 0]]).int(), tensor([5, 3]).int()
SETTINGS = (ones(N), ones(N).int(), ones(N), torch.arange(N), torch.arange(N))
CHOSEN, ORDER = tensor([[0, 1], [2, 0], [1, 2], [2, 1]]), torch.arange(N * K)
FLAT = tuple(rand(N) for _ in range(4))

CALLS = {
    "adamw": (*FLAT, empty(N), 1e-3, 0.9, 0.99, 1e-8, 0.1, 1, 1.0),
    "add_rms_norm": (*ROWS, randn(H), 1e-5),
    "attention": (*QKV, BOUNDS, 3, 0.5, rand(4), 2),
    "attention_backward": (QKV[0], *QKV, QKV[0], rand(N, 4, 2), BOUNDS, 3, 0.5, rand(4), 2),
    "gae": (*FLAT[:2], rand(N) < 0.5, BOUNDS, 0.9, 0.9),
    "grouped_matmul": (ROWS[0], randn(2, H, 3), BOUNDS),
    "grouped_outer": (*ROWS, BOUNDS),
    "kl_estimate": (*FLAT[:2], 3),
    "logprob_backward": (randn(N, V), LABELS, STATS, *GRADS, 1.0, 0),
    "logprob_backward_": (randn(N, V), LABELS, STATS, *GRADS, 1.0, 0),
    "logprob_stats": (randn(N, V), LABELS, 1.0, 0),
    "logprob_update_": (STATS, randn(N, V), LABELS, 1.0, 0),
    "nf4_linear": (randn(N, 64), *nf4.quantize_nf4(randn(3, 64))),
    "nf4_linear_backward": (randn(N, 3), *nf4.quantize_nf4(randn(3, 64))),
    "paged_attention": (randn(2, 4, 8), *CACHES, TABLES, LENGTHS, 0.5, rand(4), 3),
    "permute": (ROWS[0], ORDER, K),
    "policy_loss": (*FLAT[:3], 0.2, 0.2, None),
    "rms_norm": (ROWS[0], randn(H), 1e-5),
    "rms_norm_backward": (*ROWS, randn(H), rand(N), randn(N, H)),
    "rope_": (randn(N, 2, 8), rand(N, 4), rand(N, 4), False, False),
    "route": (randn(N, 3), K, True),
    "route_backward": (randn(N, K), randn(N, 3), rand(N, K), CHOSEN, True),
    "sample": (randn(N, V), *SETTINGS),
    "sort_by_expert": (CHOSEN, 3),
    "swiglu": (randn(N, 2 * H),),
    "swiglu_backward": (randn(N, H), randn(N, 2 * H)),
    "unpermute": (randn(N * K, H), ORDER, rand(N, K), K),
    "unpermute_backward": (ROWS[0], randn(N * K, H), ORDER, rand(N, K)),
    "value_loss": (*FLAT[:3], None),
    "write_kv": (*QKV[1:], *CACHES, torch.arange(N)),
}
# Triton's alone, which nothing serves on the CPU: tests/kernels/test_triton_linear_logprob.py checks them, interpreted.
TRITON_ONLY = {"linear_logprob_stats", "linear_logprob_gradient_", "add_product_"}


def fresh(op: str) -> list:
    return [value.clone() if isinstance(value, Tensor) else value for value in CALLS[op]]


def test_every_op_has_a_row():
    for folder in trialign.kernels.__path__:
        for path in Path(folder).glob("*.py"):
            importlib.import_module(f"trialign.kernels.{path.stem}")
    names = {name.removeprefix("trialign::") for name in torch._C._dispatch_get_all_op_names() if "trialign::" in name}
    assert names == CALLS.keys() | TRITON_ONLY


@pytest.mark.parametrize("op", CALLS)
def test_opcheck(op):
    torch.library.opcheck(getattr(torch.ops.trialign, op).default, tuple(fresh(op)))


# (op, argument, dim) that may be of any size: the others follow from it, or it only has to be large enough.
FREE = {
    ("attention", 3, 0), ("attention_backward", 5, 0), ("gae", 3, 0), ("route", 0, 0), ("route", 0, 1), 
    ("swiglu", 0, 0), ("rms_norm", 0, 0),
    ("logprob_stats", 0, 1), ("logprob_update_", 1, 1), ("logprob_backward", 0, 1), ("logprob_backward_", 0, 1),
    ("sample", 0, 1), ("sort_by_expert", 0, 0), ("sort_by_expert", 0, 1), ("permute", 0, 1), ("unpermute", 0, 1),
    ("route_backward", 1, 1), ("rope_", 0, 1),
}  # fmt: skip
UNREAD = {("attention_backward", 4)}  # `out`, for the GPU kernels


@pytest.mark.parametrize("op", SCHEMAS)
def test_wrong_sizes_are_refused(op):
    """Each tensor in turn with one row or column less: an op reads by pointer, and would run on."""
    sizes = [(i, dim) for i, value in enumerate(CALLS[op]) if isinstance(value, Tensor) for dim in range(value.dim())]
    for place, dim in sizes:
        if (op, place, dim) in FREE or (op, place) in UNREAD:
            continue
        arguments = fresh(op)
        arguments[place] = arguments[place].narrow(dim, 0, arguments[place].shape[dim] - 1).contiguous()
        with pytest.raises(RuntimeError):
            getattr(torch.ops.trialign, op)(*arguments)
            pytest.fail(f"argument {place} of {list(arguments[place].shape)} passed")


@pytest.mark.parametrize("op", SCHEMAS)
def test_wrong_dtypes_are_refused(op):
    for place, value in enumerate(CALLS[op]):
        if not isinstance(value, Tensor) or (op, place) in UNREAD or (op, place) == ("permute", 0):
            continue
        arguments = fresh(op)
        arguments[place] = value.double() if value.is_floating_point() else value.to(torch.int16)
        with pytest.raises(RuntimeError):
            getattr(torch.ops.trialign, op)(*arguments)
            pytest.fail(f"argument {place} of {arguments[place].dtype} passed")


WINDOW, HEADS = "a window of -?[0-9]+ keys", "6 query heads do not divide into groups over 4"
REFUSED = [
    *((lambda w=w: attention.packed_attention(*QKV, BOUNDS, 3, 0.5, None, w), WINDOW) for w in (0, -1, -100_000)),
    (lambda: paged_attention.paged_attention(randn(2, 4, 8), *CACHES, TABLES, LENGTHS, 0.5, None, 0), WINDOW),
    (lambda: attention.packed_attention(randn(N, 6, 8), *[randn(N, 4, 8)] * 2, BOUNDS, 3, 0.5), HEADS),
    (lambda: paged_attention.paged_attention(randn(2, 6, 8), *[zeros(3, 4, 4, 8)] * 2, TABLES, LENGTHS, 0.5), HEADS),
    (lambda: attention.packed_attention(*QKV, BOUNDS, 3, 0.5, rand(2)), r"slopes \[2\] for 4 heads"),
    (lambda: attention.packed_attention(QKV[0], QKV[1][:3], QKV[2][:3], BOUNDS, 3, 0.5), "do not fit each other"),
    (lambda: attention.packed_attention(randn(N, 4, 9), *QKV[1:], BOUNDS, 3, 0.5), "a head dim of 9, keys one of 8"),
    (lambda: paged_attention.write_kv(*QKV[1:], *[c.transpose(0, 1) for c in CACHES], LABELS), "must be contiguous"),
    (lambda: paged_attention.write_kv(randn(1, 2, 9), randn(1, 2, 9), *CACHES, LABELS[:1]), "do not fit the caches"),
    (lambda: paged_attention.write_kv(QKV[1], QKV[2][:2], *CACHES, LABELS), "do not fit the caches"),
    (lambda: sampling.sample(randn(N, V), ones(N) * -0.5, *SETTINGS[1:]), "temperature of row 0 is -0.5"),
    (lambda: sampling.sample(randn(N, V), ones(2), *SETTINGS[1:]), "must be one a row"),
    (lambda: logprob.logprob(randn(N, V), LABELS[:2]), r"labels \[2\] for 4 rows"),
    (lambda: linear_logprob.linear_logprob(ROWS[0], randn(V, H), LABELS[:2]), r"labels \[2\] for 4 rows"),
    (lambda: rms_norm.rms_norm(randn(N, 8), randn(H), 1e-5), "and weight .6.: must be"),
    (lambda: rms_norm.add_rms_norm(ROWS[0], ROWS[1][:1], randn(H), 1e-5), "residual .1, 6."),
    (lambda: swiglu.swiglu(randn(3, 7)), "must be even"),
    (lambda: rope.rope_(randn(N, 2, 8), rand(N, 3), rand(N, 3)), "do not fit x"),
    (lambda: adamw.adamw_(rand(4), rand(3), *FLAT[:2], None, 1e-3, 0.9, 0.99, 1e-8, 0.1, 1), "differ in size"),
    (lambda: ppo_loss.clipped_policy_loss(rand(4), rand(3), rand(4), 0.2, 0.2), "differ in size"),
    (lambda: gae.gae(rand(4), rand(4), ones(4).bool(), tensor([0, 3]), 1.0, 1.0), "from 0 to 3, must run from 0 to 4"),
    (lambda: moe.permute(ROWS[0], ORDER[:3], K), "does not fit 4 tokens of 2 slots"),
    (lambda: moe.unpermute(ROWS[0], ORDER, rand(N, K)), "differ"),
]


@pytest.mark.parametrize("call, message", REFUSED)
def test_public_functions_refuse_what_does_not_fit(call, message):
    with pytest.raises(ValueError, match=message):
        call()


PUBLIC = {
    "logprob": (logprob.logprob, randn(N, V), LABELS),
    "linear_logprob": (linear_logprob.linear_logprob, ROWS[0], randn(V, H), LABELS),
    "gae": (gae.gae, *CALLS["gae"]),
    "policy_loss": (ppo_loss.clipped_policy_loss, *FLAT[:3], 0.2, 0.2),
    "value_loss": (ppo_loss.clipped_value_loss, *FLAT[:3]),
    "kl_estimate": (ppo_loss.kl_estimate, *FLAT[:2], "k3"),
    "rms_norm": (rms_norm.rms_norm, *CALLS["rms_norm"]),
    "add_rms_norm": (rms_norm.add_rms_norm, *CALLS["add_rms_norm"]),
    "rope_": (rope.rope_, *CALLS["rope_"][:3]),
    "swiglu": (swiglu.swiglu, *CALLS["swiglu"]),
    "packed_attention": (attention.packed_attention, *CALLS["attention"]),
    "paged_attention": (paged_attention.paged_attention, *CALLS["paged_attention"]),
    "write_kv": (paged_attention.write_kv, *CALLS["write_kv"]),
    "adamw_": (adamw.adamw_, *CALLS["adamw"]),
    "nf4_linear": (nf4.nf4_linear, *CALLS["nf4_linear"]),
    "route": (moe.route, *CALLS["route"]),
    "sort_by_expert": (moe.sort_by_expert, *CALLS["sort_by_expert"]),
    "permute": (moe.permute, *CALLS["permute"]),
    "unpermute": (moe.unpermute, *CALLS["unpermute"][:3]),
    "grouped_matmul": (moe.grouped_matmul, *CALLS["grouped_matmul"]),
    "sample": (sampling.sample, *CALLS["sample"]),
}


def strided(x: Tensor) -> Tensor:
    """The same numbers with a gap after each."""
    return torch.stack([x, torch.full_like(x, 1)], -1)[..., 0]


KEPT = {"rope_": [0], "write_kv": [2, 3], "adamw_": [0, 1, 2, 4], "paged_attention": [1, 2]}


@pytest.mark.parametrize("name", PUBLIC)
def test_operands_may_be_strided(name):
    """All but what is written in place, and caches, which are too large to be copied."""
    function, *arguments = PUBLIC[name]
    copies = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
    gapped = [a.clone() if isinstance(a, Tensor) else a for a in arguments]
    for i, a in enumerate(gapped):
        if isinstance(a, Tensor) and i not in KEPT.get(name, ()):
            gapped[i] = strided(a)
    right, got = function(*copies), function(*gapped)
    pairs = [*zip(copies, gapped, strict=True), *zip(tuple_of(right), tuple_of(got), strict=True)]
    for a, b in pairs:
        if isinstance(a, Tensor):
            torch.testing.assert_close(a, b)


def tuple_of(result) -> tuple:
    return result if isinstance(result, tuple) else (result,)


def shapes(result) -> list:
    return [(r.shape, r.dtype) for r in tuple_of(result) if isinstance(r, Tensor)]


@pytest.mark.parametrize("name", PUBLIC)
def test_meta_and_fake_runs_have_the_shapes_of_real_ones(name):
    function, *arguments = PUBLIC[name]
    real = shapes(function(*(a.clone() if isinstance(a, Tensor) else a for a in arguments)))
    assert shapes(function(*(a.to("meta") if isinstance(a, Tensor) else a for a in arguments))) == real
    with FakeTensorMode():
        assert (
            shapes(function(*(empty(a.shape, dtype=a.dtype) if isinstance(a, Tensor) else a for a in arguments)))
            == real
        )
