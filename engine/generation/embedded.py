"""The embedded generator: samples from the policy's own shards, with a paged cache and continuous batching.

One forward a step carries a token of every running sequence and the prompts admitted in this step, packed. Sampling is
keyed by (seed, sample id, place in the response), so what a prompt gets does not depend on who shares its batch, on the
order of arrival or on the layout.

Under tp every rank gathers the logits of the whole vocabulary, and the tokens of tp rank 0 count: ranks cannot part.
Under pp the running sequences form `pp` lanes, each at another stage, so all stages work. Stage s runs at time t the
step number t - s; between two times all stages meet in one batch of sends and receives, which hands hidden states to
the next stage and the last stage's tokens to all. Every rank's n-th batch matches its peers' n-th batch, so the order
is safe for NCCL, and every rank plans each step from the same results, so shapes never have to be sent.

Under ep the ranks of a group run prompts of their own, but each of their forwards takes part in the all-to-alls of the
others. So they count times together: a rank with nothing to run at some time sends one idle token through its experts'
layers, and no rank stops before all are done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ...kernels.attention import packed_attention
from ...kernels.linear import pack
from ...kernels.paged_attention import paged_attention, write_kv
from ...kernels.sampling import sample
from ..mesh import Mesh
from ..parallel.collectives import all_gather, all_reduce, broadcast, exchange, gather_objects
from ..parallel.shard import Split
from ..pipeline.stage import Stage
from ..progress import report
from .kv_cache import BlockPool, PagedCache, blocks_for
from .scheduler import Scheduler, Step


class Model(Protocol):
    """What the generator needs of a decoder."""

    config: Any  # vocab_size, hidden_size, longest_rollout
    dtype: torch.dtype
    vocab: Split
    stage: Stage

    @property
    def kv_shape(self) -> tuple[int, int, int]: ...

    def __call__(
        self, x: Tensor, positions: Tensor, attend: Callable[[int, Tensor, Tensor, Tensor], Tensor]
    ) -> Tensor: ...

    def attention_options(self, layer: int) -> dict[str, Any]: ...

    def logits(self, hidden: Tensor) -> Tensor: ...

    def modules(self) -> Iterator[nn.Module]: ...


@dataclass(frozen=True)
class SamplingParams:
    """How to sample. Raises ValueError where a value makes no sense.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: sample among the k likeliest tokens only; 0 for all.
        top_p: sample among the fewest tokens that make up this probability; 1 for all.
        max_new_tokens: length at which a response is cut.
        min_new_tokens: stop ids cannot be sampled before the response has this many tokens.
        stop_ids: tokens that end a response; they are kept as its last token.
        seed: with a prompt's sample id, decides its random numbers.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 128
    min_new_tokens: int = 0
    stop_ids: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature}: must be 0 (greedy) or more, and finite")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k}: must be 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: must be above 0 and at most 1 (off)")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens}: must be at least 1")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens={self.min_new_tokens}: must lie between 0 and max_new_tokens={self.max_new_tokens}"
            )


@dataclass(frozen=True)
class Completion:
    """A response. `tokens` include the stop id if one ended it; `logprobs` are of the distribution sampled from."""

    tokens: list[int]
    logprobs: list[float]
    finish: str  # "stop" | "length"


class Interrupted(Exception):
    """Nobody waits for these completions any more."""


