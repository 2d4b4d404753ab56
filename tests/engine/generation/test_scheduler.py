"""Scheduler, driven without tensors: every prompt ends, blocks are never shared, first come is first served."""

from hypothesis import given, settings
from hypothesis import strategies as st
from trialign.engine.generation.interface import SamplingParams
from trialign.engine.generation.kv_cache import blocks_for
from trialign.engine.generation.scheduler import Scheduler, Sequence, Step

STOP = 7


def scheduler_of(lengths, blocks=None, block_size=4, *, max_new_tokens=5, **kwargs) -> Scheduler:
    """A scheduler with prompts of these lengths, whose ids count from 0."""
    options = {"max_running": 4, "prefill_tokens": 1000, "max_blocks": blocks, **kwargs}
    scheduler = Scheduler(block_size, **options)
    params = SamplingParams(max_new_tokens=max_new_tokens, stop_ids=(STOP,))
    for number, length in enumerate(lengths):
        scheduler.add(Sequence(number, [0] * length, params))
    return scheduler


def planned(scheduler, lane=0) -> Step:
    step = scheduler.plan(lane)
    assert step is not None
    return step


def drive(scheduler, token=lambda sequence, place: 1, between=lambda turn: None):
    """Runs all lanes in turn to the end, checking invariants; returns the steps, and the ended sequences by id."""
    steps, turn, idle = [], 0, 0
    pending = [None] * len(scheduler.running)
    while True:
        lane = turn % len(pending)
        step, rows = pending[lane], list(scheduler.running[lane])
        if step is not None:
            tokens = [token(s, len(s.tokens)) for s in rows]
            scheduler.commit(step, tokens, [-0.5] * len(tokens))
        between(turn)
        keep = scheduler.retire(lane)
        alive = [s for s in rows if not s.finish]
        assert scheduler.running[lane] == alive
        assert alive == (rows if keep is None else [rows[row] for row in keep])
        assert keep is None or len(keep) < len(rows)
        if not scheduler.unfinished:
            between(turn + 100)
            if not scheduler.unfinished:
                break
        pending[lane] = scheduler.plan(lane)
        if pending[lane] is not None:
            steps.append(pending[lane])
        idle = 0 if any(pending) else idle + 1
        assert idle <= len(pending), "nothing runs although prompts wait"
        assert_invariants(scheduler)
        turn += 1
    assert scheduler.done == scheduler.total
    ended = {s.id: s for s in scheduler.ended}
    scheduler.reset()  # asserts that all blocks are free
    return steps, ended


def assert_invariants(scheduler):
    running = [s for lane in scheduler.running for s in lane]
    blocks = [block for s in running for block in s.blocks]
    assert len(set(blocks)) == len(blocks), "two sequences share a block"
    assert len(blocks) + scheduler.pool.free_blocks == scheduler.pool.num_blocks
    assert scheduler.max_blocks is None or scheduler.pool.num_blocks <= scheduler.max_blocks
    for lane in scheduler.running:
        assert len(lane) <= scheduler.lane_size
    for s in running:
        assert len(s.blocks) * scheduler.block_size >= len(s.prompt) + s.params.max_new_tokens - 1


def test_finished_sequence_is_replaced_in_the_next_step():
    scheduler = scheduler_of([2, 2, 2], max_running=2)
    first = planned(scheduler)
    assert (first.decoding, [s.id for s in first.admitted], first.tokens) == (0, [0, 1], 4)
    scheduler.commit(first, [STOP, 1], [-1.0, -2.0], version=3)
    assert scheduler.retire(0) == [1]
    second = planned(scheduler)
    assert (second.decoding, [s.id for s in second.admitted], second.tokens) == (1, [2], 3)
    (done,) = scheduler.ended
    assert (done.tokens, done.logprobs, done.versions, done.finish, done.blocks) == ([STOP], [-1.0], [3], "stop", [])


def test_admission_order_and_prefill_budget():
    steps, _ = drive(scheduler_of([6, 3, 9, 20, 1], max_running=5, prefill_tokens=10))
    admitted = [[len(s.prompt) for s in step.admitted] for step in steps if step.admitted]
    assert admitted == [[6, 3], [9], [20], [1]], "in order, 10 tokens a step, a longer prompt alone"
    # Blocks of 4, at most 5 new tokens: 8 + 4 cached tokens take 3 blocks, 1 + 4 take 2.
    steps, _ = drive(scheduler_of([8, 8, 1], blocks=5, max_running=3))
    assert [[s.id for s in step.admitted] for step in steps if step.admitted] == [[0], [1, 2]]
    scheduler = scheduler_of([1] * 5, max_running=100, lanes=2)
    assert (planned(scheduler, 0).rows, planned(scheduler, 1).rows) == (3, 2), "lanes are filled evenly"


@settings(deadline=None)
@given(
    late=st.lists(st.integers(0, 8), min_size=12, max_size=12),
    aborts=st.dictionaries(st.integers(0, 11), st.integers(0, 9), max_size=4),
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=12),
    ends=st.lists(st.integers(0, 6), min_size=12, max_size=12),
    block_size=st.integers(1, 5),
    spare=st.integers(0, 20),
    max_running=st.integers(1, 6),
    lanes=st.integers(1, 3),
    prefill_tokens=st.integers(1, 20),
)
def test_every_prompt_ends(lengths, late, aborts, ends, block_size, spare, **options):
    """For any sizes, arrivals and aborts: responses end with their stop id, aborted ones no later, and a second run
    takes the same steps."""
    arrived = [0, *sorted(range(1, len(lengths)), key=lambda i: (late[i], i))]

    def run():
        blocks = blocks_for(max(lengths) + 4, block_size) + spare
        scheduler = scheduler_of(lengths[:1], blocks, block_size, **options)
        coming = arrived[1:]

        def between(turn):
            while coming and late[coming[0]] <= turn:
                number = coming.pop(0)
                params = SamplingParams(max_new_tokens=5, stop_ids=(STOP,))
                scheduler.add(Sequence(number, [0] * lengths[number], params))
            scheduler.abort(number for number, at in aborts.items() if at == turn)

        steps, ended = drive(scheduler, lambda s, place: STOP if place == ends[s.id] else 1, between)
        return ended, [(s.lane, s.decoding, [a.id for a in s.admitted], s.tokens) for s in steps]

    ended, steps = run()
    assert ended.keys() == set(range(len(lengths)))
    for number, sequence in ended.items():
        whole = min(ends[number] + 1, 5)
        assert len(sequence.tokens) == len(sequence.logprobs) <= whole
        if sequence.finish == "abort":
            assert number in aborts
        else:
            assert (len(sequence.tokens), sequence.finish) == (whole, "stop" if ends[number] < 5 else "length")
    admitted = [i for _, _, ids, _ in steps for i in ids]
    assert admitted == [i for i in arrived if i in admitted], "first come, first served"
    assert run() == (ended, steps)
