"""Learners: roles with an optimizer step; statistics of a step's losses, reduced over the mesh."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ...engine.mesh import Mesh
from ...engine.optim.adamw import ShardedAdamW
from ...engine.parallel.collectives import gather_objects, object_from_mesh
from ...engine.pipeline.runner import run_schedule
from ...engine.pipeline.schedule import forward_only, one_f_one_b
from ...engine.pipeline.stage import Chunk
from ...engine.profiler import Profiler
from ...engine.progress import report_progress
from ...models.decoder import Decoder
from ...models.moe import Routing, moe_layers, router_metrics
from ..batch import Batch
from ..micro_batch import MicroBatchSizes, update_micro_batches
from .nonfinite import describe_culprits, named_inputs, named_losses, numbers_of, poison, unit_losses
from .role import DEFAULT_SIZES, Readout, Role, collect, padding, shapes, stage_forward


class Stats:
    """Sums and maxima over targets, gathered where the loss is computed and reduced over the mesh once a step."""

    def __init__(self) -> None:
        self.sums: dict[str, list[Tensor]] = {}
        self.maxima: dict[str, list[Tensor]] = {}

    def add(self, **values: Tensor) -> None:
        """Adds the sum of each tensor."""
        for name, value in values.items():
            self.sums.setdefault(name, []).append(value.detach().sum())

    def largest(self, **values: Tensor) -> None:
        """Takes the maximum of each tensor; empty ones, of a micro-batch without targets, are ignored."""
        for name, value in values.items():
            if value.numel():
                self.maxima.setdefault(name, []).append(value.detach().max())

    def reduce(self, mesh: Mesh) -> dict[str, float]:
        """Sums and maxima over the mesh, on every rank of the job. Collective over the job."""
        own = {name: torch.stack(values).sum().item() for name, values in self.sums.items()}
        own |= {name: torch.stack(values).max().item() for name, values in self.maxima.items()}
        over_dp = gather_objects((own, set(self.maxima)), mesh.dp_cp)
        maxima = set().union(*(names for _, names in over_dp))
        names = dict.fromkeys(name for numbers, _ in over_dp for name in numbers)
        merged = {n: (max if n in maxima else sum)(rank[n] for rank, _ in over_dp if n in rank) for n in names}
        return object_from_mesh(gather_objects(merged, mesh.pp)[-1], mesh)

    def means(self, mesh: Mesh, count: int) -> dict[str, float]:
        """Sums over the mesh divided by `count`, on every rank of the job. Collective over the job."""
        return {name: value / count for name, value in self.reduce(mesh).items()}


class Learner(Role):
    """A role with an optimizer and a learning-rate schedule."""

    def __init__(
        self,
        model: Decoder,
        optimizer: ShardedAdamW,
        lr_at: Callable[[int], float],
        temperature: float = 1.0,
        sizes: MicroBatchSizes = DEFAULT_SIZES,
        max_skipped: int = 0,
        profiler: Profiler | None = None,
    ):
        super().__init__(model, temperature, sizes, profiler)
        self.optimizer, self.lr_at, self.max_skipped = optimizer, lr_at, max_skipped
        self.skipped = 0
        self.reasons: list[str] = []
        self.profiler.memory.add(optimizer, ShardedAdamW.memory)

    def step(
        self,
        batch: Batch,
        loss: Readout,
        stats: Stats | None = None,
        *,
        samples: Sequence[int] | None = None,
        unit: int = 1,
        extra_losses: Sequence[tuple[Batch, Readout]] = (),
    ) -> dict[str, float]:
        """One optimizer step on a batch with a loss of each micro-batch's hidden states.

        Args:
            stats: statistics that the losses add to.
            samples: ids of the minibatch; None for the whole batch.
            unit: number of neighboring samples with a joint loss, 2 for pairs.
            extra_losses: further batches that join the step, each with its own loss.

        Returns:
            grad_norm and lr; with experts, `router_metrics`; where steps may be skipped, skipped: 1 if a number was not
            finite, so that weights, moments, average and schedule did not change.

        Raises:
            ValueError: fewer samples than DP ranks.
            FloatingPointError: a number is not finite and the step may not be skipped; on every rank, naming it.
        """
        config = self.model.config
        work = [(batch, range(len(batch)) if samples is None else samples, loss)]
        work += [(other, range(len(other)), own) for other, own in extra_losses]
        work = work if self.mesh.is_member else []
        parts = [
            (whole.select(cut), own)
            for whole, ids, own in work
            for cut in update_micro_batches(whole, ids, self.sizes, self.mesh.dp)
        ]
        self.count_flops([part for part, _ in parts], passes=3)
        first = padding(len(parts), self.mesh)
        routings: list[Routing | None] = [None] * (len(first) + len(parts))
        if config.moe is not None:
            tokens = sum(gather_objects(sum(len(part.tokens) for part, _ in parts), self.mesh.dp_cp))
            scale = 1 / (tokens * len(moe_layers(config)))
            routings[len(first) :] = [Routing(part.cu_seqlens, scale) for part, _ in parts]
        nothing: Readout = lambda part, hidden: hidden[:0].sum()  # noqa: E731
        parts = [*((part, nothing) for part in first), *parts]
        batches = [part for part, _ in parts]

        checked = [number for part in batches for number in numbers_of(part).values()]

        def forward(chunk: Chunk, i: int, x: Tensor | None) -> Tensor:
            part, read = parts[i]
            hidden = stage_forward(self.model, part, x, routings[i], chunk)
            report_progress(i + 1, len(parts))
            if not chunk.has_head:
                return hidden
            value = read(part, hidden)
            checked.append(value.detach())
            return value

        run_schedule(
            one_f_one_b,
            self.model.stage,
            self.mesh,
            shapes(self.model, batches),
            self.model.dtype,
            forward,
            before_last_backward=self.optimizer.data.expect_last_backward,
        )
        lr = self.lr_at(self.optimizer.steps)
        try:
            metrics = {"grad_norm": self.optimizer.step(lr, poison(checked, self.mesh.device)), "lr": lr}
        except FloatingPointError as error:  # on every rank
            self._skip(f"{error}: {self._culprits(parts, stats, unit)}")
            return {"lr": lr, "skipped": 1.0}
        self.skipped = 0
        metrics |= {"skipped": 0.0} if self.max_skipped else {}
        if config.moe is None:
            return metrics
        routers = router_metrics(routings, config, self.mesh) if self.mesh.is_member else {}
        return metrics | object_from_mesh(routers, self.mesh)

    def gather_targets(self, batch: Batch, samples: Sequence[int], values: Sequence[Tensor]) -> Tensor:
        """[total] fp32 on every rank: numbers of targets that `step`'s loss kept, micro-batch by micro-batch."""
        cuts = update_micro_batches(batch, samples, self.sizes, self.mesh.dp)
        return collect(batch, cuts, values, [batch.select(cut).response for cut in cuts], self.mesh)

    def _skip(self, reason: str) -> None:
        self.skipped += 1
        if self.skipped > self.max_skipped:
            before = f"; {self.max_skipped} steps before it were skipped" if self.max_skipped else ""
            raise FloatingPointError(f"{reason}{before} (optimizer.on_nonfinite, optimizer.max_skipped)")
        self.reasons.append(reason)
        self.optimizer.zero_grad()

    def _culprits(self, parts: Sequence[tuple[Batch, Readout]], stats: Stats | None, unit: int) -> str:
        """Names the numbers that are not finite. Collective; leaves `stats` unchanged."""
        before = deepcopy(vars(stats)) if stats else {}

        def forward(chunk: Chunk, i: int, x: Tensor | None) -> Tensor:
            part, loss = parts[i]
            hidden = stage_forward(self.model, part, x, chunk=chunk)
            return unit_losses(part, hidden, loss, unit) if chunk.has_head else hidden

        batches = [part for part, _ in parts]
        results = run_schedule(
            forward_only, self.model.stage, self.mesh, shapes(self.model, batches), self.model.dtype, forward
        )
        losses = [name for part, own in zip(batches, results, strict=False) for name in named_losses(part, own, unit)]
        if stats:
            vars(stats).update(before)
        weights, gradient = (self.optimizer.data.not_finite(kind) for kind in ("master", "grad"))
        return describe_culprits([weights, *named_inputs(batches), losses, gradient], self.mesh)


@dataclass
class Roles:
    """Roles of PPO or GRPO; `rewards` are the reward models in the order of the config."""

    actor: Learner
    critic: Learner | None = None
    reference: Role | None = None
    rewards: list[Role] = field(default_factory=list)

    @property
    def profiler(self) -> Profiler:
        """The run's profiler, shared by all roles."""
        return self.actor.profiler
