"""GAE against a float64 recursion written out here: packing, gaps, empty and fully masked sequences."""

import pytest
import torch
from accuracy import assert_all_accurate
from hypothesis import given, settings
from hypothesis import strategies as st
from implementations import by_mode, cpp_only, device, interpreted_only, untouched  # noqa: F401 (a fixture)
from trialign.kernels.gae import gae, gae_ref


def recursion(rewards, values, mask, cu_seqlens, gamma, lam):
    """One token after another, in Python floats."""
    advantages, returns = [0.0] * len(rewards), [0.0] * len(rewards)
    for start, end in zip(cu_seqlens[:-1], cu_seqlens[1:], strict=True):
        next_value = next_advantage = 0.0
        for t in reversed([t for t in range(start, end) if mask[t]]):
            advantages[t] = rewards[t] + gamma * next_value - values[t] + gamma * lam * next_advantage
            returns[t] = advantages[t] + values[t]
            next_value, next_advantage = values[t], advantages[t]
    return advantages, returns


def case(lengths, kept=0.7, seed=0):
    torch.manual_seed(seed)
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0)
    rewards, values = torch.randn(2, sum(lengths))
    return rewards, values, torch.rand(sum(lengths)) < kept, cu_seqlens


def check(inputs, gamma, lam, functions=(gae,), tolerance=1e-5):
    exact = recursion(*(x.tolist() for x in inputs), gamma, lam)
    for fn in functions:
        for actual, expected in zip(fn(*inputs, gamma, lam), exact, strict=True):
            torch.testing.assert_close(
                actual.double(), torch.tensor(expected).double(), rtol=1e-5, atol=tolerance, check_device=False
            )


@settings(max_examples=by_mode(60, 8), deadline=None)
@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=8),
    st.integers(0, 10**6),
    st.floats(0, 1),
    st.sampled_from([0.0, 0.9, 1.0]),
    st.sampled_from([0.0, 0.95, 1.0]),
)
def test_any_packing_equals_the_recursion(lengths, seed, kept, gamma, lam):
    check(case(lengths, kept, seed), gamma, lam, (gae, gae_ref), 2e-5)


@pytest.mark.parametrize("prompt", by_mode([0, 1, 15, 16, 40], [16]))
@pytest.mark.parametrize("lam", [1.0, 0.95, 0.0])
def test_masked_prompts_equal_the_recursion(prompt, lam):
    """Lengths around the SIMD width, with the mask as in training; values outside of it are NaN."""
    rewards, values, mask, cu = case([0, 1, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 32, 33, 47, 48, 200], 1.0)
    for start, end in zip(cu[:-1].tolist(), cu[1:].tolist(), strict=True):
        mask[start : min(start + prompt, end)] = False
    values[~mask] = torch.nan
    check((rewards, values, mask, cu), 0.99, lam)


@pytest.mark.parametrize("cu_dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("lengths, kept", [([512, 1, 300, 0, 47], 1.0), ([513], 0.5), ([512, 1100], 1.0)])
def test_error_against_float64(lengths, kept, cu_dtype):
    rewards, values, mask, cu = case(lengths, kept)
    actual = gae(rewards, values, mask, cu.to(cu_dtype), 1.0, 0.95)
    eager = gae_ref(rewards, values, mask, cu, 1.0, 0.95)
    assert_all_accurate(actual, eager, gae_ref(rewards.double(), values.double(), mask, cu, 1.0, 0.95))
    assert not gae(rewards, values.requires_grad_(), mask, cu, 1.0, 0.95)[0].requires_grad


@pytest.mark.parametrize("at", [0, 20, 63])
def test_nan_reaches_earlier_tokens_of_its_sequence_only(at):
    rewards, values, mask, cu = case([64, 64, 64], 1.0)
    rewards[64 + at] = torch.nan
    corrupt = gae(rewards, values, mask, cu, 0.99, 0.95)[0].isnan()
    assert corrupt[64 : 64 + at + 1].all() and corrupt.sum() == at + 1


@interpreted_only
def test_tokens_outside_every_sequence_are_zero():
    rewards, values, mask, _ = case([9], 1.0)
    for out in torch.ops.trialign.gae(rewards, values, mask, torch.tensor([2, 7]), 0.99, 0.95):
        assert (out != 0).tolist() == [False] * 2 + [True] * 5 + [False] * 2


@cpp_only
def test_tokens_past_2_to_the_31():
    """Only the two sequences are touched, so the tensors take address space and no memory."""
    start, lengths = (1 << 31) - 30, [50, 37]
    rewards, values, mask, cu = case(lengths)
    big = [untouched(start + sum(lengths), x.dtype) for x in (rewards, values, mask)]
    for whole, part in zip(big, (rewards, values, mask), strict=True):
        whole[start:] = part
    try:
        far = torch.ops.trialign.gae(*big, cu + start, 0.99, 0.95)
    except RuntimeError as error:
        pytest.skip(f"no address space for the results: {error}")
    for actual, near in zip(far, gae(rewards, values, mask, cu, 0.99, 0.95), strict=True):
        assert torch.equal(actual[start:], near)


@cpp_only
@pytest.mark.parametrize(
    "cu, message", [([0, 9], "0 to 8"), ([1, 8], "from 1 to 8"), ([0, 5, 3, 8], "document 1 has -2 tokens")]
)
def test_invalid_sequence_bounds_are_refused(cu, message):
    rewards, values, mask, _ = case([8])
    with pytest.raises((ValueError, RuntimeError), match=message):
        gae(rewards, values, mask, torch.tensor(cu), 0.99, 0.95)
    with pytest.raises(RuntimeError, match="within 0 and 8"):
        torch.ops.trialign.gae(rewards, values, mask, torch.tensor([0, 9]), 0.99, 0.95)
