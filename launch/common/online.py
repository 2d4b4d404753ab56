"""What scripts have in common whose model answers prompts and learns from rewards: prompts, sampling, scores."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, Protocol

from report.tables import ScoredResponse, response_text
from trialign.algorithms.batch import Prompt, Rollout, Score, from_rollouts, response_texts
from trialign.algorithms.config.common import RolloutConfig
from trialign.algorithms.config.data import PromptData
from trialign.algorithms.config.reward import RewardConfig
from trialign.algorithms.data.prompts import PromptDataset
from trialign.algorithms.rewards.encoder import ChatEncoder, Policy, reward_encoders
from trialign.algorithms.rewards.rewards import Rewards
from trialign.algorithms.rewards.scorer import Scorer
from trialign.algorithms.rewards.shaping import RewardShaper
from trialign.algorithms.roles.build import load_tokenizer
from trialign.algorithms.roles.learner import Learner
from trialign.algorithms.roles.role import Role
from trialign.algorithms.rollout.source import OnPolicySource
from trialign.algorithms.rollout.sync import sample, sampling_params, stop_tokens
from trialign.engine.generation.embedded import EmbeddedGenerator
from trialign.models.config import ModelConfig
from trialign.models.hf.tokenizer import stop_ids

from .run import Run, ScriptConfig


class Show(Protocol):
    """What a run section says of the table at the end."""

    @property
    def show(self) -> int: ...
    @property
    def seed(self) -> int: ...


class AnswerConfig(ScriptConfig, Protocol):
    """The sections of a script whose model answers."""

    @property
    def data(self) -> PromptData: ...
    @property
    def rollout(self) -> RolloutConfig: ...
    @property
    def reward(self) -> RewardConfig: ...


class OnlineRun:
    """Prompts, tokenizer, scorers and how answers are sampled; `attach` adds what answers.

    Args:
        shape: of the model that answers.
    """

    def __init__(self, run: Run, config: AnswerConfig, show: Show, shape: ModelConfig):
        self.reward_config, self.rollout_config, self.mesh, self.shape = (
            config.reward,
            config.rollout,
            run.mesh,
            shape,
        )
        self.run, self.progress, path = run, run.progress, config.model.path
        self.tokenizer = run.on_all_ranks(lambda: load_tokenizer(path, shape))
        self.dataset = run.on_all_ranks(lambda: PromptDataset(config.data, self.tokenizer, show.seed), "prompts")
        place = self.dataset.state()
        run.check_same_on_all(place)
        self.shown: list[Prompt] = self.dataset.next(show.show)  # the same before and after, and after a resume
        self.dataset.load_state(place)
        policy = Policy(path, shape, self.tokenizer, config.data.chat_template)
        encoders = run.on_all_ranks(lambda: reward_encoders(config.reward.models, policy))
        say_encoders(encoders, self.mesh.is_main)
        self.scorer = Scorer(config.reward, self.tokenizer, self.mesh, encoders)
        run.stack.callback(self.scorer.close)
        self.scorer.check(self.dataset.columns())
        ends = run.on_all_ranks(lambda: stop_ids(path, shape, self.tokenizer))
        self.sampling = sampling_params(config.rollout, ends, show.seed)
        self.about = f"{self.dataset}; {stop_tokens(ends, self.tokenizer)}"  # for the run's first line
        self.models: list[Role] = []
        self.rewards: Rewards

    def attach(self, actor: Learner, models: list[Role]) -> None:
        """The policy that answers, and the reward models."""
        rollout = self.rollout_config
        options: dict[str, Any] = {"block_size": rollout.kv_block, "max_running": rollout.max_running}
        options["profiler"] = self.run.phases
        self.generator, self.models = EmbeddedGenerator(actor.model, self.mesh, **options), models
        self.generator.interrupted = self.run.interrupted

    def answer_shown(self) -> list[ScoredResponse]:
        """(prompt, greedy answer, score) for the first `run.show` prompts of the data. Collective."""
        prompts = self.shown
        if not prompts:
            return []
        greedy = replace(self.sampling, temperature=0.0, top_k=0, top_p=1.0)
        with self.progress.task("answers"):
            rollouts = sample(self.generator, prompts, greedy)
            combined = self.scorer.combined(self.scores(rollouts))
        texts = response_texts(rollouts, self.tokenizer)
        named = zip(prompts, rollouts, texts, combined, strict=True)
        return [(prompt.text, response_text(text, rollout.finish), s) for prompt, rollout, text, s in named]

    def scores(self, rollouts: list[Rollout]) -> dict[str, list[Score]]:
        """Every reward of any number of responses. Collective."""
        return self.scorer(rollouts, from_rollouts(rollouts).to(self.mesh.device), self.models)

    def rewards_of(self, shaper: RewardShaper) -> Rewards:
        """Rewards of a training run's rollouts."""
        return Rewards(self.scorer, shaper, self.models, self.progress.print)

    def on_policy(self, prompts: int) -> OnPolicySource:
        """Rollouts of the policy as it is, to so many prompts a step."""
        count = self.rollout_config.samples_per_prompt
        return OnPolicySource(self.dataset, self.generator, self.sampling, prompts, count, self.run.phases)

    def steps(self) -> Iterator[int]:
        """`Run.steps`."""
        return self.run.steps()

    def end_step(self, metrics: Mapping[str, float]) -> None:
        """`Run.end_step` with the rewards of the step."""
        self.run.end_step({**metrics, **self.rewards.take_metrics()})

    def sync(self, actor: Learner) -> None:
        """Gives the generator the actor's weights."""
        with self.run.phases("sync"):
            self.generator.load(actor.model, self.run.step + 1)

    def say_failures(self, run: Run) -> None:
        """One line for each scorer's reason to abstain; before an error says that nothing is left to learn from."""
        for reason in self.scorer.failures():
            run.progress.print(f"abstains: {reason}")


def say_encoders(encoders: Mapping[str, ChatEncoder], main: bool) -> None:
    """One line for each reward model that is given text, not the policy's tokens."""
    for folder, encoder in encoders.items() if main else ():
        print(f"{folder}: not the policy's tokenizer ({encoder.why}): completions are encoded again with its own")