class Generator:
    """Samples from `model`, this rank's shard of the policy.

    Its weights are the policy's own parameters, read afresh in every call, so there is nothing to load after an update.
    It keeps nothing between calls: the cache and packed copies of weights live as long as a call, and in between their
    memory is the update's.

    Args:
        block_size: tokens in a cache block.
        max_running: sequences that run at once.
        prefill_tokens: prompt tokens one step takes in, which bounds its activations.
        cache_bytes: limit of the cache on this rank; None gives every running sequence its full length.

    Attributes:
        interrupted: asked at each step of a rank on the last stage: True ends the call soon.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(
        self,
        model: Model,
        mesh: Mesh,
        *,
        block_size: int = 16,
        max_running: int = 256,
        prefill_tokens: int = 4096,
        cache_bytes: int | None = None,
    ) -> None:
        sizes = {"block_size": block_size, "max_running": max_running, "prefill_tokens": prefill_tokens}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}={size}: must be at least 1")
        self.model, self.mesh = model, mesh
        self.block_size, self.max_running = block_size, max_running
        self.prefill_tokens, self.cache_bytes = prefill_tokens, cache_bytes
        self.interrupted: Callable[[], bool] = lambda: False

    def load(self, model: Model) -> None:
        """Samples from this model's weights from now on. It runs on the very shards, so nothing is copied."""
        self.model = model

    def generate(self, prompts: list[list[int]], sample_ids: list[int], params: SamplingParams) -> list[Completion]:
        """One completion a prompt, in the order of the prompts.

        Collective over tp and pp: their ranks call it with the same arguments and all get the same completions. Ranks
        of dp pass their own slices of the prompts; those of one ep group must all call it, if only with no prompts.

        Args:
            prompts: token ids, at least one each.
            sample_ids: one a prompt; equal prompts with different ids get independent samples.

        Raises:
            ValueError: a prompt that is empty, too long for the model or for the cache, or holds an unknown token;
                a stop id outside the vocabulary; not one sample id a prompt.
            Interrupted: on all ranks of tp and pp, where it was.
        """
        self._check(prompts, sample_ids, params)
        if not any(gather_objects(len(prompts), self.mesh.ep)):
            return []
        with torch.inference_mode():
            longest = blocks_for(max(map(len, prompts), default=1) + params.max_new_tokens - 1, self.block_size)
            num_blocks = self._num_blocks(longest * min(self.max_running, len(prompts)))
            scheduler = Scheduler(
                prompts,
                BlockPool(num_blocks),
                self.block_size,
                max_new_tokens=params.max_new_tokens,
                stop_ids=params.stop_ids,
                max_running=self.max_running,
                prefill_tokens=self.prefill_tokens,
                lanes=self.mesh.pp.size,
            )
            cache = PagedCache(
                self.model.kv_shape, num_blocks, self.block_size, dtype=self.model.dtype, device=self.mesh.device
            )
            keys = [sample_key(params.seed, sample_id) for sample_id in sample_ids]
            with packed_weights(self.model, params.max_new_tokens):
                run = _Run(self.model, self.mesh, scheduler, cache, keys, params, longest, self.interrupted)
                run.run()
        if run.stopped:
            raise Interrupted
        return [Completion(s.tokens, s.logprobs, s.finish) for s in scheduler.sequences]

    def _num_blocks(self, wanted: int) -> int:
        """Blocks of the cache: what is wanted, or what every stage's budget allows."""
        if self.cache_bytes is None:
            return wanted
        allowed = self.cache_bytes // PagedCache.bytes_per_block(self.model.kv_shape, self.block_size, self.model.dtype)
        # Stages may hold different numbers of layers, and ranks of tp of heads, but all plan with one number of blocks.
        blocks = torch.tensor(min(wanted, allowed), device=self.mesh.device)
        return int(all_reduce(all_reduce(blocks, self.mesh.tp, "min"), self.mesh.pp, "min"))

    def _check(self, prompts: list[list[int]], sample_ids: list[int], params: SamplingParams) -> None:
        vocab, positions = self.model.config.vocab_size, self.model.config.longest_rollout
        if len(prompts) != len(sample_ids):
            raise ValueError(f"{len(prompts)} prompts but {len(sample_ids)} sample ids")
        for stop in params.stop_ids:
            if not 0 <= stop < vocab:
                raise ValueError(f"stop id {stop} is not in the vocabulary of {vocab}")
        for index, prompt in enumerate(prompts):
            if not prompt:
                raise ValueError(f"prompt {index} is empty: there is nothing to continue")
            if not 0 <= min(prompt) <= max(prompt) < vocab:
                raise ValueError(f"prompt {index} holds a token outside the vocabulary of {vocab}")
            if len(prompt) + params.max_new_tokens > positions:
                raise ValueError(
                    f"prompt {index} of {len(prompt)} tokens with max_new_tokens={params.max_new_tokens} "
                    f"passes the model's {positions} positions"
                )


@contextmanager
def packed_weights(model: Model, steps: int) -> Iterator[None]:
    """Within, layers with a place for it (`packed`) multiply by a packed copy of their weight, where that pays."""
    # Packing takes about as long as it saves in 8 steps of 32 rows (benchmarks/bench_generate.py).
    layers: list[Any] = [module for module in model.modules() if steps >= 10 and hasattr(module, "packed")]
    heads: list[Any] = [module for module in model.modules() if getattr(module, "made", False)]
    try:
        for head in heads:
            head.frozen = head.rows()
        for layer in layers:
            layer.packed = pack(layer.weight if getattr(layer, "frozen", None) is None else layer.frozen)
        yield
    finally:
        for layer in layers:
            layer.packed = None
        for head in heads:
            head.frozen = None


