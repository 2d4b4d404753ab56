"""Runs the steps of the embedded generator on this rank's pipeline stage: model, KV cache, rows, CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor

from ...kernels.attention import packed_attention
from ...kernels.paged_attention import paged_attention, write_kv
from ...kernels.sampling import sample
from ..memory import Holder, allocating
from ..mesh import Mesh
from ..parallel.collectives import all_gather
from ..parallel.shard import Split
from ..transfer import to_device
from .graphs import DecodeGraphs, padded
from .kv_cache import PagedCache
from .lane import Lane
from .scheduler import Prefill, Step


class ModelSizes(Protocol):
    """Limits of a model that requests are checked against."""

    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def longest_rollout(self) -> int: ...


class Model(Protocol):
    """Interface of a model's pipeline stage, as the generator runs it."""

    dtype: torch.dtype
    vocab: Split

    @property
    def config(self) -> ModelSizes: ...

    @property
    def kv_shape(self) -> tuple[int, int, int]:
        """(local layers, local key/value heads, head_dim)."""
        ...

    def __call__(
        self, x: Tensor, positions: Tensor, attend: Callable[[int, Tensor, Tensor, Tensor], Tensor]
    ) -> Tensor: ...

    def attention_options(self, layer: int) -> dict[str, Any]:
        """Arguments of attention in a local layer: scale, window, alibi_slopes."""
        ...

    def logits(self, hidden: Tensor) -> Tensor:
        """[tokens, hidden] -> [tokens, vocab/tp]; last stage only."""
        ...

    def freeze_weights(self, spare: int | None) -> None:
        """Caches what depends on the weights alone, which do not change until `thaw_weights`: with adapters merged and
        NF4 unpacked in copies of at most `spare` bytes; None: as training computes."""
        ...

    @property
    def frozen_copies(self) -> list[Tensor]:
        """Tensors that `freeze_weights` holds."""
        ...

    def thaw_weights(self) -> None:
        """Drops the caches of `freeze_weights`."""
        ...

    def forward_flops(self, lengths: list[int], logits: int) -> float:
        """FLOPs of a forward of whole sequences with `logits` tokens' logits, over all ranks of tp and pp."""
        ...


