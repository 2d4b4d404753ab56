"""Embedded generator: samples from the policy's own shards, with a paged cache and continuous batching.

The forward of a step packs one token of every running sequence and the sequences admitted in this step. Sampling is
keyed by (seed, sample id, position in the response): a request's tokens do not depend on other requests, the order of
arrival or the layout.

Under tp every rank gathers the whole vocabulary's logits and takes the tokens of tp rank 0, so ranks cannot diverge.
Under pp the running sequences form `pp` lanes, one at each stage, so that all stages work. At tick t stage s runs step
t - s; between two ticks all stages meet in one batch of sends and receives, which passes hidden states to the next
stage and the last stage's tokens to all. Every rank's n-th batch matches its peers' n-th batch, so the order is safe
for NCCL, and every rank plans each step from the same results, so shapes are never sent. Stages plan a step at
different ticks; therefore a call at tick t (`add`, `abort`) takes effect at step t on all of them, and a completion is
returned once every stage has planned past its end.

Under ep the ranks of a group have requests of their own, but each forward takes part in the all-to-alls of the others:
a rank with nothing to run in a tick sends one idle token through its experts.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from ..host import HOST
from ..memory import free_memory
from ..mesh import Mesh
from ..parallel.collectives import all_reduce, broadcast, exchange
from ..profiler import Profiler
from ..progress import report_progress
from ..transfer import HostCopy
from .interface import Completion, Generator, Interrupted, Request, SamplingParams
from .kv_cache import PagedCache, blocks_for
from .lane import sample_key
from .runner import Model, ModelRunner
from .scheduler import Scheduler, Step


class EmbeddedGenerator(Generator):
    """Generator (interface.py) on `model`, this rank's shard of the policy.

    `load` copies nothing: the weights are the policy's own parameters. The cache exists only while
    requests run. Weights may be changed in place while no request runs, or between `pause` and `resume` with a `load`
    of the new version.

    The constructor and all calls but `busy` are collective over tp and pp. Under ep, `step`, `generate`, `pause` and
    `load` are collective over its group too: its ranks call them equally often, with or without requests of their own.

    Args:
        version: of the weights that `model` has now.
        block_size: tokens in a cache block.
        max_running: sequences that run at once.
        prefill_tokens: limit of admitted tokens in a step, which bounds its activations.
        cache_bytes: size of the cache on this rank; 0 for `cache_fraction`. No more is allocated than `max_running`
            sequences of `max_length` tokens need.
        cache_fraction: its share of the memory that is free now, after all that stays on the device is there.
        max_length: of a prompt with its response; 0 for the model's limit.
        lag: steps that the host plans ahead of the results it has read; None for 1 on a GPU without pipeline stages,
            so that planning overlaps with the device's work, else 0. A sequence that ends then runs `lag` steps too
            many, whose tokens are dropped. With stages it must be 0: their steps are planned ahead anyway.
        profiler: receives the tokens and FLOPs of completions.

    Raises:
        ValueError: a size below 1.
    """

    def __init__(
        self,
        model: Model,
        mesh: Mesh,
        *,
        version: int = 0,
        block_size: int = 16,
        max_running: int = 256,
        prefill_tokens: int = 4096,
        cache_bytes: int = 0,
        cache_fraction: float = 0.5,
        max_length: int = 0,
        lag: int | None = None,
        profiler: Profiler | None = None,
    ) -> None:
        sizes = {"block_size": block_size, "max_running": max_running, "prefill_tokens": prefill_tokens}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name}={size}: must be at least 1")
        self.mesh, self.version, self.block_size = mesh, version, block_size
        self.max_running, self.prefill_tokens = max_running, prefill_tokens
        free = free_memory(mesh.device, mesh.world.size)
        self.cache_bytes = cache_bytes or int(cache_fraction * free)
        self.max_length = max_length
        self.profiler = Profiler(mesh) if profiler is None else profiler
        self.interrupted: Callable[[], bool] = lambda: False
        lanes = mesh.pp.size
        self.lag = int(mesh.device.type == "cuda" and lanes == 1) if lag is None else lag
        assert not self.lag or lanes == 1
        limits = {"max_running": max_running, "prefill_tokens": prefill_tokens, "lanes": lanes}
        scheduler: type[Scheduler] = Scheduler if HOST is None else HOST.Scheduler
        self.scheduler = scheduler(block_size, self._cache_blocks(model), **limits)
        sizes = {"num_blocks": self.scheduler.pool.num_blocks, "block_size": block_size}
        # Half of what the cache leaves; the rest is for activations. On a CPU launches cost nothing to speak of.
        spare = None if mesh.device.type == "cpu" else self._smallest(max(0, free - self.cache_bytes) // 2)
        self.runner = ModelRunner(model, mesh, **sizes, lane_size=blocks_for(max_running, lanes), spare=spare)
        self.profiler.memory.add(self.runner, ModelRunner.memory)
        self.tick = 0  # the same on all ranks of tp, pp and ep
        self._next_id = 0
        self._open: set[int] = set()  # ids of requests that are not collected yet
        self._calls: deque[tuple[int, Callable[[], None]]] = deque()  # (step of effect, call)
        self._steps: dict[int, Step] = {}  # planned and not committed, by number; without empty ones
        # [rows + 1, 2] fp64: token and logprob of each row, and an interruption, which all ranks see in the same step.
        self._results: dict[int, Tensor] = {}
        self._copies: dict[int, HostCopy] = {}  # of results that are not committed
        self._hidden: Tensor | None = None  # [tokens, hidden], received for the next step
        self._ended: deque[tuple[int, Completion]] = deque()  # (step whose planning retired it, completion)
        self._ready: dict[int, Completion] = {}
        self._paused = self._pausing = False

    @property
    def busy(self) -> bool:
        return bool(self._open)

    @property
    def preemptions(self) -> int:
        """How often a sequence of this DP rank gave its cache blocks up, to be prefilled again."""
        return self.scheduler.preemptions

    def _cache_blocks(self, model: Model) -> int:
        """Blocks of the cache: what the budgets of all stages allow, at most what `max_running` sequences need."""
        limit = model.config.longest_rollout
        per_block = PagedCache.bytes_per_block(model.kv_shape, self.block_size, model.dtype)
        needed = self.max_running * blocks_for(min(limit, self.max_length or limit), self.block_size)
        # Memory, layers and heads may differ by rank, but all must plan with the same number of blocks.
        return self._smallest(min(self.cache_bytes // max(1, per_block), needed))

    def _smallest(self, value: int) -> int:
        """The smallest value on the ranks of tp and pp. Collective."""
        smallest = torch.tensor(value, device=self.mesh.device)
        return int(all_reduce(all_reduce(smallest, self.mesh.tp, "min"), self.mesh.pp, "min"))

    def add(self, request: Request) -> int:
        self._check(request)
        key = sample_key(request.params.seed, request.sample_id)
        number = self._next_id
        self._open.add(number)
        self._next_id += 1
        self._calls.append((self.tick, lambda: self.scheduler.add(number, request.prompt, request.params, key)))
        return number

    def abort(self, request_id: int) -> None:
        if not 0 <= request_id < self._next_id:
            raise ValueError(f"request id {request_id}: not added; added ids are below {self._next_id}")
        self._calls.append((self.tick, lambda: self.scheduler.abort([request_id])))

    def step(self) -> list[Completion]:
        self._run_tick()
        ready, self._ready = list(self._ready.values()), {}
        self._open.difference_update(completion.id for completion in ready)
        return ready

    def generate(self, prompts: list[list[int]], sample_ids: list[int], params: SamplingParams) -> list[Completion]:
        assert not self._pausing, "generate between pause and resume"
        if len(prompts) != len(sample_ids):
            raise ValueError(f"{len(prompts)} prompts but {len(sample_ids)} sample ids")
        requests = [Request(prompt, number, params) for prompt, number in zip(prompts, sample_ids, strict=True)]
        for request in requests:
            self._check(request)
        ids = [self.add(request) for request in requests]
        while self._on_any_rank(not self._ready.keys() >= set(ids)):
            self._run_tick()
        self._open.difference_update(ids)
        completions = [self._ready.pop(request_id) for request_id in ids]
        if any(completion.finish == "abort" for completion in completions):
            raise Interrupted
        return completions

    def pause(self) -> None:
        self._pausing = True
        self._calls.append((self.tick, lambda: setattr(self, "_paused", True)))
        # Until the last step in flight has passed the last stage and its tokens have reached the first.
        for _ in range(max(1, 2 * self.mesh.pp.size - 2) + self.lag):
            self._run_tick()
        assert not self._steps, "a step is in flight after a pause"
        self.runner.thaw()

    def resume(self) -> None:
        self._pausing = False
        self._calls.append((self.tick, lambda: setattr(self, "_paused", False)))

    def load(self, weights: Model, version: int) -> None:
        running = not self._pausing
        if self._on_any_rank(self.busy):
            self.pause()
            # Running requests are prefilled again: a cache of the old weights would give logprobs of neither version.
            self.scheduler.requeue()
        if running:
            self.resume()
        self.runner.thaw()
        self.runner.model, self.version = weights, version

    def _check(self, request: Request) -> None:
        prompt, params = request.prompt, request.params
        vocab, name = self.runner.model.config.vocab_size, f"prompt of sample {request.sample_id}"
        for stop in params.stop_ids:
            if not 0 <= stop < vocab:
                raise ValueError(f"stop id {stop} is not in the vocabulary of {vocab}")
        if not prompt:
            raise ValueError(f"{name} is empty: it must have at least one token")
        if not 0 <= min(prompt) <= max(prompt) < vocab:
            raise ValueError(f"{name} holds a token outside the vocabulary of {vocab}")
        self.check_length(name, len(prompt), params)

    def check_length(self, name: str, length: int, params: SamplingParams) -> None:
        """Refuses a prompt of so many tokens that can never run, whatever else does.

        Raises:
            ValueError: the prompt and its longest response pass the model's positions, or the cache.
        """
        size = f"{name} has {length} tokens, with max_new_tokens={params.max_new_tokens}"
        positions, blocks = (
            self.runner.model.config.longest_rollout,
            self.scheduler.blocks_of(length, params.max_new_tokens),
        )
        if length + params.max_new_tokens > positions:
            raise ValueError(f"{size} it passes the model's {positions} positions")
        if blocks > self.scheduler.pool.num_blocks:
            held = f"{self.scheduler.pool.num_blocks} of cache_bytes={self.cache_bytes}, max_running={self.max_running}"
            raise ValueError(f"{size} it needs {blocks} KV cache blocks of {self.block_size} tokens; there are {held}")

    def _on_any_rank(self, value: bool) -> bool:
        """Whether `value` is true on any rank of the ep group."""
        if self.mesh.ep.size == 1:
            return value
        return bool(all_reduce(torch.tensor(int(value), device=self.mesh.device), self.mesh.ep, "max").item())

    @torch.inference_mode()
    def _run_tick(self) -> None:
        """Runs this stage's step of the current tick, then exchanges results with the other stages."""
        pp, number, output = self.mesh.pp, self.tick - self.mesh.pp.rank, None
        lane = self.runner.lanes[number % pp.size]
        if pp.rank == 0:
            self._plan(number)
        step = self._steps.get(number)
        if step is not None:
            output = self.runner.run(lane, step, self._hidden)
            if self.runner.last:
                stop = output.new_full((1, 2), self.interrupted())
                self._results[number] = broadcast(torch.cat((output, stop)), self.mesh.tp)
        elif number >= 0 and self.mesh.ep.size > 1:
            self.runner.idle()
        self._hidden = self._exchange(number, output)
        # The last step that every stage has planned: the first stage this tick's, the last stage pp - 2 before.
        planned = min(self.tick, self.tick - pp.size + 2)
        while self._ended and self._ended[0][0] <= planned:
            completion = self._ended.popleft()[1]
            self._ready[completion.id] = completion
        self.tick += 1

    def _plan(self, number: int) -> None:
        """Commits the lane's last step but `lag`, runs the calls due by step `number`, then plans that step. Every rank
        does so for all numbers in order, with the same results."""
        lanes, scheduler = self.mesh.pp.size, self.scheduler
        lane, last, stop = self.runner.lanes[number % lanes], self._results.get(number - lanes), 0.0
        if last is not None:
            lane.advance(last[:-1, 0])
            self._copies[number - lanes] = HostCopy(last)
        done = number - (1 + self.lag) * lanes
        previous = self._steps.pop(done, None)
        if previous is not None:
            del self._results[done]
            results = self._copies.pop(done).numpy()
            stop = results[-1, 0]
            scheduler.commit(previous, results[:-1], self.version)
            report_progress(scheduler.done, scheduler.total)
        while self._calls and self._calls[0][0] <= number:
            self._calls.popleft()[1]()
        if stop:
            scheduler.abort()
        scheduler.retire(number % lanes)
        self._take_ended(number)
        if scheduler.idle:
            scheduler.reset()
            self.runner.release()
        elif not self._paused:
            step = scheduler.plan(number % lanes)
            if step is not None:
                self._steps[number] = step
                self.runner.prepare(lane, step, scheduler.width)

    def _take_ended(self, number: int) -> None:
        for s in self.scheduler.take_ended():
            assert s.finish, "a sequence was retired before its end"
            self._ended.append((number, Completion(s.id, s.tokens, s.logprobs, s.versions, s.finish)))
            flops = self.runner.model.forward_flops([s.length], len(s.tokens))
            self.profiler.add(self.mesh, tokens=len(s.tokens), flops=flops)

    def _exchange(self, number: int, output: Tensor | None) -> Tensor | None:
        """Exchanges results with the other stages after step `number`; returns the next step's hidden states."""
        pp, operations, hidden = self.mesh.pp, [], None
        last = pp.size - 1
        if output is not None and pp.rank < last:
            operations.append(dist.P2POp(dist.isend, output.contiguous(), pp.ranks[pp.rank + 1], pp.group))
        if pp.rank > 0 and number + 1 >= 0:
            self._plan(number + 1)
            step = self._steps.get(number + 1)
            if step is not None:
                shape = (step.tokens, self.runner.model.config.hidden_size)
                hidden = torch.empty(shape, dtype=self.runner.model.dtype, device=self.mesh.device)
                operations.append(dist.P2POp(dist.irecv, hidden, pp.ranks[pp.rank - 1], pp.group))
        sampled = number + pp.rank - last  # the step that the last stage has just sampled
        if last and sampled in self._steps:
            if pp.rank == last:
                receivers = pp.ranks[:last]
                operations += [dist.P2POp(dist.isend, self._results[sampled], peer, pp.group) for peer in receivers]
            else:
                shape = (self._steps[sampled].size + 1, 2)
                self._results[sampled] = torch.empty(shape, dtype=torch.float64, device=self.mesh.device)
                operations.append(dist.P2POp(dist.irecv, self._results[sampled], pp.ranks[last], pp.group))
        exchange(operations, pp)
        return hidden