def sample_key(seed: int, sample_id: int) -> int:
    """The 64-bit key of a sample's random numbers, signed as int64: SplitMix64 over both numbers, so that neighboring
    seeds and ids share nothing (Steele et al. 2014, "Fast splittable pseudorandom number generators")."""

    def mix(x: int) -> int:
        x = (x + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        return x ^ (x >> 31)

    key = mix(mix(seed) ^ sample_id)
    return key - (1 << 64) if key >> 63 else key


class _Lane:
    """What the device knows of a lane's running sequences: row i is the scheduler's i-th."""

    def __init__(self, rows: int, max_blocks: int, device: torch.device) -> None:
        # Rows of `state`: last token, tokens in the sequence (the last included), place in the response, sample key.
        self.state = torch.zeros(4, rows, dtype=torch.int64, device=device)
        self.tables = torch.zeros(rows, max_blocks, dtype=torch.int32, device=device)

    def admit(self, step: Step, keys: list[int]) -> None:
        """Fills the rows behind the decoding ones with the step's prompts."""
        new, rows, width = len(step.admitted), slice(step.decoding, step.rows), self.tables.shape[1]
        columns = [[0] * new, [len(s.prompt) for s in step.admitted], [0] * new, [keys[s.index] for s in step.admitted]]
        self.state[:, rows] = torch.tensor(columns, device=self.state.device)
        # Entries past a sequence's blocks are never looked up, but must name a block.
        tables = [s.blocks + [0] * (width - len(s.blocks)) for s in step.admitted]
        self.tables[rows] = torch.tensor(tables, dtype=torch.int32, device=self.tables.device)

    def advance(self, tokens: Tensor, rows: int, keep: list[int] | None) -> None:
        """Appends a token to each of `rows` rows, then closes the gaps of those that ended."""
        self.state[0, :rows] = tokens
        self.state[1:3, :rows] += 1
        if keep:
            kept = torch.tensor(keep, device=self.state.device)
            self.state[:, : len(keep)] = self.state[:, kept]
            self.tables[: len(keep)] = self.tables[kept]


class _Run:
    """One call of generate on one rank."""

    def __init__(
        self,
        model: Model,
        mesh: Mesh,
        scheduler: Scheduler,
        cache: PagedCache,
        keys: list[int],
        params: SamplingParams,
        max_blocks: int,
        interrupted: Callable[[], bool],
    ) -> None:
        self.interrupted, self.stopped = interrupted, False
        self.model, self.mesh, self.scheduler, self.cache, self.keys = model, mesh, scheduler, cache, keys
        rows, device = scheduler.lane_size, mesh.device
        self.lanes = [_Lane(rows, max_blocks, device) for _ in range(mesh.pp.size)]
        self.rows = torch.arange(rows, device=device)
        self.temperature = torch.full((rows,), params.temperature, dtype=torch.float32, device=device)
        self.top_k = torch.full((rows,), params.top_k, dtype=torch.int32, device=device)
        self.top_p = torch.full((rows,), params.top_p, dtype=torch.float32, device=device)
        self.min_new_tokens = params.min_new_tokens if params.stop_ids else 0
        self.stop_ids = torch.tensor(params.stop_ids, dtype=torch.int64, device=device)
        self.steps: dict[int, Step] = {}  # planned and not yet committed, by number; empty turns are left out
        # [2, rows + 1] fp64: tokens and logprobs of a step, then whether to stop: so all ranks stop at one step.
        self.results: dict[int, Tensor] = {}
        self.end: int | None = None  # the first step number with nothing left to do

    def run(self) -> None:
        """Runs steps until every prompt has ended."""
        number, hidden = -self.mesh.pp.rank, None
        while True:
            if number >= 0:
                if self.model.stage.has_embedding:
                    self.plan(number)
                if self.end is not None:
                    return
            step, made = self.steps.get(number), None
            if step is not None:
                made = self.forward(step, hidden)
                if self.model.stage.has_head:
                    self.results[number] = self.sample(step, made)
            elif number >= 0 and self.mesh.ep.size > 1:
                self.idle()
            hidden = self.exchange(number, made)
            number += 1

    def plan(self, number: int) -> None:
        """Commits the lane's last step, then plans its next. Every rank does so in the order of the numbers, with the
        same results, whenever it gets to it."""
        lane = number % len(self.lanes)
        previous = self.steps.pop(number - len(self.lanes), None)
        if previous is not None:
            result = self.results.pop(number - len(self.lanes))
            (*tokens, stop), (*logprobs, _) = result.tolist()
            self.stopped |= bool(stop)
            keep = self.scheduler.commit(previous, [int(token) for token in tokens], logprobs)
            report(self.scheduler.done, self.scheduler.total)
            self.lanes[lane].advance(result[0, :-1], previous.rows, keep)
        # Steps that are at later stages run to the end.
        waits = bool(self.steps) if self.stopped else not self.scheduler.finished
        unfinished = torch.tensor(int(waits), device=self.mesh.device)
        if not all_reduce(unfinished, self.mesh.ep, "max").item():
            self.end = number
            return
        step = None if self.stopped else self.scheduler.plan(lane)
        if step is not None:
            self.steps[number] = step
            if step.admitted:
                self.lanes[lane].admit(step, self.keys)

    def forward(self, step: Step, hidden: Tensor | None) -> Tensor:
        """This stage's hidden states [tokens, hidden] of a step: the decoding rows first, then the packed prompts."""
        lane, decoding, block = self.lanes[step.lane], step.decoding, self.cache.block_size
        rows, tokens, device = self.rows[:decoding], lane.state[0, :decoding], self.mesh.device
        positions = lane.state[1, :decoding] - 1
        longest, starts = 0, rows
        if step.admitted:
            lengths = [len(sequence.prompt) for sequence in step.admitted]
            longest = max(lengths)
            starts = torch.tensor([0, *lengths], device=device).cumsum(0)  # cu_seqlens of the prompts
            documents = torch.repeat_interleave(self.rows[: len(lengths)], starts.diff(), output_size=sum(lengths))
            places = torch.arange(sum(lengths), device=device) - starts[documents]
            prompts = torch.tensor([token for s in step.admitted for token in s.prompt], device=device)
            rows, tokens = torch.cat((rows, documents + decoding)), torch.cat((tokens, prompts))
            positions = torch.cat((positions, places))
        slots = lane.tables[rows, positions // block].long() * block + positions % block  # [tokens]
        tables, cached = lane.tables[:decoding], lane.state[1, :decoding].int()

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values, options = (
                self.cache.keys[layer],
                self.cache.values[layer],
                self.model.attention_options(layer),
            )
            write_kv(k, v, keys, values, slots)
            if not step.admitted:
                return paged_attention(q, keys, values, tables, cached, **options)
            new = packed_attention(q[decoding:], k[decoding:], v[decoding:], starts, longest, **options)
            if not decoding:
                return new
            return torch.cat((paged_attention(q[:decoding], keys, values, tables, cached, **options), new))

        made = self.model(tokens if hidden is None else hidden, positions, attend)
        if step.admitted and self.model.stage.has_head:
            # Only the last token of a prompt is sampled from.
            made = made[torch.cat((self.rows[:decoding], starts[1:] + (decoding - 1)))]
        return made

    def idle(self) -> None:
        """One token through this stage, for the other ranks of ep; nothing is made of it."""
        position = torch.zeros(1, dtype=torch.int64, device=self.mesh.device)
        hidden = torch.zeros(1, self.model.config.hidden_size, dtype=self.model.dtype, device=self.mesh.device)
        self.model(position if self.model.stage.has_embedding else hidden, position, lambda layer, q, k, v: q)

    def sample(self, step: Step, hidden: Tensor) -> Tensor:
        """[rows, hidden] -> [2, rows + 1] fp64: each row's next token (exact in fp64) and its logprob, and whether to
        stop."""
        rows, state = step.rows, self.lanes[step.lane].state
        logits = all_gather(self.model.logits(hidden), self.mesh.tp, -1, self.model.vocab.sizes)  # [rows, vocab]
        if self.min_new_tokens:
            early = state[2, :rows, None] < self.min_new_tokens  # [rows, 1]
            banned = logits[:, self.stop_ids].masked_fill(early, -torch.inf)
            logits[:, self.stop_ids] = banned
        tokens, logprobs = sample(
            logits, self.temperature[:rows], self.top_k[:rows], self.top_p[:rows], state[3, :rows], state[2, :rows]
        )
        stop = tokens.new_full((2, 1), self.interrupted(), dtype=torch.float64)
        return broadcast(torch.cat((torch.stack((tokens.double(), logprobs.double())), stop), 1), self.mesh.tp)

    def exchange(self, number: int, made: Tensor | None) -> Tensor | None:
        """Meets the other stages after this one ran step `number`; returns the next step's hidden states."""
        pp, operations, hidden = self.mesh.pp, [], None
        last = pp.size - 1
        if made is not None and pp.rank < last:
            operations.append(dist.P2POp(dist.isend, made.contiguous(), pp.ranks[pp.rank + 1], pp.group))
        if pp.rank > 0 and number + 1 >= 0:
            self.plan(number + 1)
            step = self.steps.get(number + 1)
            if step is not None:
                shape = (step.tokens, self.model.config.hidden_size)
                hidden = torch.empty(shape, dtype=self.model.dtype, device=self.mesh.device)
                operations.append(dist.P2POp(dist.irecv, hidden, pp.ranks[pp.rank - 1], pp.group))
        sampled = number + pp.rank - last  # the step the last stage has just sampled
        if last and sampled in self.steps:
            if pp.rank == last:
                receivers = pp.ranks[:last]
                operations += [dist.P2POp(dist.isend, self.results[sampled], peer, pp.group) for peer in receivers]
            else:
                shape = (2, self.steps[sampled].rows + 1)
                self.results[sampled] = torch.empty(shape, dtype=torch.float64, device=self.mesh.device)
                operations.append(dist.P2POp(dist.irecv, self.results[sampled], pp.ranks[last], pp.group))
        exchange(operations, pp)
        return hidden
