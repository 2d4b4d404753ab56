"""Minibatches and micro-batches: each sample once, balanced over the DP ranks, within the token limit; the same in C++
and in Python."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trialign.algorithms import micro_batch
from trialign.algorithms.batch import Batch, pack
from trialign.algorithms.config.ppo import PPOOptions
from trialign.algorithms.config.supervised import UpdateConfig
from trialign.algorithms.micro_batch import (
    deal,
    deal_micro_batches,
    draw_minibatches,
    pass_micro_batches,
    update_micro_batches,
)
from trialign.engine.mesh import Axis


@pytest.fixture(params=["python", "cpp"])
def implementation(request, monkeypatch) -> None:
    if request.param == "python":
        monkeypatch.setattr(micro_batch, "HOST", None)


def axis(size: int, rank: int) -> Axis:
    return Axis("dp", size, rank, tuple(range(size)), None, None)


def batch_of(*lengths: int, rows: tuple[int, ...] = ()) -> Batch:
    return pack([[1] * n for n in lengths]).with_(row_sizes=rows)


def test_minibatches_depend_on_the_seed_and_hold_every_sample_once_an_epoch():
    passes = PPOOptions(epochs=2, minibatches=3)
    epochs = draw_minibatches(12, passes, 5)
    assert epochs == draw_minibatches(12, passes, 5) != draw_minibatches(12, passes, 6)
    assert len(epochs) == 2 and epochs[0] != epochs[1]
    for minibatches in epochs:
        assert [len(samples) for samples in minibatches] == [4, 4, 4]
        assert sorted(sum(minibatches, ())) == list(range(12))


@pytest.mark.usefixtures("implementation")
@pytest.mark.parametrize("dp", [1, 2, 3])
def test_passes_are_cut_as_the_first_epoch(dp):
    batch = batch_of(*(3 + i * 5 % 17 for i in range(12)))
    batch = batch.with_(minibatches=draw_minibatches(12, PPOOptions(epochs=2, minibatches=2), 0))
    for sizes in (UpdateConfig(micro_batch_size=2), UpdateConfig(micro_batch_tokens=40)):
        for place in (axis(dp, rank) for rank in range(dp)):
            steps = [update_micro_batches(batch, samples, sizes, place) for samples in batch.minibatches[0]]
            assert pass_micro_batches(batch, sizes, place) == sum(steps, [])


def test_deal_balances_tokens():
    for lengths in ([100, 1, 90, 2, 80, 3, 70, 4], [*range(1, 41)]):
        loads = [sum(lengths[i] for i in dealt) for dealt in deal(lengths, 4)]
        assert sum(loads) == sum(lengths) and max(loads) - min(loads) <= max(lengths) / 2


@pytest.mark.usefixtures("implementation")
def test_rows_of_several_samples_stay_whole_and_in_order():
    batch = batch_of(3, 4, 9, 9, 2, 2, 5, rows=(2, 2, 1, 2))
    sizes = UpdateConfig(micro_batch_size=2)
    assert update_micro_batches(batch, range(7), sizes, axis(1, 0)) == [[2, 3, 0, 1], [5, 6, 4]]
    dealt = [cut for rank in range(2) for cut in update_micro_batches(batch, range(7), sizes, axis(2, rank))]
    assert dealt == [[2, 3, 4], [0, 1, 5, 6]]
    assert batch.select([2, 3, 4]).row_sizes == (2, 1)


@pytest.mark.usefixtures("implementation")
def test_scored_batches_may_have_few_or_long_rows():
    batch, sizes = batch_of(9, 3), UpdateConfig(micro_batch_tokens=4)
    assert [pass_micro_batches(batch, sizes, axis(3, rank)) for rank in range(3)] == [[], [[0]], [[1]]]
    with pytest.raises(ValueError, match="9 tokens .*4 tokens"):
        update_micro_batches(batch, range(2), sizes, axis(1, 0))
    with pytest.raises(ValueError, match="2 .* 3 data-parallel ranks"):
        deal_micro_batches([0, 1], [4, 5], axis(3, 0), 1)


@settings(deadline=None)
@given(st.lists(st.integers(1, 50), min_size=4, max_size=24), st.integers(1, 4), st.sampled_from([0, 50, 120]))
def test_ranks_get_equally_many_samples_and_micro_batches(lengths, parts, max_tokens):
    """Or one fewer of both where they do not divide."""
    samples = list(range(len(lengths)))
    ranks = [deal_micro_batches(samples, lengths, axis(parts, rank), 3, max_tokens) for rank in range(parts)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(micro_batch, "HOST", None)
        assert ranks == [
            deal_micro_batches(samples, lengths, axis(parts, rank), 3, max_tokens) for rank in range(parts)
        ]
    counts = [sum(map(len, cuts)) for cuts in ranks]
    assert sorted(counts) == sorted(len(range(i, len(lengths), parts)) for i in range(parts))
    assert max(map(len, ranks)) - min(map(len, ranks)) <= (len(lengths) % parts > 0)
    assert sorted(i for cuts in ranks for cut in cuts for i in cut) == samples
    for cut in (cut for cuts in ranks for cut in cuts):
        assert cut and (sum(lengths[i] for i in cut) <= max_tokens if max_tokens else len(cut) <= 3)
