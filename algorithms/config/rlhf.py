"""Config of launch/rlhf.py: SFT, preferences, reward model, PPO, and evaluation before and after.

A stage's section is the config of its script. The options that connect the stages (initial weights, files, output
folders, layout, seed) are set by `stages` and refused in a stage's section.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

from ...engine.config import AUTO, flatten
from .common import LoRAConfig, ModelPaths, ParallelConfig, RolloutConfig, require, require_at_least
from .data import PromptData
from .evaluate import EvaluateConfig
from .ppo import PPOConfig
from .preference import RewardModelConfig
from .reward import RewardConfig, ShapedReward
from .run import LoggedRun, check_given
from .sft import SFTConfig


@dataclass(frozen=True)
class PromptsConfig(PromptData):
    """Prompts of all stages after SFT, and their eval split."""

    section = "prompts"
    eval_fraction: float = 0.15
    """fraction of the prompts in the eval split of preferences and responses, chosen by run.seed"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.eval_fraction < 1, "eval_fraction", self.eval_fraction, "above 0 and below 1")
        allowed = "empty: every prompt is used once"
        require(not self.probabilities, "probabilities", repr(self.probabilities), allowed)


@dataclass(frozen=True)
class PreferencesRun:
    """Labeling of preferences."""

    output: str = "runs/preferences"
    """folder of the responses and the pairs"""
    prompts: int = 0
    """number of prompts, chosen by the seed (0: all)"""
    pairs_per_prompt: int = 1
    """pairs per prompt: best response against worst, second best against second worst, and so on, without ties"""
    prompts_per_save: int = 64
    """prompts per chunk of responses; finished chunks are skipped on restart"""
    micro_batch_size: int = 16
    """responses per forward pass of a reward model on a DP rank"""
    seed: int = 0
    """random seed of sampling and the choice of prompts"""

    def __post_init__(self) -> None:
        require_at_least(self, 1, "pairs_per_prompt", "prompts_per_save", "micro_batch_size")
        require_at_least(self, 0, "prompts", "seed")
        require(bool(self.output), "output", repr(self.output), "a folder")

    @property
    def folder(self) -> str:
        """Folder of the responses."""
        return self.output


@dataclass(frozen=True)
class PreferencesConfig:
    """Preferences: several responses to each prompt, ranked by their rewards."""

    model: ModelPaths = field(default_factory=ModelPaths)
    data: PromptData = field(default_factory=PromptData)
    rollout: RolloutConfig = field(default_factory=lambda: RolloutConfig(samples_per_prompt=4))
    reward: ShapedReward = field(default_factory=ShapedReward)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    run: PreferencesRun = field(default_factory=PreferencesRun)

    @property
    def lora(self) -> LoRAConfig:
        """No adapters: nothing is trained."""
        return LoRAConfig()

    def check(self, world: int) -> int:
        """As `ScriptConfig.check`."""
        dp = check_given(self.model, self.data, self.parallel, world, "prompts")
        self.reward.check_given()
        samples, pairs = self.rollout.samples_per_prompt, self.run.pairs_per_prompt
        if samples < 2 * pairs:
            raise ValueError(
                f"rollout.samples_per_prompt={samples}: run.pairs_per_prompt={pairs} needs at least {2 * pairs}"
            )
        return dp