class ModelRunner:
    """Runs planned steps. The cache exists from the first step until `release`.

    Args:
        num_blocks: of the cache.
        block_size: tokens in a block.
        lane_size: sequences in a lane at most.
        spare: of `freeze_weights`.

    Attributes:
        lanes: rows of the running sequences, one lane for each pipeline stage.
    """

    def __init__(
        self, model: Model, mesh: Mesh, *, num_blocks: int, block_size: int, lane_size: int, spare: int | None = None
    ) -> None:
        self.model, self.mesh, self.num_blocks, self.block_size, self.spare = model, mesh, num_blocks, block_size, spare
        self.lanes = [Lane(padded(lane_size), num_blocks, mesh.device) for _ in range(mesh.pp.size)]
        self.cache: PagedCache | None = None
        self.graphs = self._new_graphs()
        self._frozen = False

    @property
    def last(self) -> bool:
        """Whether this is the last stage."""
        return self.mesh.pp.rank == self.mesh.pp.size - 1

    def memory(self) -> dict[Holder, list[Tensor]]:
        """Tensors by what they hold, for the report of a failed allocation."""
        cache = [] if self.cache is None else [*self.cache.keys, *self.cache.values]
        return {"cache": cache, "parameters": self.model.frozen_copies}

    def prepare(self, lane: Lane, step: Step, width: int) -> None:
        """Allocates the cache at the first step, fills the lane's rows.

        Args:
            width: cache blocks of the longest possible sequence.
        """
        if self.cache is None:
            options = {"dtype": self.model.dtype, "device": self.mesh.device}
            with allocating("cache"):
                self.cache = PagedCache(self.model.kv_shape, self.num_blocks, self.block_size, **options)
        lane.prepare(step, width)
        if not self._frozen:
            self.model.freeze_weights(self.spare)
            self._frozen = True
            self.graphs = self._new_graphs()

    def run(self, lane: Lane, step: Step, hidden: Tensor | None) -> Tensor:
        """This stage's output of a step: as `_decode`, with all tokens of the prefilled rows before the last stage."""
        assert self.cache is not None
        self.cache.copy(step.copies)
        if step.decoding < step.size:
            output = self._forward(lane, step.decoding, step.prefill(), hidden)
            return self._sample(lane, step.size, output, step.masked) if self.last else output
        if self.graphs is None:
            return self._decode(lane, step.size, hidden, step.masked)
        return self.graphs.run(lane, step.size, hidden, step.masked)

    def _decode(self, lane: Lane, rows: int, hidden: Tensor | None, masked: bool) -> Tensor:
        """A step without prefilled rows: hidden states [rows, hidden]; on the last stage tokens and logprobs [rows, 2].

        Neither waits for the device nor copies from the host, and its shapes depend on `rows` alone.
        """
        output = self._forward(lane, rows, None, hidden)
        return self._sample(lane, rows, output, masked) if self.last else output

    def _forward(self, lane: Lane, decoding: int, prefill: Prefill | None, hidden: Tensor | None) -> Tensor:
        """This stage's hidden states of a step, [tokens, hidden]; [rows, hidden] on the last stage."""
        assert self.cache is not None
        cache, block, device = self.cache, self.block_size, self.mesh.device
        tables, cached = lane.tables[:decoding], lane.length[:decoding].int()
        tokens, positions = lane.last[:decoding], lane.length[:decoding] - 1
        slots = tables.gather(1, (positions // block)[:, None])[:, 0].long() * block + positions % block  # [decoding]
        starts, bounds, longest = positions, positions, 0
        if prefill is not None:
            starts, longest = to_device(prefill.starts, device), prefill.longest  # cu_seqlens of the prefilled rows
            bounds = starts.int()  # as the libraries' attention takes them, once a step
            more = to_device(prefill.tokens, device)  # [3, tokens]
            tokens, positions, slots = torch.cat((torch.stack((tokens, positions, slots)), more), 1)

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            keys, values, options = cache.keys[layer], cache.values[layer], self.model.attention_options(layer)
            write_kv(k, v, keys, values, slots)
            if prefill is None:
                return paged_attention(q, keys, values, tables, cached, **options)
            new = packed_attention(q[decoding:], k[decoding:], v[decoding:], bounds, longest, **options)
            if not decoding:
                return new
            return torch.cat((paged_attention(q[:decoding], keys, values, tables, cached, **options), new))

        output = self.model(tokens if hidden is None else hidden, positions, attend)
        if prefill is not None and self.last:  # of a prefilled sequence only the last token's logits are needed
            output = torch.cat((output[:decoding], output[decoding:][starts[1:] - 1]))
        return output

    def _sample(self, lane: Lane, rows: int, hidden: Tensor, masked: bool) -> Tensor:
        """[rows, hidden] -> [rows, 2] fp64: next tokens (exact in fp64) and logprobs.

        Args:
            masked: whether a row may have a response below its min_new_tokens.
        """
        logits = all_gather(self.model.logits(hidden), self.mesh.tp, -1, self.model.vocab.sizes)  # [rows, vocab]
        if masked:
            early, stops = lane.position[:rows] < lane.min_new[:rows], lane.stop_ids[:rows]
            logits.scatter_(1, stops, logits.gather(1, stops).masked_fill(early[:, None], -torch.inf))
        settings = (lane.temperature, lane.top_k, lane.top_p, lane.key, lane.position)
        tokens, logprobs = sample(logits, *(setting[:rows] for setting in settings))
        return torch.stack((tokens.double(), logprobs.double()), 1)

    def idle(self) -> None:
        """Runs one token through this stage, for the other ranks of ep; its output is dropped."""
        position = torch.zeros(1, dtype=torch.int64, device=self.mesh.device)
        hidden = torch.zeros(1, self.model.config.hidden_size, dtype=self.model.dtype, device=self.mesh.device)
        self.model(position if self.mesh.pp.rank == 0 else hidden, position, lambda layer, q, k, v: q)

    def release(self) -> None:
        """Frees the cache and the graphs."""
        self.cache = None
        self.thaw()

    def thaw(self) -> None:
        """Drops what depends on the weights alone, before they change."""
        if self._frozen:
            self.model.thaw_weights()
        self._frozen = False
        self.graphs = self._new_graphs()

    def _new_graphs(self) -> DecodeGraphs | None:
        """Graphs of steps with the present cache and weights, whose addresses they hold."""
        # Under ep the sizes of the all-to-alls depend on the tokens.
        return DecodeGraphs(self._decode) if self.mesh.device.type == "cuda" and self.mesh.ep.size == 1 else None
