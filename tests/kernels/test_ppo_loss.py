"""PPO's per-token losses against float64 formulas written out here, with their gradients."""

from functools import partial

import pytest
import torch
from accuracy import FLOOR, check_accuracy
from implementations import by_mode, device  # noqa: F401 (a fixture)
from trialign.kernels import ppo_loss as P
from trialign.kernels.dispatch import choose


def draw(n, spread=0.5):
    return list(torch.randn(3, n) * spread)


@pytest.mark.parametrize("n", [0, 1, 15, by_mode(1001, 1500)])
@pytest.mark.parametrize("spread", [0.3, 20.0])
@pytest.mark.parametrize("bound", [None, 2.0])
def test_error_against_float64(n, spread, bound):
    """`bound` is the dual clip of the policy loss, and a tenth of it the clip of the value loss."""
    first, old, advantages = draw(n, spread)
    clip, near = None if bound is None else bound / 10, old + 0.05 * first  # where k3 written out directly cancels

    def check(fn, ref, x, *rest):
        functions = (lambda x, f=f: f(x, *(t.to(x.dtype) for t in rest)) for f in (fn, ref))
        check_accuracy(*functions, (x,), (0,), FLOOR[torch.float32] if spread > 1 else None)

    policy = partial(P.clipped_policy_loss, clip_low=0.2, clip_high=0.3, dual_clip=bound)
    policy_ref = partial(P.clipped_policy_loss_ref, clip_low=0.2, clip_high=0.3, dual_clip=bound)
    check(lambda *t: policy(*t)[0], lambda *t: policy_ref(*t)[0], first, old, advantages)
    (_, ratio, clipped), expected = policy(first.requires_grad_(), old, advantages), policy_ref(first, old, advantages)
    assert torch.equal(clipped, expected[2]) and not ratio.requires_grad and not clipped.requires_grad
    torch.testing.assert_close(ratio, expected[1].detach(), rtol=1e-5, atol=1e-30)
    first = first.detach()
    value, value_ref = (partial(f, clip=clip) for f in (P.clipped_value_loss, P.clipped_value_loss_ref))
    check(lambda *t: value(*t)[0], lambda *t: value_ref(*t)[0], first, old, advantages)
    assert torch.equal(value(first, old, advantages)[1], value_ref(first, old, advantages)[1])
    for kind in P.KL_KINDS:
        check(partial(P.kl_estimate, kind=kind), partial(P.kl_estimate_ref, kind=kind), near, old)


def test_wild_ratios_and_impossible_tokens_stay_finite():
    logp = torch.tensor([0.0, 0.0, 0.0, -1000.0, 200.0, -torch.inf, -torch.inf], requires_grad=True)
    old = torch.tensor([-500.0, -500.0, -500.0, 0.0, 0.0, 0.0, 0.0])
    advantages = torch.tensor([0.0, 1.0, -1.0, -1.0, 1.0, 1.0, -1.0])
    for dual in (None, 3.0):
        loss, ratio, clipped = P.clipped_policy_loss(logp, old, advantages, 0.2, 0.2, dual)
        (slope,) = torch.autograd.grad(loss.sum(), logp)
        assert all(t.isfinite().all() for t in (ratio, loss, slope))
        assert loss[[0, 1, 4, 5, 6]].tolist() == pytest.approx([0.0, -1.2, -1.2, 0.0, 0.8])
        assert ratio[5:].max() < 1e-37 and slope[5:].abs().max() < 1e-37 and clipped[5:].tolist() == [0, 1]
    assert loss[2] == 3.0


def test_nan_is_kept():
    nan, one = torch.tensor([torch.nan]), torch.ones(1)
    for args in ((nan, one, one), (one, nan, one), (one, one, nan)):
        assert P.clipped_policy_loss(*args, 0.2, 0.2)[0].isnan().all()
        assert P.clipped_value_loss(*args, 0.2)[0].isnan().all()
    for kind in P.KL_KINDS:
        assert P.kl_estimate(nan, one, kind).isnan().all()


def test_kl_estimates_equal_their_formulas():
    logp, ref = torch.tensor([0.0, -3.0, 5.0]), torch.tensor([0.0, -1.0, 0.0])
    d = (logp - ref).double()
    for kind, exact in (("k1", d), ("k2", d * d / 2), ("k3", torch.exp(-d) - 1 + d)):
        torch.testing.assert_close(P.kl_estimate(logp, ref, kind).double(), exact, rtol=1e-6, atol=1e-7)
    assert P.kl_estimate(torch.tensor([-200.0]), torch.zeros(1), "k3").isinf().all()
    infinite = torch.tensor([0.0, torch.inf], requires_grad=True)
    estimate = P.kl_estimate(infinite, torch.tensor([-torch.inf, 0.0]), "k1")
    assert estimate.tolist() == [torch.inf] * 2
    assert torch.autograd.grad(estimate.sum(), infinite)[0].tolist() == [1.0] * 2
    with pytest.raises(ValueError, match="'k4'.*k1, k2, k3"):
        P.kl_estimate(logp, ref, "k4")


def test_second_derivatives_are_refused():
    """The op's derivative is a constant to autograd: a second one would be wrong."""
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