@dataclass(frozen=True)
class RLHFRun(LoggedRun):
    """Run: folder of the report and of a folder for each stage, loggers, seed, timeouts."""

    show: int = 8
    """number of eval prompts whose responses before and after are shown in the report, from the first on"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 0, "show")


@dataclass(frozen=True)
class RLHFConfig:
    """The RLHF pipeline: SFT, preferences, reward model, PPO, evaluation, and a report.

    Sources of defaults: [P] PPO, [I] InstructGPT, [Z] Ziegler et al. 2019, [O] OpenRLHF, [V] verl, [T] TRL.
    """

    model: ModelPaths = field(default_factory=ModelPaths)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    preferences: PreferencesConfig = field(default_factory=PreferencesConfig)
    reward: RewardModelConfig = field(default_factory=RewardModelConfig)
    ppo: PPOConfig = field(default_factory=PPOConfig)
    evaluation: EvaluateConfig = field(default_factory=EvaluateConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    run: RLHFRun = field(default_factory=lambda: RLHFRun(output="runs/rlhf"))

    def check(self, world: int) -> int:
        """As `ScriptConfig.check`, of every stage.

        Raises:
            ValueError: with the stage, the options and numbers that do not fit.
        """
        for stage, names in SET_BY_PIPELINE.items():
            section = getattr(self, stage)
            given, own = flatten(section), flatten(type(section)())
            for name in (*SET_IN_EVERY_STAGE, *names):
                for option in (option for option in own if option == name or option.startswith(f"{name}.")):
                    if given[option] != own[option]:
                        raise ValueError(
                            f"{stage}.{option}={given[option]}: is set by the pipeline; {_alternative(stage, name)}"
                        )
        dp = check_given(self.model, self.prompts, self.parallel, world, "prompts")
        root = Path(self.run.folder).resolve()
        reads = {"model.path": (self.model.path,), "prompts.sources": self.prompts.sources}
        reads |= {"sft.data.sources": self.sft.data.sources, "sft.data.eval_sources": self.sft.data.eval_sources}
        for option, paths in reads.items():
            for path in paths:
                if Path(path).resolve().is_relative_to(root):
                    raise ValueError(
                        f"{option}={path}: must not be in run.output={self.run.folder}, which is overwritten"
                    )
        names = [Path(name).name for name in stages(self).ppo.reward.names]
        if len(set(names)) < len(names):
            raise ValueError(
                f"preferences.reward: {', '.join(names)}: the last parts of the scorers' names must differ"
            )
        for name, stage in stages(self)._asdict().items():
            try:
                stage.check(world)
            except ValueError as error:
                raise ValueError(f"[{name}] {error}") from None
        return dp


class Stages(NamedTuple):
    """The complete config of each stage, in the order they run."""

    sft: SFTConfig
    preferences: PreferencesConfig
    reward: RewardModelConfig
    ppo: PPOConfig
    evaluation: EvaluateConfig


PROMPTS = tuple(option.name for option in fields(PromptData))
SCORERS = tuple(option.name for option in fields(RewardConfig))
SET_BY_PIPELINE = {
    "sft": (),
    "preferences": tuple(f"data.{name}" for name in PROMPTS),
    "reward": ("data.sources", "data.eval_sources", "data.eval_fraction", "data.max_tokens", "steps"),
    "ppo": (
        *(f"data.{name}" for name in PROMPTS),
        *("model.critic", "reward.functions", "reward.models", "reward.servers", "reward.weights"),
    ),
    "evaluation": (
        *(f"data.{name}" for name in PROMPTS),
        *("model.baseline", "reward", "text", "dialogues", "metrics"),
    ),
}
"""Options and sections of each stage that `stages` sets, besides those of every stage."""
SET_IN_EVERY_STAGE = (
    "model.path",
    "model.dtype",
    "parallel",
    "run.output",
    "run.resume",
    "run.overwrite",
    "run.log",
    "run.seed",
    "run.timeout",
    "run.grace",
)


def prompt_files(config: RLHFConfig) -> tuple[str, str]:
    """The files of the training prompts and the eval prompts."""
    folder = Path(config.run.folder) / "prompts"
    return str(folder / "train.jsonl"), str(folder / "eval.jsonl")


def stages(config: RLHFConfig) -> Stages:
    """The complete config of each stage: models and files of the stages before it are set."""
    root, dtype = Path(config.run.folder), config.model.dtype
    train, eval_prompts = prompt_files(config)
    tuned, learned = str(root / "sft" / "model"), str(root / "reward" / "model")
    scorer = config.preferences.reward

    def prompts(data: Any, *sources: str) -> Any:
        shared = {name: getattr(config.prompts, name) for name in PROMPTS}
        return replace(data, **(shared | {"sources": sources, "reader": ""}))  # the prompts are read already

    def fill(name: str, path: str, **changes: Any) -> Any:
        section = getattr(config, name)
        run: dict[str, Any] = {"output": str(root / name), "seed": config.run.seed}
        if hasattr(section.run, "log"):
            run |= {"log": config.run.log, "grace": config.run.grace}
        if hasattr(section.run, "timeout"):
            run["timeout"] = config.run.timeout
        if hasattr(section.run, "resume"):
            run["resume"] = AUTO
        model = replace(section.model, path=path, dtype=dtype, **changes.pop("model", {}))
        return replace(section, model=model, parallel=config.parallel, run=replace(section.run, **run), **changes)

    # The true reward is logged beside the reward model's, with weight 0.
    both = {
        "functions": scorer.functions,
        "models": (learned, *scorer.models),
        "servers": scorer.servers,
        "weights": (0.0,) * len(scorer.functions) + (1.0,) + (0.0,) * (len(scorer.models) + len(scorer.servers)),
    }
    longest = config.prompts.max_prompt_tokens + config.preferences.rollout.max_new_tokens
    pairs = replace(
        config.reward.data,
        sources=(str(root / "preferences" / "train.jsonl"),),
        eval_sources=(str(root / "preferences" / "eval.jsonl"),),
        max_tokens=longest,
    )
    return Stages(
        fill("sft", config.model.path),
        fill("preferences", tuned, data=prompts(config.preferences.data, train, eval_prompts)),
        fill("reward", tuned, data=pairs),
        # The critic starts from the reward model [I].
        fill(
            "ppo",
            tuned,
            model={"critic": learned},
            data=prompts(config.ppo.data, train),
            reward=replace(config.ppo.reward, **both),
        ),
        fill(
            "evaluation",
            str(root / "ppo" / "model"),
            model={"baseline": tuned},
            data=prompts(config.evaluation.data, eval_prompts),
            reward=RewardConfig(**({name: getattr(scorer, name) for name in SCORERS} | both)),  # not shaped
        ),
    )


def _alternative(stage: str, name: str) -> str:
    """Where to set an option that is refused in a stage's section."""
    if name in SET_IN_EVERY_STAGE:
        return f"set {name}" if name != "run.resume" else "--resume RUN resumes all stages"
    if name.removeprefix("data.") in PROMPTS and stage != "reward":
        return f"set prompts.{name.removeprefix('data.')}"
    if name.startswith("reward") and stage == "evaluation":
        return "the rewards are those of preferences.reward and the trained reward model"
    if name.startswith("reward."):
        return "the reward of PPO is the trained reward model"
    return "it cannot be changed"
