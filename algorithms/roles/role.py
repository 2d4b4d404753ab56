"""Roles: decoders on a mesh with the forward passes of RLHF. Learner (learner.py) adds the optimizer step.

A pass takes the whole batch, runs this DP rank's micro-batches and leaves one number a target on the last pipeline
stage; `collect` puts the numbers of all DP ranks in place in the whole batch, on every rank.

Ranks that share experts must run equally many micro-batches, since each takes part in the others' all-to-alls: those
with fewer begin with padding, micro-batches of a single token without targets.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from ...engine.mesh import Mesh
from ...engine.parallel.collectives import all_reduce, from_mesh, gather_objects
from ...engine.parallel.tensor import parallel_logprob
from ...engine.pipeline.runner import run_schedule
from ...engine.pipeline.schedule import forward_only
from ...engine.pipeline.stage import Chunk
from ...engine.profiler import Profiler
from ...engine.progress import report_progress
from ...kernels.attention import packed_attention
from ...models.decoder import Decoder
from ...models.flops import forward_flops
from ...models.moe import Routing
from ..batch import Batch, pack
from ..config.supervised import UpdateConfig
from ..micro_batch import MicroBatchSizes, pass_micro_batches

Readout = Callable[[Batch, Tensor], Tensor]
"""(micro-batch, hidden states [tokens, hidden] of the last stage) -> numbers or loss computed from them."""

DEFAULT_SIZES = UpdateConfig()


def stage_forward(
    model: Decoder, batch: Batch, x: Tensor | None, routing: Routing | None = None, chunk: Chunk | None = None
) -> Tensor:
    """A chunk's hidden states [tokens, hidden] of a packed batch; attention stays within each sample."""
    lengths = batch.cu_seqlens.diff()
    lengths = torch.repeat_interleave(lengths, lengths, output_size=len(batch.tokens))  # [tokens]

    def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return packed_attention(q, k, v, batch.cu_seqlens, batch.max_seqlen, **model.attention_options(layer))

    return model(batch.tokens if x is None else x, batch.positions, attend, routing, lengths, chunk)


def padding(count: int, mesh: Mesh) -> list[Batch]:
    """Extra micro-batches of a rank with `count` of its own, up to the most of its ep group. Collective over ep.

    They come first: gradients are reduced during the last backward, which must reach every parameter on every rank.
    """
    return [pack([[0]]).to(mesh.device)] * (max(gather_objects(count, mesh.ep)) - count)


def target_logprobs(model: Decoder, batch: Batch, hidden: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of the distribution each response token was chosen from, both [targets] fp32."""
    rows = hidden[batch.response - 1]  # [targets, hidden]: each predicts a response token
    return parallel_logprob(model.head_inputs(rows), model.head_weight(), batch.labels, model.vocab, 1 / temperature)


class Role:
    """A decoder with forward passes. All ranks of the job call a pass and get its result, also outside the mesh.

    Args:
        temperature: divides the logits, as in sampling.
        sizes: of its micro-batches.
        profiler: counts the FLOPs of its passes.
        by_length: whether a micro-batch of a pass has samples of similar length, or consecutive ones.
    """

    def __init__(
        self,
        model: Decoder,
        temperature: float = 1.0,
        sizes: MicroBatchSizes = DEFAULT_SIZES,
        profiler: Profiler | None = None,
        *,
        by_length: bool = True,
    ):
        self.model, self.mesh, self.temperature, self.sizes = model, model.mesh, temperature, sizes
        self.by_length = by_length
        self.profiler = Profiler(model.mesh) if profiler is None else profiler
        self.profiler.memory.add(model, lambda model: {"parameters": [*model.parameters(), *model.buffers()]})

    def count_flops(self, parts: Sequence[Batch], passes: int = 1) -> None:
        """Adds the FLOPs of micro-batches to the profiler; a forward with its backward is three passes."""
        head = self.model.kind == "lm"
        for part in parts:
            flops = forward_flops(self.model.config, part.lengths, len(part.response) * head)
            self.profiler.add(self.mesh, flops=passes * flops)

    def logprobs(self, batch: Batch) -> Tensor:
        """[total] fp32: log-probability of each response token, 0 elsewhere."""
        return self._pass(batch, lambda part, hidden: target_logprobs(self.model, part, hidden, self.temperature)[0])

    def values(self, batch: Batch) -> Tensor:
        """[total] fp32: value of the state that each response token was chosen in, 0 elsewhere."""
        return self._pass(batch, lambda part, hidden: self.model.scores(hidden[part.response - 1]))

    def token_scores(self, batch: Batch) -> Tensor:
        """[total] fp32: score of a reward model at each response token, 0 elsewhere."""
        return self._pass(batch, lambda part, hidden: self.model.scores(hidden[part.response]))

    def scores(self, batch: Batch) -> Tensor:
        """[samples] fp32: score of a reward model at each sample's last target."""
        return self._pass(batch, lambda part, hidden: self.model.scores(hidden[part.last]), "last")[batch.last]

    def _pass(self, batch: Batch, read: Readout, at: Literal["response", "last"] = "response") -> Tensor:
        """[total] fp32 on every rank: numbers read from hidden states, one a token that the batch has in `at`."""
        options = {"by_length": self.by_length}
        cuts = pass_micro_batches(batch, self.sizes, self.mesh.dp, **options) if self.mesh.is_member else []
        own = [batch.select(samples) for samples in cuts]
        first = padding(len(own), self.mesh)
        parts = [*first, *own]
        self.count_flops(own)

        def forward(chunk: Chunk, i: int, x: Tensor | None) -> Tensor:
            hidden = stage_forward(self.model, parts[i], x, chunk=chunk)
            report_progress(i + 1, len(parts))
            return read(parts[i], hidden) if chunk.has_head else hidden

        sizes = shapes(self.model, parts)
        results = run_schedule(forward_only, self.model.stage, self.mesh, sizes, self.model.dtype, forward)
        return collect(batch, cuts, results[len(first) :], [getattr(part, at) for part in own], self.mesh)


class AdapterOff(Role):
    """The policy without the learner's adapters: the same model with them off, no second copy."""

    def _pass(self, batch: Batch, read: Readout, at: Literal["response", "last"] = "response") -> Tensor:
        with self.model.adapter_off():
            return super()._pass(batch, read, at)


def collect(
    batch: Batch, cuts: Sequence[Sequence[int]], results: Sequence[Tensor], places: Sequence[Tensor], mesh: Mesh
) -> Tensor:
    """[total] fp32: numbers of all DP ranks' micro-batches in place in the whole batch. Collective over the job.

    Args:
        cuts: samples of each micro-batch.
        results: one tensor a micro-batch on the last stage, none on the others.
        places: index of each number in its micro-batch.
    """
    whole = torch.zeros(len(batch.tokens), device=mesh.device)
    for samples, place, result in zip(cuts, places, results, strict=False):
        whole[batch.places(samples)[place]] = result
    # Every other rank holds zeros at these places: the sum only moves numbers, it rounds nothing.
    return from_mesh(all_reduce(all_reduce(whole, mesh.dp_cp), mesh.pp), mesh)


def shapes(model: Decoder, parts: Sequence[Batch]) -> list[tuple[int, ...]]:
    """Shape of each micro-batch's hidden states between chunks."""
    return [(len(part.tokens), model.config.hidden_size) for part in parts]
