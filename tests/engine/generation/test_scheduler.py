"""Continuous batching, simulated without tensors: every prompt ends, blocks are never shared, the order is fair."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trialign.engine.generation.kv_cache import BlockPool, blocks_for
from trialign.engine.generation.scheduler import Scheduler, Step

STOP = 7


def make(lengths, blocks=100, block_size=4, **kwargs):
    options = {"max_new_tokens": 5, "stop_ids": (STOP,), "max_running": 4, "prefill_tokens": 1000, **kwargs}
    return Scheduler([[0] * n for n in lengths], BlockPool(blocks), block_size, **options)


def planned(scheduler, lane=0) -> Step:
    step = scheduler.plan(lane)
    assert step is not None
    return step


def drive(scheduler, token=lambda sequence, place: 1):
    """Runs all lanes in turn to the end and returns the steps; checks the invariants at each."""
    steps, turn, idle = [], 0, 0
    pending = [None] * len(scheduler.running)
    while True:
        lane = turn % len(pending)
        step = pending[lane]
        if step is not None:
            running = list(scheduler.running[lane])
            tokens = [token(s, len(s.tokens)) for s in running]
            keep = scheduler.commit(step, tokens, [-0.5] * len(tokens))
            alive = [s for s in running if not s.finish]
            assert scheduler.running[lane] == alive
            assert (keep is None) == (len(alive) == len(running))
            assert keep is None or [running[row] for row in keep] == alive
        if scheduler.finished:
            break
        pending[lane] = scheduler.plan(lane)
        if pending[lane] is not None:
            steps.append(pending[lane])
        idle = 0 if any(pending) else idle + 1
        assert idle <= len(pending), "nothing runs although prompts wait"
        check(scheduler)
        turn += 1
    assert scheduler.pool.free_blocks == scheduler.pool.num_blocks, "blocks leaked"
    return steps


def check(scheduler):
    running = [s for lane in scheduler.running for s in lane]
    blocks = [block for s in running for block in s.blocks]
    assert len(set(blocks)) == len(blocks), "two sequences share a block"
    assert len(blocks) + scheduler.pool.free_blocks == scheduler.pool.num_blocks
    for lane in scheduler.running:
        assert len(lane) <= scheduler.lane_size
    for s in running:
        assert len(s.blocks) * scheduler.block_size >= len(s.prompt) + scheduler.max_new_tokens - 1


def test_a_finished_sequence_is_replaced_in_the_next_step():
    scheduler = make([2, 2, 2], max_running=2)
    first = planned(scheduler)
    assert (first.decoding, [s.index for s in first.admitted], first.tokens) == (0, [0, 1], 4)
    assert scheduler.commit(first, [STOP, 1], [-1.0, -2.0]) == [1]
    second = planned(scheduler)
    assert (second.decoding, [s.index for s in second.admitted], second.tokens) == (1, [2], 3)
    done = scheduler.sequences[0]
    assert (done.tokens, done.logprobs, done.finish, done.blocks) == ([STOP], [-1.0], "stop", [])


def test_length_and_stop():
    scheduler = make([3, 3], max_new_tokens=4)
    drive(scheduler, lambda s, place: STOP if s.index == 0 and place == 3 else 1)
    assert [s.finish for s in scheduler.sequences] == ["stop", "length"], "a stop id in the last place is a stop"
    assert [len(s.tokens) for s in scheduler.sequences] == [4, 4]


def test_prefill_budget():
    scheduler = make([6, 3, 9, 20, 1], max_running=5, prefill_tokens=10)
    steps = drive(scheduler)
    admitted = [[len(s.prompt) for s in step.admitted] for step in steps if step.admitted]
    assert admitted == [[6, 3], [9], [20], [1]], "in order, 10 tokens a step, a longer prompt alone"


def test_a_prompt_waits_for_blocks_and_nobody_overtakes():
    # Blocks of 4, at most 5 new tokens: 8 + 4 cached tokens take 3 blocks, 1 + 4 take 2.
    scheduler = make([8, 8, 1], blocks=5, max_running=3)
    steps = drive(scheduler)
    assert [[s.index for s in step.admitted] for step in steps if step.admitted] == [[0], [1, 2]]


def test_the_last_token_needs_no_room():
    scheduler = make([4], blocks=1, block_size=8, max_new_tokens=5)
    drive(scheduler)
    assert len(scheduler.sequences[0].tokens) == 5


def test_a_prompt_that_can_never_fit_is_refused():
    with pytest.raises(ValueError, match=r"prompt 1 has 9 tokens and may grow by 5: 4 cache blocks of 4 .* has 3"):
        make([1, 9], blocks=3)


def test_lanes_are_filled_evenly():
    scheduler = make([1] * 5, max_running=100, lanes=2)
    assert (planned(scheduler, 0).rows, planned(scheduler, 1).rows) == (3, 2)


def test_no_prompts_is_finished():
    assert make([]).finished


@settings(deadline=None)
@given(
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=12),
    ends=st.lists(st.integers(0, 6), min_size=12, max_size=12),
    block_size=st.integers(1, 5),
    spare=st.integers(0, 20),
    max_running=st.integers(1, 6),
    lanes=st.integers(1, 3),
    prefill_tokens=st.integers(1, 20),
)
def test_every_prompt_ends_right(lengths, ends, block_size, spare, max_running, lanes, prefill_tokens):
    """Whatever the sizes: responses have the length their stop gives them, and a second run takes the same steps."""
    largest = blocks_for(max(lengths) + 4, block_size)

    def run():
        scheduler = make(
            lengths,
            blocks=largest + spare,
            block_size=block_size,
            max_running=max_running,
            lanes=lanes,
            prefill_tokens=prefill_tokens,
        )
        steps = drive(scheduler, lambda s, place: STOP if place == ends[s.index] else 1)
        return scheduler, [(s.lane, s.decoding, [a.index for a in s.admitted], s.tokens) for s in steps]

    scheduler, steps = run()
    for sequence, end in zip(scheduler.sequences, ends, strict=False):
        assert len(sequence.tokens) == len(sequence.logprobs) == min(end + 1, 5)
        assert sequence.finish == ("stop" if end < 5 else "length")
    order = [index for _, _, admitted, _ in steps for index in admitted]
    assert order == list(range(len(lengths))), "first come, first served"
    assert run()[1] == steps
