"""Minibatches are the seed's, micro-batches a role's own: each sample once, balanced, within the limits."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trialign.algorithms.batch import Batch, pack
from trialign.algorithms.config.ppo import PPOOptions
from trialign.algorithms.config.supervised import UpdateConfig
from trialign.algorithms.micro_batch import (
    deal,
    deal_micro_batches,
    draw_minibatches,
    micro_batches,
    pass_micro_batches,
    update_micro_batches,
)
from trialign.engine.mesh import Axis


def axis(size: int, rank: int) -> Axis:
    return Axis("dp", size, rank, tuple(range(size)), None)


def batch_of(*lengths: int, rows: tuple[int, ...] = ()) -> Batch:
    return pack([[1] * n for n in lengths]).with_(row_sizes=rows)


def test_minibatches_are_the_seeds_alone_and_hold_every_sample_once_an_epoch():
    passes = PPOOptions(epochs=2, minibatches=3)
    epochs = draw_minibatches(12, passes, 5)
    assert epochs == draw_minibatches(12, passes, 5) != draw_minibatches(12, passes, 6)
    assert len(epochs) == 2 and epochs[0] != epochs[1]
    for minibatches in epochs:
        assert [len(samples) for samples in minibatches] == [4, 4, 4]
        assert sorted(sum(minibatches, ())) == list(range(12))


@pytest.mark.parametrize("dp", [1, 2, 3])
def test_a_pass_is_cut_as_the_first_epochs_steps_on_a_mesh_of_any_size(dp):
    batch = batch_of(*(3 + i * 5 % 17 for i in range(12)))
    batch = batch.with_(minibatches=draw_minibatches(12, PPOOptions(epochs=2, minibatches=2), 0))
    for sizes in (UpdateConfig(micro_batch_size=2), UpdateConfig(micro_batch_tokens=40)):
        for place in (axis(dp, rank) for rank in range(dp)):
            steps = [update_micro_batches(batch, samples, sizes, place) for samples in batch.minibatches[0]]
            assert pass_micro_batches(batch, sizes, place) == sum(steps, [])


def test_rows_of_several_samples_stay_whole_and_in_order():
    batch = batch_of(3, 4, 9, 9, 2, 2, 5, rows=(2, 2, 1, 2))
    sizes = UpdateConfig(micro_batch_size=2)
    assert update_micro_batches(batch, range(7), sizes, axis(1, 0)) == [[2, 3, 0, 1], [5, 6, 4]]
    dealt = [cut for rank in range(2) for cut in update_micro_batches(batch, range(7), sizes, axis(2, rank))]
    assert dealt == [[2, 3, 4], [0, 1, 5, 6]]
    assert batch.select([2, 3, 4]).row_sizes == (2, 1)


def test_a_batch_that_is_only_scored_needs_neither_a_row_a_rank_nor_short_rows():
    batch, sizes = batch_of(9, 3), UpdateConfig(micro_batch_tokens=4)
    assert [pass_micro_batches(batch, sizes, axis(3, rank)) for rank in range(3)] == [[], [[0]], [[1]]]
    with pytest.raises(ValueError, match="9 tokens"):
        update_micro_batches(batch, range(2), sizes, axis(1, 0))


@settings(deadline=None)
@given(st.lists(st.integers(1, 100), min_size=1, max_size=24), st.integers(1, 5))
def test_deal_gives_each_rank_equally_many_samples_once(lengths, parts):
    lengths = lengths * parts
    hands = deal(lengths, parts)
    assert sorted(i for hand in hands for i in hand) == list(range(len(lengths)))
    assert {len(hand) for hand in hands} == {len(lengths) // parts}


def test_deal_balances_tokens():
    lengths = [100, 1, 90, 2, 80, 3, 70, 4]
    loads = [sum(lengths[i] for i in hand) for hand in deal(lengths, 2)]
    assert max(loads) - min(loads) <= 10


def test_where_samples_do_not_divide_some_ranks_hold_one_more():
    chance = random.Random(0)
    for count, parts in ((7, 2), (7, 3), (8, 3), (5, 4), (3, 3)):
        lengths = [chance.randrange(1, 50) for _ in range(count)]
        hands = deal(lengths, parts)
        assert sorted(i for hand in hands for i in hand) == list(range(count))
        assert sorted(map(len, hands)) == sorted(len(range(i, count, parts)) for i in range(parts))
        axes = [Axis("dp", parts, rank, tuple(range(parts)), None) for rank in range(parts)]
        cuts = [deal_micro_batches(range(count), lengths, axis, 1) for axis in axes]
        assert [sorted(i for part in own for i in part) for own in cuts] == hands
        assert all(part for own in cuts for part in own)
    with pytest.raises(ValueError, match="2 samples are fewer than 3 data-parallel ranks"):
        deal([4, 5], 3)


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 8), st.sampled_from([0, 50, 120]))
def test_micro_batches_hold_every_sample_once_within_the_limit(lengths, size, max_tokens):
    samples = list(range(0, len(lengths), 2))
    cuts = micro_batches(samples, lengths, size, max_tokens)
    assert sorted(i for cut in cuts for i in cut) == samples and all(cuts)
    if max_tokens:
        assert all(sum(lengths[i] for i in cut) <= max_tokens for cut in cuts)
    else:
        assert all(len(cut) <= size for cut in cuts) and len(cuts) == -(-len(samples) // size)


def test_a_sample_beyond_the_token_budget_is_refused():
    with pytest.raises(ValueError, match="51 tokens does not fit micro-batches of 50"):
        micro_batches([0], [51], 1, 50)


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=12), st.integers(1, 4), st.sampled_from([0, 50, 120]))
def test_data_ranks_get_equally_many_micro_batches(lengths, parts, max_tokens):
    lengths = [n for n in lengths for _ in range(parts)][::-1]
    samples = list(range(len(lengths)))
    dealt = [
        deal_micro_batches(samples, lengths, Axis("dp", parts, rank, tuple(range(parts)), None), 3, max_tokens)
        for rank in range(parts)
    ]
    assert len({len(cuts) for cuts in dealt}) == 1
    assert sorted(i for cuts in dealt for cut in cuts for i in cut) == samples
    for cut in (cut for cuts in dealt for cut in cuts):
        assert cut and (sum(lengths[i] for i in cut) <= max_tokens if max_tokens else len(cut) <= 3)
