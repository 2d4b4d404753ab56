"""Packing and selection of batches against references of each sample."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trialign.algorithms.batch import Prompt, Rollout, from_rollouts, pack, single_turn

SAMPLES = [([5, 6, 7], [8, 9]), ([1], [2]), ([3, 4], [10, 11, 12])]


def rollout(prompt: list[int], response: list[int]) -> Rollout:
    return single_turn(Prompt(0, prompt, "text"), response, [-0.1 * token for token in response], "stop")


def test_rollouts_are_packed_and_aligned_to_the_predicted_token():
    batch = from_rollouts([rollout(*sample) for sample in SAMPLES])
    assert batch.tokens.tolist() == [5, 6, 7, 8, 9, 1, 2, 3, 4, 10, 11, 12]
    assert batch.cu_seqlens.tolist() == [0, 5, 7, 12] and batch.cu_seqlens.dtype == torch.int32
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3, 4]
    assert batch.response.tolist() == [3, 4, 6, 9, 10, 11]
    assert batch.labels.tolist() == [8, 9, 2, 10, 11, 12]
    assert batch.last.tolist() == [4, 6, 11]
    assert batch.max_seqlen == 5 and len(batch) == 3
    assert batch.rollout_logprobs is not None
    expected = [-0.1 * t if m else 0.0 for t, m in zip(batch.tokens.tolist(), batch.mask.tolist(), strict=True)]
    torch.testing.assert_close(batch.rollout_logprobs, torch.tensor(expected))
    assert pack([[1, 2, 3], [4, 5]]).mask.tolist() == [False, True, True, False, True]  # plain text


def test_scatter_inverts_the_gather_and_is_differentiable():
    batch = from_rollouts([rollout(*sample) for sample in SAMPLES])
    x = torch.randn(6, dtype=torch.float64, requires_grad=True)
    whole = batch.scatter(x)
    assert torch.equal(whole[batch.response], x) and whole[~batch.mask].abs().sum() == 0
    (whole * torch.arange(12)).sum().backward()
    assert x.grad is not None and torch.equal(x.grad, batch.response.double())


@settings(deadline=None, max_examples=50)
@given(st.data())
def test_selection_equals_packing_those_samples(data):
    samples = data.draw(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 5)), min_size=1, max_size=6))
    rollouts = [rollout(list(range(i, i + p)), list(range(50 + i, 50 + i + n))) for i, (p, n) in enumerate(samples)]
    chosen = data.draw(st.lists(st.integers(0, len(samples) - 1), min_size=1, max_size=6))
    whole = from_rollouts(rollouts)
    whole = whole.with_(values=torch.arange(len(whole.tokens)).float())
    part, alone = whole.select(chosen), from_rollouts([rollouts[i] for i in chosen])
    for name in ("tokens", "cu_seqlens", "positions", "mask", "response", "rollout_logprobs"):
        assert torch.equal(getattr(part, name), getattr(alone, name)), name
    starts = whole.cu_seqlens.tolist()
    assert part.values is not None and part.lengths == alone.lengths
    assert part.values.tolist() == [t for i in chosen for t in range(starts[i], starts[i + 1])]
