"""PPO's per-token losses against float64 formulas written out here, with their gradients."""

import math
from functools import partial

import pytest
import torch
from law import check_law
from trialign.kernels import ppo_loss as P
from trialign.kernels.dispatch import choose, has_op

SIZES = [0, 1, 15, 1001]


def draw(n, spread=0.5, seed=0):
    generator = torch.Generator().manual_seed(seed + n)
    return (torch.randn(n, generator=generator) * spread for _ in range(3))


def policy_token(logp, old, advantage, low, high, dual):
    """(loss, slope) of one token by cases, as the papers draw it."""
    ratio = math.exp(min(logp - old, P.LOG_RATIO_MAX))
    held_at = 1 + high if ratio > 1 + high and advantage > 0 else 1 - low if ratio < 1 - low and advantage < 0 else None
    if held_at is not None:
        return -advantage * held_at, 0.0
    if dual is not None and advantage < 0 and ratio > dual:
        return -advantage * dual, 0.0
    return -advantage * ratio, -advantage * ratio if logp - old <= P.LOG_RATIO_MAX else 0.0


@pytest.mark.parametrize("dual", [None, 3.0])
@pytest.mark.parametrize("spread", [0.1, 1.0, 20.0])
def test_policy_loss_by_cases(spread, dual):
    logp, old, advantages = draw(400, spread)
    logp.requires_grad_()
    loss, ratio, clipped = P.clipped_policy_loss(logp, old, advantages, 0.2, 0.28, dual)
    (slope,) = torch.autograd.grad(loss.sum(), logp)
    rows = list(zip(logp.tolist(), old.tolist(), advantages.tolist(), strict=True))
    truth = torch.tensor([policy_token(*row, 0.2, 0.28, dual) for row in rows], dtype=torch.float64)
    torch.testing.assert_close(loss.detach().double(), truth[:, 0], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(slope.double(), truth[:, 1], rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        ratio.double(), (logp.detach().double() - old.double()).clamp(max=80).exp(), rtol=1e-5, atol=1e-30
    )
    outside = ((ratio > 1.28) & (advantages > 0)) | ((ratio < 0.8) & (advantages < 0))
    assert torch.equal(clipped.bool(), outside)
    assert not ratio.requires_grad and not clipped.requires_grad


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("bound", [None, 2.0])
def test_law(n, bound):
    """`bound` is the dual clip of the policy loss, and a tenth of it the clip of the value loss."""
    logp, old, advantages = draw(n)
    clip = None if bound is None else bound / 10

    def against(fn, ref, first, *rest):
        check_law(lambda x: fn(x, *rest), lambda x: ref(x, *(t.to(x.dtype) for t in rest)), (first,), (0,))

    policy = (
        lambda *t: P.clipped_policy_loss(*t, 0.2, 0.3, bound)[0],
        lambda *t: P.clipped_policy_loss_ref(*t, 0.2, 0.3, bound)[0],
    )
    against(*policy, logp, old, advantages)
    value = (lambda *t: P.clipped_value_loss(*t, clip)[0], lambda *t: P.clipped_value_loss_ref(*t, clip)[0])
    against(*value, logp, old, advantages)
    near = old + 0.05 * logp  # where k3 written out directly cancels
    for kind in P.KL_KINDS:
        against(partial(P.kl_estimate, kind=kind), partial(P.kl_estimate_ref, kind=kind), near, old)


def test_the_ratio_of_equal_logprobs_is_exactly_one():
    logp, _, advantages = draw(100)
    loss, ratio, clipped = P.clipped_policy_loss(logp, logp.clone(), advantages, 0.2, 0.2)
    assert (ratio == 1).all() and (clipped == 0).all() and torch.equal(loss, -advantages)


def test_wild_ratios_stay_finite():
    logp = torch.tensor([0.0, 0.0, 0.0, -1000.0, 200.0], requires_grad=True)
    old = torch.tensor([-500.0, -500.0, -500.0, 0.0, 0.0])
    advantages = torch.tensor([0.0, 1.0, -1.0, -1.0, 1.0])
    for dual in (None, 3.0):
        loss, ratio, _ = P.clipped_policy_loss(logp, old, advantages, 0.2, 0.2, dual)
        (slope,) = torch.autograd.grad(loss.sum(), logp)
        assert ratio.isfinite().all() and loss.isfinite().all() and slope.isfinite().all()
        assert loss[[0, 1, 4]].tolist() == pytest.approx([0.0, -1.2, -1.2])
    assert loss[2] == 3.0


def test_nan_is_not_swallowed():
    nan, one = torch.tensor([torch.nan]), torch.ones(1)
    for args in ((nan, one, one), (one, nan, one), (one, one, nan)):
        assert P.clipped_policy_loss(*args, 0.2, 0.2)[0].isnan().all()
        assert P.clipped_value_loss(*args, 0.2)[0].isnan().all()
    for kind in P.KL_KINDS:
        assert P.kl_estimate(nan, one, kind).isnan().all()


def test_value_loss_by_hand():
    values = torch.tensor([1.0, 1.0, 0.0, 2.0], requires_grad=True)
    old, returns = torch.tensor([0.0, 0.0, 0.0, 1.9]), torch.tensor([0.0, 2.0, 1.0, 3.0])
    loss, clipped = P.clipped_value_loss(values, old, returns, 0.2)
    # 1: free wins (1 > 0.04); 2: held at 0.2, (0.2 - 2)^2 > 1; 3 and 4: within the clip
    torch.testing.assert_close(loss, torch.tensor([0.5, 1.62, 0.5, 0.5]))
    assert clipped.tolist() == [0, 1, 0, 0]
    assert torch.autograd.grad(loss.sum(), values)[0].tolist() == [1.0, 0.0, -1.0, -1.0]
    assert torch.equal(P.clipped_value_loss(values, old, returns)[0], 0.5 * (values - returns).square())


def test_kl_kinds():
    logp, ref = torch.tensor([0.0, -3.0, 5.0]), torch.tensor([0.0, -1.0, 0.0])
    d = torch.tensor([0.0, -2.0, 5.0], dtype=torch.float64)
    for kind, truth in (("k1", d), ("k2", d * d / 2), ("k3", torch.exp(-d) - 1 + d)):
        torch.testing.assert_close(P.kl_estimate(logp, ref, kind).double(), truth, rtol=1e-6, atol=1e-7)
    assert P.kl_estimate(torch.tensor([-200.0]), torch.zeros(1), "k3").isinf().all()
    with pytest.raises(ValueError, match="'k4'.*k1, k2, k3"):
        P.kl_estimate(logp, ref, "k4")


def test_gradcheck_of_the_references():
    logp, old, advantages = (x.double() for x in draw(60))
    logp.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: P.clipped_policy_loss_ref(x, old, advantages, 0.2, 0.3, 3.0)[0], (logp,))
    assert torch.autograd.gradcheck(lambda x: P.clipped_value_loss_ref(x, old, advantages, 0.2)[0], (logp,))
    for kind in P.KL_KINDS:
        assert torch.autograd.gradcheck(lambda x, k=kind: P.kl_estimate_ref(x, old, k), (logp,))


