"""Setup shared by scripts that sample responses and score them: prompts, generator, scorers, table of responses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Protocol

import torch
from report.panels import Panel
from report.tables import ScoredResponse, response_text, reward_table
from trialign.algorithms.batch import Prompt, Rollout, Score, from_rollouts, response_texts
from trialign.algorithms.config.common import RolloutConfig
from trialign.algorithms.config.data import PromptData
from trialign.algorithms.config.reward import PolicyReward, RewardConfig
from trialign.algorithms.data.prompts import PromptDataset
from trialign.algorithms.rewards.encoder import Policy, reward_encoders
from trialign.algorithms.rewards.rewards import Rewards
from trialign.algorithms.rewards.scorer import Scorer
from trialign.algorithms.rewards.shaping import RewardShaper
from trialign.algorithms.roles.build import load_tokenizer
from trialign.algorithms.roles.learner import Learner
from trialign.algorithms.roles.role import Role
from trialign.algorithms.rollout.source import OnPolicySource
from trialign.algorithms.rollout.sync import sample, sampling_params, stop_tokens
from trialign.engine.generation.embedded import EmbeddedGenerator
from trialign.engine.parallel.collectives import all_reduce
from trialign.models.config import ModelConfig
from trialign.models.hf.tokenizer import stop_ids

from .run import Run, ScriptConfig, Stateful

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class SamplingConfig(ScriptConfig, Protocol):
    """Sections of a script whose model samples responses."""

    @property
    def data(self) -> PromptData: ...
    @property
    def rollout(self) -> RolloutConfig: ...
    @property
    def reward(self) -> RewardConfig: ...


class OnlineRun:
    """Prompts, tokenizer and scorers of a run; `attach` adds the generator and the reward models.

    Args:
        shape: of the model that generates.
        shown: prompts of the table at the end.

    Attributes:
        about: prompts and stop tokens, for the run's first line.
        learners, parts: of `Run.begin`; a script that trains sets them, and `rewards`.
    """

    learners: Mapping[str, tuple[Learner, str]]
    parts: Mapping[str, Stateful]
    rewards: Rewards

    def __init__(self, run: Run, config: SamplingConfig, shape: ModelConfig, *, seed: int, shown: int = 0):
        self.run, self.mesh, self.rollout_config, path = run, run.mesh, config.rollout, config.model.path
        self.tokenizer = run.on_all_ranks(lambda: load_tokenizer(path, shape))
        self.dataset = run.on_all_ranks(lambda: PromptDataset(config.data, self.tokenizer, seed), "prompts")
        place = self.dataset.state()
        run.check_same_on_all(place)
        self.shown: list[Prompt] = self.dataset.next(shown)  # the same before and after, and after a resume
        self.dataset.load_state(place)
        self.scorer = build_scorer(run, config, shape, self.tokenizer)
        self.scorer.check(self.dataset.columns())
        ends = run.on_all_ranks(lambda: stop_ids(path, shape, self.tokenizer))
        self.sampling = sampling_params(config.rollout, ends, seed)
        self.about = f"{self.dataset}; {stop_tokens(ends, self.tokenizer)}"

    def attach(self, policy: Role, models: list[Role]) -> None:
        """Adds the policy, from which the generator samples, and the reward models."""
        rollout = self.rollout_config
        where, length = self.dataset.longest()
        self.generator = EmbeddedGenerator(
            policy.model,
            self.mesh,
            block_size=rollout.kv_block,
            max_running=rollout.max_running,
            cache_bytes=int(rollout.cache_gib * 2**30),
            cache_fraction=rollout.cache_fraction,
            max_length=length + rollout.max_new_tokens,
            profiler=self.run.phases,
        )
        self.run.on_all_ranks(lambda: self.generator.check_length(where, length, self.sampling))
        self.models, self._preempted = models, 0
        self.generator.interrupted = self.run.interrupted

    def begin(self, steps: int, about: str = "", facts: Mapping[str, str] | None = None) -> None:
        """`Run.begin`, and samples responses before the first step. Collective."""
        self.run.begin(self.learners, self.parts, steps, about=about or self.about, facts=facts)
        self.before = self.run.remember("before.json", self.sample_responses)
        self.shown = self.shown[: len(self.before)]  # a resume may ask for more

    def finish(self, panels: Sequence[Panel]) -> None:
        """`Run.finish` with a table of responses before and after. Collective."""
        self.run.finish(panels, reward_table(self.before[: len(self.shown)], self.sample_responses()))

    def sample_responses(self) -> list[ScoredResponse]:
        """(prompt, greedy response, reward) for the first `run.show` prompts of the data. Collective."""
        if not self.shown:
            return []
        greedy = replace(self.sampling, temperature=0.0, top_k=0, top_p=1.0)
        with self.run.progress.task("responses"):
            rollouts = sample(self.generator, self.shown, greedy)
            combined = self.scorer.combined(self.scores(rollouts))
        texts = response_texts(rollouts, self.tokenizer)
        rows = zip(rollouts, texts, combined, strict=True)
        return [(rollout.prompt.text, response_text(text, rollout.finish), s) for rollout, text, s in rows]

    def scores(self, rollouts: list[Rollout]) -> dict[str, list[Score]]:
        """Every reward of any number of responses. Collective."""
        return self.scorer(rollouts, from_rollouts(rollouts).to(self.mesh.device), self.models)

    def build_rewards(self, reward: PolicyReward) -> Rewards:
        """Rewards of a training run's rollouts."""
        shaper = RewardShaper(reward.score_clip, reward.missing_eos_penalty, reward.normalize)
        return Rewards(self.scorer, shaper, self.models, self.run.progress.print)

    def on_policy(self, prompts: int) -> OnPolicySource:
        """Rollouts of the current policy, to so many prompts a step."""
        count = self.rollout_config.samples_per_prompt
        return OnPolicySource(self.dataset, self.generator, self.sampling, prompts, count, self.run.phases)

    def steps(self) -> Iterator[int]:
        """`Run.steps`."""
        return self.run.steps()

    def end_step(self, metrics: Mapping[str, float]) -> None:
        """`Run.end_step` with the rewards of the step and the sequences preempted in it."""
        count = torch.tensor(self.generator.preemptions, device=self.mesh.device)
        total = int(all_reduce(count, self.mesh.dp))
        preempted = {"preempted": total - self._preempted} if total > self._preempted else {}
        self._preempted = total
        self.run.end_step({**metrics, **self.rewards.take_metrics(), **preempted})

    def sync(self, actor: Learner) -> None:
        """Loads the actor's weights into the generator."""
        with self.run.phases("sync"):
            self.generator.load(actor.model, self.run.step + 1)

    def print_failures(self) -> None:
        """Prints a line for each reason why a scorer unscored."""
        for reason in self.scorer.failures():
            self.run.progress.print(f"not scored: {reason}")


def build_scorer(run: Run, config: SamplingConfig, shape: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> Scorer:
    """Scorers of a run's responses, closed with the run; prints the reward models that read text instead of tokens."""
    policy = Policy(config.model.path, shape, tokenizer, config.data.chat_template)
    encoders = run.on_all_ranks(lambda: reward_encoders(config.reward.models, policy))
    for folder, encoder in encoders.items() if run.mesh.is_main else ():
        print(f"{folder}: not the policy's tokenizer ({encoder.why}): completions are encoded again with its own")
    scorer = Scorer(config.reward, tokenizer, run.mesh, encoders)
    run.stack.callback(scorer.close)
    return scorer
