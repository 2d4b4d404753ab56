"""GAE against a float64 walk written out here: packing, gaps, empty and fully masked sequences."""

import pytest
import torch
from big import untouched
from hypothesis import given, settings
from hypothesis import strategies as st
from trialign.kernels.dispatch import choose, has_op
from trialign.kernels.gae import gae, gae_ref


def walk(rewards, values, mask, cu_seqlens, gamma, lam):
    """One token after another, in Python floats."""
    advantages, returns = [0.0] * len(rewards), [0.0] * len(rewards)
    for start, end in zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True):
        tokens = [t for t in range(start, end) if mask[t]]
        for place in reversed(range(len(tokens))):
            t = tokens[place]
            last = place == len(tokens) - 1
            value_after = 0.0 if last else values[tokens[place + 1]]
            advantage_after = 0.0 if last else advantages[tokens[place + 1]]
            advantages[t] = rewards[t] + gamma * value_after - values[t] + gamma * lam * advantage_after
            returns[t] = advantages[t] + values[t]
    return advantages, returns


def case(lengths, seed, kept=0.7):
    generator = torch.Generator().manual_seed(seed)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    total = int(cu_seqlens[-1])
    rewards, values = torch.randn(2, total, generator=generator)
    return rewards, values, torch.rand(total, generator=generator) < kept, cu_seqlens


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=8),
    st.integers(0, 10**6),
    st.floats(0, 1),
    st.sampled_from([0.0, 0.9, 1.0]),
    st.sampled_from([0.0, 0.95, 1.0]),
)
def test_any_packing(lengths, seed, kept, gamma, lam):
    inputs = case(lengths, seed, kept)
    truth = walk(*(x.tolist() for x in inputs), gamma, lam)
    for fn in (gae, gae_ref):
        for mine, theirs in zip(fn(*inputs, gamma, lam), truth, strict=True):
            torch.testing.assert_close(mine.double(), torch.tensor(theirs).double(), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("cu_dtype", [torch.int32, torch.int64])
def test_error_is_within_the_law(cu_dtype):
    rewards, values, mask, cu_seqlens = case([512, 1, 300, 0, 47], 3, 1.0)
    truth = gae_ref(rewards.double(), values.double(), mask, cu_seqlens, 1.0, 0.95)
    ours = gae(rewards, values, mask, cu_seqlens.to(cu_dtype), 1.0, 0.95)
    plain = gae_ref(rewards, values, mask, cu_seqlens, 1.0, 0.95)
    for a, b, c in zip(ours, plain, truth, strict=True):
        assert (a.double() - c).abs().max() <= 2 * (b.double() - c).abs().max() + 1e-6 * c.abs().max()


@pytest.mark.parametrize("prompt", [0, 1, 15, 16, 40])
@pytest.mark.parametrize("lam", [1.0, 0.95, 0.0])
def test_whole_vectors(prompt, lam):
    """Lengths around the vector's, with the mask as it is in training: prompt off, response on."""
    lengths = [0, 1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 200]
    rewards, values, mask, cu_seqlens = case(lengths, 5, 1.0)
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        mask[start : min(start + prompt, end)] = False
    values[~mask] = torch.nan
    truth = walk(*(x.tolist() for x in (rewards, values, mask, cu_seqlens)), 0.99, lam)
    for mine, theirs in zip(gae(rewards, values, mask, cu_seqlens, 0.99, lam), truth, strict=True):
        torch.testing.assert_close(mine.double(), torch.tensor(theirs).double(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("at", [0, 20, 63])
def test_nan_reaches_the_tokens_before_it_in_its_sequence_alone(at):
    rewards, values, mask, cu_seqlens = case([64, 64, 64], 6, 1.0)
    rewards[64 + at] = torch.nan
    spoilt = gae(rewards, values, mask, cu_seqlens, 0.99, 0.95)[0].isnan()
    assert spoilt[64 : 64 + at + 1].all() and spoilt.sum() == at + 1


@pytest.mark.skipif(choose("gae", torch.empty(0)) == "reference", reason="trialign._C is not built")
def test_tokens_past_2_to_the_31():
    """Nothing but the two sequences is touched, so the tensors take address space and no memory."""
    start, lengths = (1 << 31) - 30, [50, 37]
    rewards, values, mask, cu_seqlens = case(lengths, 7)
    total = start + sum(lengths)
    big = [untouched(total, x.dtype) for x in (rewards, values, mask)]
    for whole, part in zip(big, (rewards, values, mask), strict=True):
        whole[start:] = part
    try:
        far = torch.ops.trialign.gae(*big, cu_seqlens + start, 0.99, 0.95)
    except RuntimeError as error:
        pytest.skip(f"no address space for the results: {error}")
    for mine, near in zip(far, gae(rewards, values, mask, cu_seqlens, 0.99, 0.95), strict=True):
        assert torch.equal(mine[start:], near)


@pytest.mark.skipif(not has_op("gae"), reason="trialign._C is not built")
@pytest.mark.parametrize(
    ("cu_seqlens", "message"),
    [
        ([0, 9], "must run from 0 to 8"),
        ([1, 8], "from 1 to 8"),
        ([0, 5, 3, 8], "document 1 has -2 tokens"),
    ],
)
def test_sequences_that_do_not_fit_are_refused(cu_seqlens, message):
    rewards, values, mask, _ = case([8], 0)
    with pytest.raises((ValueError, RuntimeError), match=message):
        gae(rewards, values, mask, torch.tensor(cu_seqlens), 0.99, 0.95)
    with pytest.raises(RuntimeError, match="within 0 and 8"):
        torch.ops.trialign.gae(rewards, values, mask, torch.tensor([0, 9]), 0.99, 0.95)
    with pytest.raises(ValueError, match="differ in length"):
        gae(rewards, values[:7], mask, torch.tensor([0, 8]), 0.99, 0.95)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_are_the_references(dtype):
    rewards, values, mask, cu_seqlens = case([5, 9], 2)
    arguments = (rewards.to(dtype), values.to(dtype), mask, cu_seqlens, 0.9, 0.8)
    for ours, right in zip(gae(*arguments), gae_ref(*arguments), strict=True):
        assert ours.dtype == right.dtype and torch.equal(ours, right)


def test_gamma_and_lambda_one_is_reward_to_go():
    rewards, values, mask, cu_seqlens = case([5, 9], 0)
    advantages, returns = gae(rewards, values, mask, cu_seqlens, 1.0, 1.0)
    for start, end in ((0, 5), (5, 14)):
        to_go = (rewards * mask)[start:end].flip(0).cumsum(0).flip(0) * mask[start:end]
        torch.testing.assert_close(returns[start:end], to_go)
    assert (advantages[~mask] == 0).all() and (returns[~mask] == 0).all()


def test_values_at_masked_tokens_do_not_matter():
    rewards, values, mask, cu_seqlens = case([20, 30], 1, 0.5)
    clean = gae(rewards, values, mask, cu_seqlens, 0.9, 0.8)
    garbage = gae(rewards, torch.where(mask, values, torch.nan), mask, cu_seqlens, 0.9, 0.8)
    assert torch.equal(clean[0], garbage[0]) and torch.equal(clean[1], garbage[1])


def test_fully_masked_and_empty():
    rewards, values, mask, cu_seqlens = case([4, 0, 3], 2, 0.0)
    assert all((x == 0).all() for x in gae(rewards, values, mask, cu_seqlens, 1.0, 0.95))
    empty = torch.empty(0)
    assert gae(empty, empty, empty.bool(), torch.tensor([0]), 1.0, 0.95)[0].shape == (0,)


def test_no_gradient_flows():
    rewards, values, mask, cu_seqlens = case([4], 2)
    assert not gae(rewards, values.requires_grad_(), mask, cu_seqlens, 1.0, 0.95)[0].requires_grad


@pytest.mark.skipif(not has_op("gae"), reason="trialign._C is not built")
def test_opcheck():
    torch.library.opcheck(torch.ops.trialign.gae, (*case([4, 5], 2), 1.0, 0.95))