@pytest.mark.skipif(not has_op("policy_loss"), reason="trialign._C is not built")
def test_opcheck():
    first, second, third = draw(20)
    for dual in (None, 3.0):
        torch.library.opcheck(torch.ops.trialign.policy_loss, (first, second, third, 0.2, 0.3, dual))
    for clip in (None, 0.2):
        torch.library.opcheck(torch.ops.trialign.value_loss, (first, second, third, clip))
    for kind in (1, 2, 3):
        torch.library.opcheck(torch.ops.trialign.kl_estimate, (first, second, kind))


def test_the_gradient_has_no_gradient():
    """The op's own derivative is a constant to autograd: a second one would be wrong, so it is refused."""
    logp, old, advantages = draw(20)
    logp.requires_grad_()
    weight = torch.ones(20, requires_grad=True)
    for fn in (lambda x: P.clipped_policy_loss(x, old, advantages, 0.2, 0.2)[0], lambda x: P.kl_estimate(x, old, "k3")):
        (slope,) = torch.autograd.grad(fn(logp).sum(), logp)
        (again,) = torch.autograd.grad((fn(logp) * weight).sum(), logp, create_graph=True)
        assert torch.equal(slope, again)
        if choose("policy_loss", logp) != "reference":
            with pytest.raises(RuntimeError, match="once_differentiable"):
                again.sum().backward()


def test_only_the_first_input_gets_a_gradient():
    leaves = [x.requires_grad_() for x in draw(20)]
    for loss in (
        P.clipped_policy_loss(*leaves, 0.2, 0.2)[0],
        P.clipped_value_loss(*leaves, 0.2)[0],
        P.kl_estimate(*leaves[:2], "k2"),
    ):
        grads = torch.autograd.grad(loss.sum(), leaves, allow_unused=True)
        assert grads[0] is not None and grads[1] is None and grads[2] is None


def test_an_impossible_token():
    """logp = -inf: the ratio is 0 to any accuracy that matters, and nothing is NaN."""
    logp, old, advantages = torch.full((2,), -torch.inf), torch.zeros(2), torch.tensor([1.0, -1.0])
    loss, ratio, clipped = P.clipped_policy_loss(logp.requires_grad_(), old, advantages, 0.2, 0.2)
    (slope,) = torch.autograd.grad(loss.sum(), logp)
    assert ratio.abs().max() < 1e-37 and clipped.tolist() == [0, 1] and slope.abs().max() < 1e-37
    torch.testing.assert_close(loss, torch.tensor([0.0, 0.8]), rtol=1e-6, atol=1e-37)


def test_more_than_2_to_the_31_tokens_without_memory():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.randn(3 << 30, requires_grad=True)
        losses = (
            P.clipped_policy_loss(x, x, x, 0.2, 0.2)[0],
            P.clipped_value_loss(x, x, x, 0.2)[0],
            P.kl_estimate(x, x, "k3"),
        )
        for loss in losses:
            assert torch.autograd.grad(loss.sum(), x)[0].shape == x.shape == loss.shape


def test_meta_run():
    x = torch.randn(7, device="meta")
    assert P.clipped_policy_loss(x, x, x, 0.2, 0.2)[0].shape == (7,) and P.clipped_value_loss(x, x, x, 0.2)[
        0
    ].shape == (7,)
