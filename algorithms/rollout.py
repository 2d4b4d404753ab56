"""Prompt to rollout, rollout to scores: each data rank answers and scores its part, then every rank holds the whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..engine.mesh import Axis, Mesh
from ..engine.parallel.collectives import gather_objects
from ..engine.rollout.generate import Generator, SamplingParams
from .batch import Batch, Prompt, Rollout
from .config import PPOConfig
from .rewards import RewardFunction
from .roles import Role, Share

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def my_part(count: int, dp: Axis) -> slice:
    """This data rank's contiguous part of `count` samples; parts differ by one at most."""
    return slice(count * dp.rank // dp.size, count * (dp.rank + 1) // dp.size)


def sampling_params(config: PPOConfig, stop_ids: Sequence[int]) -> SamplingParams:
    """How the actor samples in training."""
    rollout = config.rollout
    return SamplingParams(
        temperature=rollout.temperature,
        top_k=rollout.top_k,
        top_p=rollout.top_p,
        max_new_tokens=rollout.max_new_tokens,
        min_new_tokens=rollout.min_new_tokens,
        stop_ids=tuple(stop_ids),
        seed=config.run.seed,
    )


def sample(
    generator: Generator, prompts: Sequence[Prompt], params: SamplingParams, samples_per_prompt: int = 1
) -> list[Rollout]:
    """Answers to all prompts, `samples_per_prompt` in a row for each, the same on every rank and in every layout.

    Random numbers belong to (seed, running number of the sample, position), so neither layout nor batch matter.
    """
    requests = [
        (prompt, prompt.index * samples_per_prompt + j) for prompt in prompts for j in range(samples_per_prompt)
    ]
    mine = requests[my_part(len(requests), generator.mesh.dp)]
    done = generator.generate([prompt.tokens for prompt, _ in mine], [number for _, number in mine], params)
    completions = [completion for part in gather_objects(done, generator.mesh.dp) for completion in part]
    return [
        Rollout(prompt, completion.tokens, completion.logprobs, completion.finish)
        for (prompt, _), completion in zip(requests, completions, strict=True)
    ]


class Scorer:
    """All rewards of a run: functions in processes of their own on one rank of each data rank, models on the mesh.

    Raises:
        ValueError: a function cannot be loaded; on every rank.
    """

    def __init__(self, config: PPOConfig, models: Sequence[Role], tokenizer: PreTrainedTokenizerBase, mesh: Mesh):
        self.config, self.models, self.tokenizer, self.mesh = config, models, tokenizer, mesh
        self.functions: list[RewardFunction] = []
        self._leads = mesh.tp.rank == 0 and mesh.pp.rank == 0

        def start() -> list[list[float]]:
            for spec in config.reward.functions:
                self.functions.append(RewardFunction(spec, config.reward.time_limit))
            return []

        self._on_leaders(start)

    def __call__(self, rollouts: Sequence[Rollout], batch: Batch, shares: Sequence[Share]) -> dict[str, list[float]]:
        """Every reward's name -> its scores, one a sample, in the order of the config's weights.

        Raises:
            ValueError: a function failed, on every rank; names function and rows.
        """
        mine = rollouts[my_part(len(rollouts), self.mesh.dp)]

        def call() -> list[list[float]]:
            if not mine:  # fewer samples than data ranks
                return [[] for _ in self.functions]
            completions = [self.tokenizer.decode(rollout.tokens, skip_special_tokens=True) for rollout in mine]
            return [function.score([r.prompt for r in mine], completions) for function in self.functions]

        parts = self._on_leaders(call)
        by_function = [[score for part in parts for score in part[i]] for i in range(len(self.config.reward.functions))]
        by_model = [model.scores(batch, shares).tolist() for model in self.models]
        names = (*self.config.reward.functions, *self.config.reward.models)
        return dict(zip(names, by_function + by_model, strict=True))

    def close(self) -> None:
        """Ends the functions' processes."""
        for function in self.functions:
            function.close()

    def _on_leaders(self, work) -> list[list[list[float]]]:
        """Runs `work` on one rank of each data rank and gives all results; where one fails, every rank raises."""
        result, failure = None, None
        if self._leads:
            try:
                result = work()
            except ValueError as error:
                failure = str(error)
        outcomes = gather_objects((result, failure), self.mesh.world)
        for _, reason in outcomes:
            if reason is not None:
                self.close()
                raise ValueError(reason)
        return [done for done, _ in outcomes if done is not None]
