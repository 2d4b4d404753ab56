"""Checks that hold for every op: opcheck passes, references have the gradients of finite differences, wrong sizes are
refused, operands may be strided, and every public function runs without data."""

from typing import Any

import pytest
import torch
from accuracy import as_tuple
from launches import specs
from torch import Tensor, empty, ones, rand, randn, tensor, zeros
from trialign.kernels import (
    adamw,
    attention,
    gae,
    grouped_matmul,
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
    "linear_rows": (randn(N, H).bfloat16(), randn(V, H).bfloat16()),
    "logprob_backward": (randn(N, V), LABELS, STATS, *GRADS, 1.0, 0),
    "logprob_backward_": (randn(N, V), LABELS, STATS, *GRADS, 1.0, 0),
    "logprob_stats": (randn(N, V), LABELS, 1.0, 0),
    "logprob_update_": (STATS, randn(N, V), LABELS, 1.0, 0),
    "nf4_gemv": (randn(N, 64), [*nf4.pack_nf4(randn(3, 64))]),
    "nf4_unpack": ([*nf4.pack_nf4(randn(3, 64))], torch.bfloat16),
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
# (op, {argument: value}): the other paths of optional arguments.
VARIANTS = [
    *((op, {}) for op in CALLS),
    ("adamw", {4: empty(N).bfloat16()}),
    ("adamw", {4: None}),
    ("attention", {6: None, 7: None}),
    *(("kl_estimate", {2: kind}) for kind in (1, 2)),
    *((op, {place: None}) for op in ("logprob_backward", "logprob_backward_") for place in (3, 4)),
    ("paged_attention", {6: None, 7: None}),
    ("policy_loss", {5: 3.0}),
    ("rms_norm_backward", {4: None}),
    ("rope_", {0: randn(N, 5, 8)[:, 1:3], 3: True, 4: True}),
    ("route", {2: False}),
    ("route_backward", {4: False}),
    ("unpermute", {2: None}),
    ("value_loss", {3: 0.2}),
]
DIFFERENTIABLE = {  # op: arguments with a gradient
    "add_rms_norm": (0, 1, 2), "attention": (0, 1, 2), "grouped_matmul": (0, 1), "permute": (0,),
    "rms_norm": (0, 1), "route": (0,), "swiglu": (0,), "unpermute": (0, 2),
}  # fmt: skip
# Arguments that stay fp32 where an op computes in bf16.
FP32 = {
    "attention": (6,), "attention_backward": (5, 9), "logprob_backward": (2, 3, 4), "logprob_backward_": (2, 3, 4),
    "logprob_update_": (0,), "paged_attention": (6,), "rope_": (1, 2),
    "rms_norm_backward": (3,), "route_backward": (0, 2), "sample": (1, 3), "unpermute": (2,),
    "unpermute_backward": (3,),
}  # fmt: skip
ONE_DTYPE = {"adamw", "gae", "kl_estimate", "linear_rows", "policy_loss", "value_loss"}


def arguments_of(op: str, changes: dict | None = None, dtype: torch.dtype = torch.float32) -> list:
    """New arguments for an op: `changes` by position; in `dtype` where the op takes it."""
    values = [(changes or {}).get(i, value) for i, value in enumerate(CALLS[op])]
    narrow = set() if op in ONE_DTYPE else {i for i in range(len(values)) if i not in FP32.get(op, ())}
    return [
        (value.to(dtype) if i in narrow and value.is_floating_point() else value).clone()
        if isinstance(value, Tensor)
        else value
        for i, value in enumerate(values)
    ]


def test_every_op_has_a_row():
    list(specs())  # imports every module
    names = {name.removeprefix("trialign::") for name in torch._C._dispatch_get_all_op_names() if "trialign::" in name}
    assert names == CALLS.keys()


@pytest.mark.parametrize("op, changes", VARIANTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(op, changes, dtype):
    """Schema, fake and, of differentiable arguments, autograd registration."""
    arguments = arguments_of(op, changes, dtype)
    for place in DIFFERENTIABLE.get(op, ()):
        if arguments[place] is not None:
            arguments[place].requires_grad_()
    torch.library.opcheck(getattr(torch.ops.trialign, op).default, tuple(arguments))


def double(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


SLOPES, PACKED, ANGLES = rand(4), nf4.pack_nf4(randn(5, 64)), (rand(N, 4).double(), rand(N, 4).double())
REFERENCES = {
    "attention": (
        lambda *qkv: attention.packed_attention_ref(*qkv, BOUNDS, 3, 0.5, SLOPES, 3),
        [(N, 4, 8), (N, 2, 8), (N, 2, 8)],
    ),
    "grouped_matmul": (lambda x, w: grouped_matmul.grouped_matmul(x, w, BOUNDS), [(N, H), (2, H, 3)]),
    "kl_estimate": (lambda x, y: tuple(ppo_loss.kl_estimate_ref(x, y, k) for k in ppo_loss.KL_KINDS), [(60,), None]),
    "linear_logprob": (lambda x, w: linear_logprob.linear_logprob(x, w, LABELS, 1.4), [(N, H), (V, H)]),
    "logprob": (lambda x: (*logprob.logprob(x, LABELS, 1.3), *logprob.logprob_ref(x, LABELS, 1.3)), [(N, V)]),
    "nf4": (lambda x: nf4.nf4_linear_ref(x, PACKED), [(3, 64)]),
    "permute": (lambda x: moe.permute_ref(x, ORDER, K), [(N, H)]),
    "policy_loss": (lambda x, y, a: ppo_loss.clipped_policy_loss_ref(x, y, a, 0.2, 0.3, 3.0)[0], [(60,), None, None]),
    "rms_norm": (lambda x, r, w: rms_norm.add_rms_norm_ref(x, r, w, 1e-5), [(N, H), (N, H), (H,)]),
    "rope": (lambda x: (rope.rope_ref(x, *ANGLES), rope.rope_ref(x, *ANGLES, True)), [(N, 2, 8)]),
    "route": (lambda x: (moe.route_ref(x, 2, True)[0], moe.route_ref(x, 2, False)[0]), [(N, 5)]),
    "swiglu": (swiglu.swiglu_ref, [(3, 8)]),
    "unpermute": (lambda r, w: moe.unpermute_ref(r, ORDER, w), [(N * K, H), (N, K)]),
    "value_loss": (lambda v, o, r: ppo_loss.clipped_value_loss_ref(v, o, r, 0.2)[0], [(60,), None, None]),
}


@pytest.mark.parametrize("op", REFERENCES)
def test_references_have_the_gradients_of_finite_differences(op):
    """Shapes of inputs with a gradient; None: an input of the first one's shape without."""
    torch.manual_seed(0)
    function, shapes = REFERENCES[op]
    inputs = [double(*shape) if shape else double(*shapes[0]).detach() for shape in shapes]
    assert torch.autograd.gradcheck(function, inputs)


# (op, argument, dim) that may have any size, or any large enough one.
FREE = {
    ("attention", 3, 0), ("attention_backward", 5, 0), ("gae", 3, 0), ("route", 0, 0), ("route", 0, 1), 
    ("swiglu", 0, 0), ("rms_norm", 0, 0),
    ("logprob_stats", 0, 1), ("logprob_update_", 1, 1), ("logprob_backward", 0, 1), ("logprob_backward_", 0, 1),
    ("sample", 0, 1), ("sort_by_expert", 0, 0), ("sort_by_expert", 0, 1), ("permute", 0, 1), ("unpermute", 0, 1),
    ("route_backward", 1, 1), ("rope_", 0, 1),
}  # fmt: skip
UNREAD = {("attention_backward", 4)}  # `out`, for the GPU kernels


@pytest.mark.parametrize("op", SCHEMAS)
def test_wrong_sizes_and_dtypes_are_refused(op):
    """Each tensor in turn of another dtype or one row or column less: an op reads by pointer, and would run on."""
    wrong = []
    for place, value in enumerate(CALLS[op]):
        if not isinstance(value, Tensor) or (op, place) in UNREAD:
            continue
        if (op, place) != ("permute", 0):
            wrong.append((place, value.double() if value.is_floating_point() else value.to(torch.int16)))
        dims = [dim for dim in range(value.dim()) if (op, place, dim) not in FREE]
        wrong += [(place, value.narrow(dim, 0, value.shape[dim] - 1).contiguous()) for dim in dims]
    for place, value in wrong:
        arguments = arguments_of(op)
        arguments[place] = value
        with pytest.raises(RuntimeError):
            getattr(torch.ops.trialign, op)(*arguments)
            pytest.fail(f"argument {place} of {list(value.shape)} {value.dtype} passed")


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
    (lambda: sampling.sample(randn(N, V), ones(2), *SETTINGS[1:]), "must be one a row"),
    (lambda: logprob.logprob(randn(N, V), LABELS, 0.0), "positive, got 0"),
    (lambda: linear_logprob.linear_logprob(ROWS[0], randn(V, H), LABELS, -1.0), "positive, got -1"),
    (lambda: nf4.nf4_linear(randn(3, 128), PACKED), r"x \[3, 128\] .* weight of \[5, 64\]"),
    (lambda: gae.gae(rand(4), rand(3), ones(4).bool(), BOUNDS, 1.0, 1.0), "differ in length"),
    (lambda: rope.rope_(randn(5, 3, 16), rand(4, 8), rand(4, 8)), r"sin \[4, 8\] do not fit x \[5, 3, 16\]"),
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
    (lambda: moe.grouped_matmul(ROWS[0], randn(3, H, 4), BOUNDS), r"x \[4, 6\] and 3 offsets .* weights \[3, 6, 4\]"),
    *((lambda k=k: moe.route(randn(N, 5), k), f"top-{k} of 5 experts") for k in (0, 6)),
    (lambda: nf4.quantize_nf4(zeros(2, 65)), r"64 weights, got \[2, 65\]"),
    (lambda: nf4.quantize_nf4(zeros(1, 64) + torch.inf), "not finite"),
]


@pytest.mark.parametrize("call, message", REFUSED)
def test_public_functions_refuse_invalid_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


ALIKE = (  # public functions named as their ops
    *(rms_norm.rms_norm, rms_norm.add_rms_norm, gae.gae, swiglu.swiglu, sampling.sample),
    *(moe.route, moe.sort_by_expert, moe.permute, moe.grouped_matmul),
    *(paged_attention.paged_attention, paged_attention.write_kv),
)
PUBLIC: dict[str, tuple[Any, ...]] = {
    function.__name__: (function, *CALLS[function.__name__]) for function in ALIKE
} | {
    "logprob": (logprob.logprob, randn(N, V), LABELS),
    "linear_logprob": (linear_logprob.linear_logprob, ROWS[0], randn(V, H), LABELS),
    "policy_loss": (ppo_loss.clipped_policy_loss, *FLAT[:3], 0.2, 0.2),
    "value_loss": (ppo_loss.clipped_value_loss, *FLAT[:3]),
    "kl_estimate": (ppo_loss.kl_estimate, *FLAT[:2], "k3"),
    "rope_": (rope.rope_, *CALLS["rope_"][:3]),
    "nf4_linear": (nf4.nf4_linear, randn(N, 64), PACKED),
    "packed_attention": (attention.packed_attention, *CALLS["attention"]),
    "adamw_": (adamw.adamw_, *CALLS["adamw"]),
    "unpermute": (moe.unpermute, *CALLS["unpermute"][:3]),
}


def with_gaps(x: Tensor) -> Tensor:
    """The same values with a gap after each."""
    return torch.stack([x, torch.full_like(x, 1)], -1)[..., 0]


KEPT = {"rope_": [0], "write_kv": [2, 3], "adamw_": [0, 1, 2, 4], "paged_attention": [1, 2]}


@pytest.mark.parametrize("name", PUBLIC)
def test_operands_may_be_strided(name):
    """Except those written in place, and caches, which are too large to be copied."""
    function, *arguments = PUBLIC[name]
    packed, gapped = ([a.clone() if isinstance(a, Tensor) else a for a in arguments] for _ in range(2))
    for i, a in enumerate(gapped):
        if isinstance(a, Tensor) and i not in KEPT.get(name, ()):
            gapped[i] = with_gaps(a)
    expected, actual = as_tuple(function(*packed)), as_tuple(function(*gapped))
    for a, b in [*zip(packed, gapped, strict=True), *zip(expected, actual, strict=True)]:
        if isinstance(a, Tensor):
            torch.testing.assert_close(a, b)
