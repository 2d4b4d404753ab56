"""Synchronous sampling: each DP rank samples its part of the prompts, then every rank holds all rollouts."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING

from ...engine.generation.interface import Generator, Interrupted, SamplingParams
from ...engine.parallel.collectives import gather_objects, object_from_mesh
from ..batch import Prompt, Rollout, single_turn
from ..config.common import RolloutConfig
from ..micro_batch import contiguous_part

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def sampling_params(rollout: RolloutConfig, stop_ids: Sequence[int], seed: int) -> SamplingParams:
    """Sampling parameters of training."""
    return SamplingParams(
        temperature=rollout.temperature,
        top_k=rollout.top_k,
        top_p=rollout.top_p,
        max_new_tokens=rollout.max_new_tokens,
        min_new_tokens=rollout.min_new_tokens,
        stop_ids=tuple(stop_ids),
        seed=seed,
    )


def sample(
    generator: Generator, prompts: Sequence[Prompt], params: SamplingParams, samples_per_prompt: int = 1
) -> list[Rollout]:
    """Responses to all prompts, `samples_per_prompt` neighbors each, the same on every rank and in every layout.

    Random numbers are keyed by (seed, number of the sample, position), independent of layout and batching.

    Raises:
        Interrupted: on every rank, if the generator was interrupted on any.
    """
    requests = [
        (prompt, prompt.index * samples_per_prompt + j) for prompt in prompts for j in range(samples_per_prompt)
    ]
    mesh = generator.mesh
    own = requests[contiguous_part(len(requests), mesh.dp)] if mesh.is_member else []
    done = None
    with suppress(Interrupted):
        done = generator.generate([p.tokens for p, _ in own], [i for _, i in own], params) if mesh.is_member else []
    parts = object_from_mesh(gather_objects(done, mesh.dp), mesh)
    if None in parts:
        raise Interrupted
    completions = [completion for part in parts for completion in part]
    return [
        single_turn(prompt, completion.tokens, completion.logprobs, completion.finish, completion.versions)
        for (prompt, _), completion in zip(requests, completions, strict=True)
    ]


def stop_tokens(stop_ids: Sequence[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """Names and ids of the stop tokens, for a run's first line."""
    names = [f"{name} ({i})" for i, name in zip(stop_ids, tokenizer.convert_ids_to_tokens(list(stop_ids)), strict=True)]
    return f"stop tokens: {', '.join(names) or 'none, so every response is cut'}"
