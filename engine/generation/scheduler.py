"""Scheduler of continuous batching (Yu et al. 2022, "Orca"), in plain Python without tensors.

Every step decodes one token of each running sequence and prefills, in the same forward, as many waiting ones as fit.
A finished sequence frees its row and its blocks at once, for the next step.

A sequence is admitted only when blocks for its whole possible length are free, so that none is ever preempted:
preemption by recomputation would compute keys and values in another batch shape than the first time, and in bf16 tokens
would change with the size of the pool. Unless it is limited, the pool grows so that none of the `max_running` sequences
waits for blocks.

Lanes are groups of sequences that take turns: with `pp` pipeline stages there are `pp` lanes, one at each stage.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Literal

from .interface import SamplingParams
from .kv_cache import BlockPool, blocks_for


@dataclass
class Sequence:
    """A request with its response so far."""

    id: int
    prompt: list[int]
    params: SamplingParams
    key: int = 0  # of its random numbers
    blocks: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    finish: Literal["", "stop", "length", "abort"] = ""

    @property
    def length(self) -> int:
        """Tokens of the prompt and the response."""
        return len(self.prompt) + len(self.tokens)


@dataclass(frozen=True)
class Step:
    """One forward of a lane: a token of each of the `decoding` sequences, then all tokens of the `admitted` ones."""

    lane: int
    decoding: int
    admitted: list[Sequence]

    @property
    def rows(self) -> int:
        """Number of sequences; each gets one token."""
        return self.decoding + len(self.admitted)

    @property
    def tokens(self) -> int:
        """Number of tokens of the forward."""
        return self.decoding + sum(sequence.length for sequence in self.admitted)


class Scheduler:
    """Plans steps and records their results.

    First come, first served, without overtaking. The state depends on the calls and the sampled tokens alone: ranks
    that make the same calls have the same state.

    Args:
        max_running: sequences running at once, over all lanes.
        prefill_tokens: tokens admitted in one step; a longer sequence is admitted alone.
        max_blocks: limit of the pool; None for as many as `max_running` sequences need.

    Attributes:
        ended: retired sequences, for the caller to take.
        lane_size: sequences running at once in a lane.
        max_length: blocks of the longest sequence.
        done, total: response tokens of all sequences; one that has ended counts max_new_tokens in both.
    """

    def __init__(
        self, block_size: int, *, max_running: int, prefill_tokens: int, lanes: int = 1, max_blocks: int | None = None
    ) -> None:
        self.block_size, self.max_running, self.prefill_tokens = block_size, max_running, prefill_tokens
        self.max_blocks = max_blocks
        self.pool = BlockPool()
        self.waiting: deque[Sequence] = deque()
        self.running: list[list[Sequence]] = [[] for _ in range(lanes)]
        self.ended: list[Sequence] = []
        self.lane_size = self.max_length = self.done = self.total = 0

    @property
    def unfinished(self) -> int:
        """Number of sequences that wait or hold a row."""
        return len(self.waiting) + sum(map(len, self.running))

    def blocks_of(self, prompt: int, params: SamplingParams) -> int:
        """Blocks for a prompt of so many tokens and its longest response; the last token is not cached."""
        return blocks_for(prompt + params.max_new_tokens - 1, self.block_size)

    def add(self, sequence: Sequence) -> None:
        """Queues a sequence."""
        self.waiting.append(sequence)
        self.total += sequence.params.max_new_tokens
        self.max_length = max(self.max_length, self.blocks_of(len(sequence.prompt), sequence.params))
        # Lanes are filled evenly: otherwise one would run everything, and the other stages' turns would be empty.
        self.lane_size = max(self.lane_size, blocks_for(min(self.max_running, self.unfinished), len(self.running)))

    def abort(self, ids: Iterable[int] | None = None) -> None:
        """Ends these sequences, or all (None): waiting ones at once, running ones when their lane is retired."""
        wanted = None if ids is None else set(ids)
        for sequence in [*self.waiting, *(s for lane in self.running for s in lane)]:
            if not sequence.finish and (wanted is None or sequence.id in wanted):
                self._end(sequence, "abort")
        self.ended += [s for s in self.waiting if s.finish]
        self.waiting = deque(s for s in self.waiting if not s.finish)

    def plan(self, lane: int) -> Step | None:
        """The next step of `lane`, whose last step must be committed and retired; None if it has no sequences."""
        running = self.running[lane]
        decoding, admitted, budget = len(running), [], self.prefill_tokens
        while self.waiting and len(running) < self.lane_size:
            sequence = self.waiting[0]
            if admitted and sequence.length > budget:
                break
            blocks = self._allocate(self.blocks_of(len(sequence.prompt), sequence.params))
            if blocks is None:
                break
            self.waiting.popleft()
            sequence.blocks = blocks
            budget -= sequence.length
            admitted.append(sequence)
            running.append(sequence)
        return Step(lane, decoding, admitted) if running else None

    def commit(self, step: Step, tokens: list[int], logprobs: list[float], version: int = 0) -> None:
        """Appends one token to each row of `step`, in order; tokens of aborted sequences are dropped."""
        running = self.running[step.lane]
        assert len(tokens) == len(running) == step.rows, "a step's result does not match its rows"
        for sequence, token, logprob in zip(running, tokens, logprobs, strict=True):
            if sequence.finish:
                continue
            sequence.tokens.append(token)
            sequence.logprobs.append(logprob)
            sequence.versions.append(version)
            self.done += 1
            if token in sequence.params.stop_ids:
                self._end(sequence, "stop")
            elif len(sequence.tokens) == sequence.params.max_new_tokens:
                self._end(sequence, "length")

    def retire(self, lane: int) -> list[int] | None:
        """Frees the ended sequences of `lane`, which has no step in flight.

        Returns:
            The remaining rows, in order, or None if none has ended.
        """
        running = self.running[lane]
        keep = [row for row, sequence in enumerate(running) if not sequence.finish]
        if len(keep) == len(running):
            return None
        for sequence in running:
            if sequence.finish:
                self._free(sequence)
                self.ended.append(sequence)
        self.running[lane] = [running[row] for row in keep]
        return keep

    def requeue(self) -> None:
        """Moves the running sequences to the head of the queue, in order of arrival, to be prefilled again with their
        tokens. No step may be in flight."""
        running = sorted((s for lane in self.running for s in lane), key=lambda sequence: sequence.id)
        for sequence in running:
            self._free(sequence)
        self.waiting.extendleft(reversed(running))
        self.running = [[] for _ in self.running]

    def reset(self) -> None:
        """Resets the sizes of pool and lanes. No sequence may wait or run."""
        assert not self.unfinished and self.pool.free_blocks == self.pool.num_blocks, "blocks leaked"
        self.pool = BlockPool()
        self.lane_size = self.max_length = self.done = self.total = 0

    def _allocate(self, count: int) -> list[int] | None:
        if count > self.pool.free_blocks:
            # For all present sequences at first; later at least doubled, to limit the copies of the cache.
            present, most = (self.max_length * min(self.max_running, n) for n in (self.unfinished, self.max_running))
            size = min(most, max(present, 2 * self.pool.num_blocks))
            self.pool.grow(size if self.max_blocks is None else min(size, self.max_blocks))
        return self.pool.allocate(count)

    def _free(self, sequence: Sequence) -> None:
        self.pool.free(sequence.blocks)
        sequence.blocks = []

    def _end(self, sequence: Sequence, finish: Literal["stop", "length", "abort"]) -> None:
        sequence.finish = finish
        self.done += sequence.params.max_new_tokens - len(sequence.tokens)
