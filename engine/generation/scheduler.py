"""Scheduler of continuous batching (Yu et al. 2022, "Orca"): the reference in Python of csrc/host/scheduler.cpp, which
serves where trialign._host is built (engine/host.py). Both take the same steps.

Every step decodes one token of each running sequence and prefills, in the same forward, as many waiting ones as fit.
A finished sequence frees its row and its blocks at once, for the next step.

Blocks are allocated as a sequence grows. Where none is free, the youngest running sequence is preempted: it waits at
the head of the queue and is prefilled again with the tokens it has, none of which is sampled a second time.

A waiting sequence whose prompt is in the cache already shares the prompt's full blocks and gets a copy of the block of
its last token: it is not prefilled but decodes, from the last token of the prompt on. So the samples of one prompt
prefill it once; the first one is prefilled, the others follow a step later.

Lanes are groups of sequences that take turns: with `pp` pipeline stages there are `pp` lanes, one at each stage.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal

import numpy as np

from .interface import SamplingParams
from .kv_cache import BlockPool, blocks_for


@dataclass(eq=False)
class Sequence:
    """A request with its response so far.

    Attributes:
        key: of its random numbers.
        blocks: of the cache, while it runs.
        planned: response tokens of planned steps, those in flight included.
        started: number of the plan that admitted it.
        prompt_id: equal for equal prompts.
        row: its place in the last step of its lane.
        leaving: preempted for another lane; the next turn of its own frees its row.
    """

    id: int
    prompt: list[int]
    params: SamplingParams
    key: int
    prompt_id: int
    blocks: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    finish: Literal["", "stop", "length", "abort"] = ""
    planned: int = 0
    started: int = 0
    row: int = 0
    leaving: bool = False

    @property
    def length(self) -> int:
        """Tokens of the prompt and the response."""
        return len(self.prompt) + len(self.tokens)

    @property
    def complete(self) -> bool:
        """Whether it needs no further step: it has ended, or the steps in flight bring its last token."""
        return bool(self.finish) or self.planned == self.params.max_new_tokens


@dataclass(frozen=True)
class NewRows:
    """Rows that a step adds to its lane, one sequence each.

    Attributes:
        state: [5, rows] int64: token that is decoded (the last of the prompt), number of tokens, number of response
            tokens, key, response tokens before a stop id can be sampled.
        tables: [rows, width] int32, cache blocks, filled up with the spare one.
        stop_ids: [rows, ids] int64, filled up with the first one; 0 where there is none.
        sampling: [2, rows] fp32, temperature and top_p.
        top_k: [rows] int32.
    """

    state: np.ndarray
    tables: np.ndarray
    stop_ids: np.ndarray
    sampling: np.ndarray
    top_k: np.ndarray


@dataclass(frozen=True)
class Prefill:
    """Tokens of the rows of a step that are prefilled, one row after the other.

    Attributes:
        tokens: [3, tokens] int64: id, position in its sequence, slot of the cache.
        starts: [rows + 1] int64, of the rows.
        longest: tokens of the longest row.
    """

    tokens: np.ndarray
    starts: np.ndarray
    longest: int


@dataclass(frozen=True)
class Step:
    """One forward of a lane: a token of each of the `decoding` first rows, then all tokens of the other rows.

    Attributes:
        rows: sequences; each gets one token.
        kept: number of first rows that were in the lane's last step too, in the same order.
        moved: [kept] int64, their places in that step; None if they are the first ones.
        decoding: number of rows that decode: the kept ones, and new ones that share a prompt.
        copies: [blocks, 2] int64, cache blocks to copy before the forward: source, destination.
        grown: [blocks, 3] int64, blocks that kept rows got: row, place in its table, block.
        tokens: number of tokens of the forward.
    """

    rows: list[Sequence]
    kept: int
    moved: np.ndarray | None
    decoding: int
    copies: np.ndarray
    grown: np.ndarray
    tokens: int
    block_size: int
    spare: int

    @property
    def size(self) -> int:
        """Number of rows."""
        return len(self.rows)

    @property
    def masked(self) -> bool:
        """Whether a row may have fewer response tokens than must come before a stop id."""
        return any(sequence.params.min_new_tokens for sequence in self.rows)

    def new_rows(self, width: int, stop_ids: int) -> NewRows:
        """The rows after the kept ones, of which there must be one.

        Args:
            width: blocks of a table.
            stop_ids: columns of them, at least.
        """
        new = self.rows[self.kept :]
        state = [
            [sequence.prompt[-1] for sequence in new],
            [sequence.length for sequence in new],
            [len(sequence.tokens) for sequence in new],
            [sequence.key for sequence in new],
            [sequence.params.min_new_tokens if sequence.params.stop_ids else 0 for sequence in new],
        ]
        tables = [sequence.blocks + [self.spare] * (width - len(sequence.blocks)) for sequence in new]
        stops = [sequence.params.stop_ids or (0,) for sequence in new]
        count = max(stop_ids, *map(len, stops))
        sampling = [[s.params.temperature for s in new], [s.params.top_p for s in new]]
        return NewRows(
            np.array(state, np.int64),
            np.array(tables, np.int32),
            np.array([ids + ids[:1] * (count - len(ids)) for ids in stops], np.int64),
            np.array(sampling, np.float32),
            np.array([sequence.params.top_k for sequence in new], np.int32),
        )

    def prefill(self) -> Prefill:
        """The rows that do not decode, of which there must be one."""
        rows, block = self.rows[self.decoding :], self.block_size
        tokens = [
            [token for s in rows for token in (*s.prompt, *s.tokens)],
            [position for s in rows for position in range(s.length)],
            [s.blocks[p // block] * block + p % block for s in rows for p in range(s.length)],
        ]
        lengths = [sequence.length for sequence in rows]
        starts = np.array([0, *accumulate(lengths)], np.int64)
        return Prefill(np.array(tokens, np.int64), starts, max(lengths))


class Scheduler:
    """Plans steps and records their results.

    First come, first served; only sequences that wait for a prompt of the step at hand are overtaken, in that step.
    The state depends on the calls and the sampled tokens alone: ranks that make the same calls have the same state.

    Args:
        num_blocks: of the cache.
        max_running: sequences running at once, over all lanes.
        prefill_tokens: tokens prefilled in one step; a longer sequence is prefilled alone.

    Attributes:
        alive: number of sequences that have not ended.
        preemptions: number of them since the scheduler was made.
        lane_size: sequences running at once in a lane.
        width: blocks of the longest sequence.
        done, total: response tokens of all sequences; one that has ended counts max_new_tokens in both.
    """

    def __init__(
        self, block_size: int, num_blocks: int, *, max_running: int, prefill_tokens: int, lanes: int = 1
    ) -> None:
        self.block_size, self.max_running, self.prefill_tokens = block_size, max_running, prefill_tokens
        self.pool = BlockPool(num_blocks)
        self.waiting: deque[Sequence] = deque()
        self.running: list[list[Sequence]] = [[] for _ in range(lanes)]
        self._ended: list[Sequence] = []
        self.alive = self.preemptions = 0
        self.reset()

    def reset(self) -> None:
        """Forgets past sequences. None may wait or hold a row."""
        assert self.idle and self.pool.free_blocks == self.pool.num_blocks, "blocks leaked"
        self.alive = self.lane_size = self.width = self.done = self.total = self._plans = 0
        self._prompt_ids: dict[tuple[int, ...], int] = {}
        self._cached: dict[int, list[Sequence]] = {}  # prompt id -> running sequences, by admission
        self._starving: set[int] = set()  # lanes that wait for blocks: meanwhile no sequence is admitted

    @property
    def idle(self) -> bool:
        """Whether no sequence waits, runs or holds a row."""
        return not self.alive and not any(self.running)

    def blocks_of(self, prompt: int, max_new_tokens: int) -> int:
        """Blocks for a prompt of so many tokens and its longest response; the last token is not cached."""
        return blocks_for(prompt + max_new_tokens - 1, self.block_size)

    def add(self, id: int, prompt: list[int], params: SamplingParams, key: int) -> None:
        """Queues a sequence, which must fit the pool; ids grow."""
        prompt_id = self._prompt_ids.setdefault(tuple(prompt), len(self._prompt_ids))
        self.waiting.append(Sequence(id, prompt, params, key, prompt_id))
        self.alive += 1
        self.total += params.max_new_tokens
        self.width = max(self.width, self.blocks_of(len(prompt), params.max_new_tokens))
        # Lanes are filled evenly: otherwise one would run everything, and the other stages' turns would be empty.
        self.lane_size = max(self.lane_size, blocks_for(min(self.max_running, self.alive), len(self.running)))

    def abort(self, ids: Iterable[int] | None = None) -> None:
        """Ends these sequences, or all (None): waiting ones at once, running ones when their lane is retired."""
        wanted = None if ids is None else set(ids)
        for sequence in [*self.waiting, *(s for lane in self.running for s in lane)]:
            if wanted is None or sequence.id in wanted:
                self._end(sequence, "abort")

    def retire(self, lane: int) -> None:
        """Frees the rows of `lane` that need no further step, and those preempted by other lanes."""
        kept = []
        for sequence in self.running[lane]:
            if sequence.complete:
                self._free(sequence)
                self._ended += [sequence] if sequence.finish else []
            elif sequence.leaving:
                sequence.leaving = False
                self._requeue([sequence])
            else:
                kept.append(sequence)
        self.running[lane] = kept

    def plan(self, lane: int) -> Step | None:
        """The next step of `lane`, which must be retired; None if it has no sequences, or waits for blocks."""
        self._plans += 1
        running, victims = self.running[lane], self._preempt(lane)
        if victims is None:
            self._starving.add(lane)
            return None
        self._starving.discard(lane)
        grown: list[tuple[int, int, int]] = []
        for row, sequence in enumerate(running):
            if self._grows(sequence):
                (block,) = self.pool.allocate(1)
                grown.append((row, len(sequence.blocks), block))
                sequence.blocks.append(block)
        kept, admits = len(running), not victims and not self._starving
        sharing, prefilled, copies = self._admit(lane) if admits else ([], [], [])
        running += sharing + prefilled
        if not running:
            return None
        places = [sequence.row for sequence in running[:kept]]
        for row, sequence in enumerate(running):
            sequence.row = row
            sequence.planned += 1
        decoding = kept + len(sharing)
        return Step(
            list(running),
            kept,
            None if places == list(range(kept)) else np.array(places, np.int64),
            decoding,
            np.array(copies, np.int64).reshape(-1, 2),
            np.array(grown, np.int64).reshape(-1, 3),
            decoding + sum(sequence.length for sequence in prefilled),
            self.block_size,
            self.pool.num_blocks,
        )

    def commit(self, step: Step, results: np.ndarray, version: int) -> None:
        """Appends one token to each row of `step`; tokens of sequences that have ended are dropped.

        Args:
            results: [rows, 2] fp64, token and logprob.

        Raises:
            ValueError: a token below 0, which sampling gives where a row's logits allow no token.
        """
        assert len(results) == step.size, "a step's result does not match its rows"
        if (results[:, 0] < 0).any():
            raise ValueError("logits hold NaN, +inf or only -inf: no token can be sampled")
        for sequence, (number, logprob) in zip(step.rows, results.tolist(), strict=True):
            if sequence.finish:
                continue
            token = int(number)
            sequence.tokens.append(token)
            sequence.logprobs.append(logprob)
            sequence.versions.append(version)
            self.done += 1
            if token in sequence.params.stop_ids:
                self._end(sequence, "stop")
            elif len(sequence.tokens) == sequence.params.max_new_tokens:
                self._end(sequence, "length")

    def take_ended(self) -> list[Sequence]:
        """Sequences that have ended and hold no row, since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def requeue(self) -> None:
        """Moves the running sequences to the head of the queue, to be prefilled again with their tokens. No step may be
        in flight."""
        for lane in range(len(self.running)):
            self.retire(lane)
        running = [sequence for lane in self.running for sequence in lane]
        self.running = [[] for _ in self.running]
        self._requeue(running)

    def _grows(self, sequence: Sequence) -> bool:
        """Whether a running sequence needs another block for its next step, which caches its last planned token."""
        return blocks_for(len(sequence.prompt) + sequence.planned, self.block_size) > len(sequence.blocks)

    def _preempt(self, lane: int) -> list[Sequence] | None:
        """Preempts the youngest sequences until the rows of `lane` can grow. Returns those of this lane, or None where
        the lane must wait for blocks that other lanes free in their turns.

        The oldest running sequence is never preempted, so there is always progress.
        """
        running, victims = self.running[lane], []
        while sum(map(self._grows, running)) > self.pool.free_blocks:
            held = [sequence for rows in self.running for sequence in rows]
            alive = [sequence for sequence in held if not sequence.complete and not sequence.leaving]
            victim = max(alive, key=lambda sequence: sequence.id)
            if len(alive) == 1 or victim not in running:
                # Victims in other lanes have a step in flight; one at a time, since each may free enough.
                if len(alive) > 1 and not any(sequence.leaving for sequence in held):
                    victim.leaving = True
                    self.preemptions += 1
                return None
            running.remove(victim)
            victims.append(victim)
            self.preemptions += 1
            self._requeue([victim])
        return victims

    def _admit(self, lane: int) -> tuple[list[Sequence], list[Sequence], list[tuple[int, int]]]:
        """Admits waiting sequences to `lane`: (those that share a cached prompt, those to prefill, blocks to copy)."""
        sharing: list[Sequence] = []
        prefilled: list[Sequence] = []
        copies: list[tuple[int, int]] = []
        followers: list[Sequence] = []  # of prompts that this step prefills
        rows, budget = self.lane_size - len(self.running[lane]), self.prefill_tokens
        spare = self.pool.num_blocks // 100 if any(self.running) else 0  # for the running sequences to grow
        while self.waiting and len(sharing) + len(prefilled) < rows:
            sequence = self.waiting[0]
            cached = [] if sequence.tokens else self._cached.get(sequence.prompt_id, [])
            source = cached[0] if cached else None
            if source is not None and source.started == self._plans:
                followers.append(self.waiting.popleft())
                continue
            shared, place = divmod(len(sequence.prompt) - 1, self.block_size)  # of the last token of the prompt
            count = blocks_for(sequence.length, self.block_size) if source is None else 1
            if count > self.pool.free_blocks - spare:
                break
            if source is None:
                if prefilled and sequence.length > budget:
                    break
                budget -= sequence.length
                prefilled.append(sequence)
            else:
                sequence.blocks = source.blocks[:shared]
                self.pool.share(sequence.blocks)
                sharing.append(sequence)
            self.waiting.popleft()
            sequence.blocks = sequence.blocks + self.pool.allocate(count)
            if source is not None and place:
                copies.append((source.blocks[shared], sequence.blocks[shared]))
            sequence.planned, sequence.started = len(sequence.tokens), self._plans
            self._cached.setdefault(sequence.prompt_id, []).append(sequence)
        self.waiting.extendleft(reversed(followers))
        return sharing, prefilled, copies

    def _requeue(self, sequences: list[Sequence]) -> None:
        for sequence in sequences:
            self._free(sequence)
            sequence.planned = 0
        self.waiting.extendleft(sorted(sequences, key=lambda sequence: -sequence.id))

    def _free(self, sequence: Sequence) -> None:
        self.pool.free(sequence.blocks)
        sequence.blocks = []
        self._cached[sequence.prompt_id].remove(sequence)

    def _end(self, sequence: Sequence, finish: Literal["stop", "length", "abort"]) -> None:
        if not sequence.finish:
            sequence.finish = finish
            self.alive -= 1
            self.done += sequence.params.max_new_tokens - len(sequence.tokens)
            if sequence.blocks:
                return  # `retire` ends it
            if not sequence.planned:
                self.waiting.remove(sequence)
            self._ended.append(sequence)
