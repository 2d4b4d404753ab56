"""Continuous batching (Yu et al. 2022, "Orca"): which sequences the next forward runs. Pure: lists in, lists out.

Every step decodes one token of each running sequence and prefills, in the same forward, as many waiting prompts as fit.
A finished sequence gives up its row and its blocks at once, and the next step fills them.

A prompt is admitted only when blocks for its whole possible length are free, so nothing that runs is ever preempted.
Preemption by recompute would pack more sequences into a pool that is too small, but it computes the recomputed keys
and values in another batch shape than the first time, and in bf16 that changes tokens with the size of the pool. Here a
block table is written once, at admission, and the decode step never touches it. The usual pool (`max_running` sequences
of full length) never makes a prompt wait.

Lanes are groups of sequences that take turns: with `pp` pipeline stages there are `pp` lanes, each at another stage.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from .kv_cache import BlockPool, blocks_for


@dataclass
class Sequence:
    """One prompt and what has been sampled for it. `index` is its place in the caller's list."""

    index: int
    prompt: list[int]
    blocks: list[int] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish: str = ""  # "stop" | "length" once finished


@dataclass(frozen=True)
class Step:
    """One forward: a token of each of the `decoding` sequences that `lane` runs, then the `admitted` prompts, whole."""

    lane: int
    decoding: int
    admitted: list[Sequence]

    @property
    def rows(self) -> int:
        """Sequences in the step; each gets one token."""
        return self.decoding + len(self.admitted)

    @property
    def tokens(self) -> int:
        """Tokens that go through the forward."""
        return self.decoding + sum(len(sequence.prompt) for sequence in self.admitted)


class Scheduler:
    """Plans steps and takes their results.

    The order is first come, first served, without overtaking, and depends on nothing but the arguments and the sampled
    tokens: ranks that call the same methods with the same results hold the same state.

    Args:
        max_running: sequences running at once, over all lanes.
        prefill_tokens: prompt tokens admitted in one step; a longer prompt is admitted alone.

    Raises:
        ValueError: a prompt with its `max_new_tokens` needs more blocks than the pool has.
    """

    def __init__(
        self,
        prompts: list[list[int]],
        pool: BlockPool,
        block_size: int,
        *,
        max_new_tokens: int,
        stop_ids: tuple[int, ...] = (),
        max_running: int,
        prefill_tokens: int,
        lanes: int = 1,
    ) -> None:
        self.pool = pool
        self.block_size = block_size
        self.max_new_tokens = max_new_tokens
        self.stop_ids = frozenset(stop_ids)
        self.prefill_tokens = prefill_tokens
        self.sequences = [Sequence(index, prompt) for index, prompt in enumerate(prompts)]
        for sequence in self.sequences:
            if self.blocks_of(sequence) > pool.num_blocks:
                raise ValueError(
                    f"prompt {sequence.index} has {len(sequence.prompt)} tokens and may grow by {max_new_tokens}: "
                    f"{self.blocks_of(sequence)} cache blocks of {block_size} needed, the pool has {pool.num_blocks}"
                )
        self.waiting = deque(self.sequences)
        self.running: list[list[Sequence]] = [[] for _ in range(lanes)]
        self.done, self.total = 0, len(prompts) * max_new_tokens  # tokens, a response that has ended counts in full
        # Lanes are filled evenly, or one would run everything while the other stages' turns pass empty.
        self.lane_size = blocks_for(min(max_running, len(prompts)), lanes)

    @property
    def finished(self) -> bool:
        return not self.waiting and not any(self.running)

    def blocks_of(self, sequence: Sequence) -> int:
        """Blocks of the longest `sequence` can get. The last token sampled is never fed back, so never cached."""
        return blocks_for(len(sequence.prompt) + self.max_new_tokens - 1, self.block_size)

    def plan(self, lane: int) -> Step | None:
        """The next step of `lane`, whose last step must have been committed; None where it has nothing to run."""
        running = self.running[lane]
        decoding, admitted, budget = len(running), [], self.prefill_tokens
        while self.waiting and len(running) < self.lane_size:
            sequence = self.waiting[0]
            if admitted and len(sequence.prompt) > budget:
                break
            blocks = self.pool.allocate(self.blocks_of(sequence))
            if blocks is None:
                break
            self.waiting.popleft()
            sequence.blocks = blocks
            budget -= len(sequence.prompt)
            admitted.append(sequence)
            running.append(sequence)
        return Step(lane, decoding, admitted) if running else None

    def commit(self, step: Step, tokens: list[int], logprobs: list[float]) -> list[int] | None:
        """Takes one token of each row of `step`, in its order; frees what is finished.

        Returns:
            The rows that go on, in order, or None where all do.
        """
        running = self.running[step.lane]
        assert len(tokens) == len(running) == step.rows, "a step's result does not match its rows"
        ended = False
        self.done += len(running)
        for sequence, token, logprob in zip(running, tokens, logprobs, strict=True):
            sequence.tokens.append(token)
            sequence.logprobs.append(logprob)
            if token in self.stop_ids:
                sequence.finish = "stop"
            elif len(sequence.tokens) == self.max_new_tokens:
                sequence.finish = "length"
            else:
                continue
            self.pool.free(sequence.blocks)
            sequence.blocks = []
            self.done += self.max_new_tokens - len(sequence.tokens)
            ended = True
        if not ended:
            return None
        keep = [row for row, sequence in enumerate(running) if not sequence.finish]
        self.running[step.lane] = [running[row] for row in keep]
        return keep
