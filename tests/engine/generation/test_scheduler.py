"""Scheduler, driven without tensors: every prompt ends, blocks are shared by equal prompts only, growing sequences
preempt younger ones. In C++ and in Python, which take the same steps."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from trialign.engine.generation.interface import SamplingParams
from trialign.engine.generation.kv_cache import PagedCache, blocks_for
from trialign.engine.generation.scheduler import Scheduler, Step
from trialign.engine.host import HOST

STOP = 7
IMPLEMENTATIONS: dict[str, Any] = {"python": Scheduler} | ({} if HOST is None else {"cpp": HOST.Scheduler})


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request) -> Any:
    return IMPLEMENTATIONS[request.param]


def scheduler_of(implementation, lengths, blocks=100, block_size=4, *, max_new_tokens=5, **kwargs) -> Scheduler:
    """A scheduler with distinct prompts of these lengths, whose ids count from 0."""
    scheduler = implementation(block_size, blocks, **{"max_running": 4, "prefill_tokens": 1000, **kwargs})
    params = SamplingParams(max_new_tokens=max_new_tokens, stop_ids=(STOP,))
    for number, length in enumerate(lengths):
        scheduler.add(number, [number] * length, params, number)
    return scheduler


def commit(scheduler, step, tokens, logprobs, version=0):
    scheduler.commit(step, np.array([tokens, logprobs], np.float64).T.copy(), version)


def prefilled(step):
    return step.rows[step.decoding :]


def arrays(step, width) -> list:
    """All that the device gets of a step."""
    new = step.new_rows(width, 1) if step.kept < step.size else None
    prefill = step.prefill() if step.decoding < step.size else None
    moved = None if step.moved is None else step.moved.tolist()
    numbers = [step.kept, moved, step.decoding, step.size, step.tokens, step.masked]
    numbers += [step.copies.tolist(), step.grown.tolist()]
    numbers += [getattr(new, name).tolist() for name in ("state", "tables", "stop_ids", "sampling", "top_k") if new]
    return numbers + ([prefill.tokens.tolist(), prefill.starts.tolist(), prefill.longest] if prefill else [])


def planned(scheduler, lane=0) -> Step:
    scheduler.retire(lane)
    step = scheduler.plan(lane)
    assert step is not None
    return step


class Cache:
    """A model of the cache: at each slot the token that was written there."""

    def __init__(self, scheduler: Scheduler) -> None:
        self.size, self.slots = scheduler.block_size, {}

    def run(self, step: Step) -> None:
        """Writes what a forward of the step writes, and checks all that it reads."""
        for source, destination in step.copies.tolist():
            for place in range(self.size):
                self.slots[destination, place] = self.slots.get((source, place))
        for row, s in enumerate(step.rows):
            known = [*s.prompt, *s.tokens]
            last = len(s.prompt) + s.planned - 2  # the token before the one that is sampled; it may be in flight
            for position in range(last if row < step.decoding else 0, last + 1):
                token = known[position] if position < len(known) else None
                self.slots[s.blocks[position // self.size], position % self.size] = (s.id, position, token)
            for position in range(min(last + 1, len(known))):
                _, at, token = self.slots[s.blocks[position // self.size], position % self.size]
                assert at == position and token in (known[position], None), "another's or no keys"


def drive(scheduler, token=lambda sequence, place: 1, between=lambda turn: None, lag=0):
    """Runs all lanes in turn to the end, checking invariants; returns the steps as (rows that decode, ids of the rows,
    `arrays`), and the ended sequences by id."""
    steps, ended, turn, idle, cache, lanes = [], {}, 0, 0, Cache(scheduler), len(scheduler.running)
    flying: list[list[Step | None]] = [[] for _ in range(lanes)]
    while True:
        lane = turn % lanes
        if len(flying[lane]) > lag and (step := flying[lane].pop(0)) is not None:
            tokens = [token(s, len(s.tokens)) for s in step.rows]
            commit(scheduler, step, tokens, [-0.5] * len(tokens))
        between(turn)
        scheduler.retire(lane)
        if scheduler.idle:
            between(turn + 100)
            if scheduler.idle:
                break
        step = scheduler.plan(lane)
        flying[lane].append(step)
        if step is not None:
            cache.run(step)
            steps.append((step.decoding, [s.id for s in step.rows], arrays(step, scheduler.width)))
        ended |= {s.id: s for s in scheduler.take_ended()}
        idle = 0 if any(map(any, flying)) else idle + 1
        assert idle <= lanes * (lag + 2), "nothing runs although prompts wait"
        assert_invariants(scheduler)
        turn += 1
    assert scheduler.done == scheduler.total
    ended |= {s.id: s for s in scheduler.take_ended()}
    scheduler.reset()  # asserts that all blocks are free
    return steps, ended


def assert_invariants(scheduler):
    running = [s for lane in scheduler.running for s in lane]
    users = Counter(block for s in running for block in s.blocks)
    assert len(users) + scheduler.pool.free_blocks == scheduler.pool.num_blocks
    for s in running:
        whole = (len(s.prompt) - 1) // scheduler.block_size
        for place, block in enumerate(s.blocks):
            sharers = [other for other in running if block in other.blocks]
            assert len(sharers) == 1 or place < whole, "a block that is written is shared"
            assert all(other.prompt == s.prompt for other in sharers)
        assert len(s.blocks) == blocks_for(len(s.prompt) + s.planned - 1, scheduler.block_size)
    assert all(len(lane) <= scheduler.lane_size for lane in scheduler.running)


def test_finished_sequence_is_replaced_in_the_next_step(implementation):
    scheduler = scheduler_of(implementation, [2, 2, 2], max_running=2)
    first = planned(scheduler)
    assert (first.decoding, [s.id for s in prefilled(first)], first.tokens) == (0, [0, 1], 4)
    commit(scheduler, first, [STOP, 1], [-1.0, -2.0], version=3)
    second = planned(scheduler)
    assert second.moved is not None and second.moved.tolist() == [1]
    assert (second.kept, second.decoding, [s.id for s in prefilled(second)], second.tokens) == (1, 1, [2], 3)
    (done,) = scheduler.take_ended()
    assert (done.tokens, done.logprobs, done.versions, done.finish, done.blocks) == ([STOP], [-1.0], [3], "stop", [])


def test_admission_order_and_prefill_budget(implementation):
    steps, _ = drive(scheduler_of(implementation, [6, 3, 9, 20, 1], max_running=5, prefill_tokens=10))
    admitted = [rows[decoding:] for decoding, rows, _ in steps if decoding < len(rows)]
    assert admitted == [[0, 1], [2], [3], [4]], "in order, 10 tokens a step, a longer prompt alone"
    # Blocks of 4: prompts of 8 take 2 blocks at first, one of 1 takes 1.
    steps, _ = drive(scheduler_of(implementation, [8, 8, 1], blocks=4, max_running=3))
    assert steps[0][:2] == (0, [0, 1])
    scheduler = scheduler_of(implementation, [1] * 5, max_running=100, lanes=2)
    assert (len(planned(scheduler, 0).rows), len(planned(scheduler, 1).rows)) == (3, 2), "lanes are filled evenly"


def test_youngest_is_preempted_and_prefilled_again_with_its_tokens(implementation):
    scheduler = scheduler_of(implementation, [4, 4], blocks=3, max_new_tokens=4, max_running=2)
    first = planned(scheduler)
    commit(scheduler, first, [1, 2], [-1.0, -2.0], version=3)
    second = planned(scheduler)  # both need a second block; one is free
    assert [s.id for s in second.rows] == [0] and second.grown.tolist() == [[0, 1, second.rows[0].blocks[1]]]
    assert [s.id for s in scheduler.waiting] == [1]
    commit(scheduler, second, [STOP], [-1.0])
    third = planned(scheduler)
    (again,) = prefilled(third)
    assert (again.id, again.tokens, third.tokens) == (1, [2], 5)


def test_samples_of_a_prompt_prefill_it_once(implementation):
    """Two groups of three: leaders first, then the others decode from the last token of the prompt."""
    scheduler = scheduler_of(implementation, [], max_running=6)
    prompts = [[1] * 10, [2] * 9]  # blocks of 4: two full ones, and one of two tokens or of one
    for number in range(6):
        scheduler.add(number, prompts[number // 3], SamplingParams(max_new_tokens=3), 0)
    first = planned(scheduler)
    assert [s.id for s in prefilled(first)] == [0, 3] and first.tokens == 19
    commit(scheduler, first, [5, 5], [-1.0] * 2)
    second = planned(scheduler)
    assert ([s.id for s in second.rows], second.kept, second.decoding, second.tokens) == ([0, 3, 1, 2, 4, 5], 2, 6, 6)
    blocks = [s.blocks for s in second.rows]
    assert blocks[0][:2] == blocks[2][:2] == blocks[3][:2] and blocks[1][:2] == blocks[4][:2] == blocks[5][:2]
    last = [blocks[row][2] for row in (0, 2, 3)]
    assert second.copies.tolist() == [[last[0], last[1]], [last[0], last[2]]], "a written block is copied"


@settings(deadline=None)
@given(
    late=st.lists(st.integers(0, 8), min_size=12, max_size=12),
    aborts=st.dictionaries(st.integers(0, 11), st.integers(0, 9), max_size=4),
    lengths=st.lists(st.integers(1, 12), min_size=1, max_size=12),
    group=st.integers(1, 4),
    ends=st.lists(st.integers(0, 6), min_size=12, max_size=12),
    block_size=st.integers(1, 5),
    spare=st.integers(0, 20),
    max_running=st.integers(1, 6),
    lanes=st.integers(1, 3),
    lag=st.integers(0, 1),
    prefill_tokens=st.integers(1, 20),
)
def test_every_prompt_ends(lengths, group, late, aborts, ends, block_size, spare, lag, **options):
    """For any sizes, arrivals and aborts: responses end with their stop id, aborted ones no later; C++ and
    Python take the same steps."""
    arrived = [0, *sorted(range(1, len(lengths)), key=lambda i: (late[i], i))]

    def run(implementation):
        blocks = blocks_for(max(lengths) + 4, block_size) + spare
        scheduler = scheduler_of(implementation, [], blocks, block_size, **options)
        coming = list(arrived)

        def between(turn):
            while coming and (late[coming[0]] <= turn or coming[0] == 0):
                number = coming.pop(0)
                stops = (STOP, 8, 9)[: 1 + number % 3]
                params = SamplingParams(max_new_tokens=5, stop_ids=stops, min_new_tokens=number % 2, top_p=0.5)
                prompt = number - number % group
                scheduler.add(number, [prompt] * lengths[prompt], params, -number)
            scheduler.abort([number for number, at in aborts.items() if at == turn])

        between(-1)
        steps, ended = drive(scheduler, lambda s, place: STOP if place == ends[s.id] else 1, between, lag)
        names = ("tokens", "logprobs", "versions", "finish", "length", "blocks")
        return {i: {name: getattr(s, name) for name in names} for i, s in ended.items()}, steps

    runs = [run(implementation) for implementation in IMPLEMENTATIONS.values()]
    ended, _ = runs[0]
    assert ended.keys() == set(range(len(lengths)))
    for number, sequence in ended.items():
        whole = min(ends[number] + 1, 5)
        assert len(sequence["tokens"]) == len(sequence["logprobs"]) <= whole
        if sequence["finish"] == "abort":
            assert number in aborts
        else:
            expected = (whole, "stop" if ends[number] < 5 else "length")
            assert (len(sequence["tokens"]), sequence["finish"]) == expected
    assert all(run == runs[0] for run in runs)


@pytest.mark.skipif(HOST is None, reason="trialign._host is not built")
def test_256_long_sequences_of_an_8b_run_in_40_gib():
    """32k tokens each, of which 10 fit at a time; less is prefilled again than is sampled."""
    per_block = PagedCache.bytes_per_block((32, 8, 128), 16, torch.bfloat16)
    length, prompt, count = 32 * 1024, 1024, 256
    scheduler = IMPLEMENTATIONS["cpp"](16, 40 * 2**30 // per_block, max_running=count, prefill_tokens=4096)
    for number in range(count):
        scheduler.add(number, [number] * prompt, SamplingParams(max_new_tokens=length - prompt), number)
    assert scheduler.pool.num_blocks // (length // 16) == 10
    ended, again, results = [], -count * prompt, np.ones((count, 2))
    while True:
        scheduler.retire(0)
        ended += scheduler.take_ended()
        if scheduler.idle:
            break
        step = scheduler.plan(0)
        again += step.tokens - step.decoding
        scheduler.commit(step, results[: step.size], 0)
    assert [s.id for s in ended] == list(range(count)) and all(len(s.tokens) == length - prompt for s in ended)
    assert scheduler.preemptions > count and 0 < again < count * (length - prompt)
