"""Config of launch/rlhf.py: fine-tuning, preferences, reward model, PPO, evaluation before and after.

A stage's section is the config of its script. What ties the stages together (which model a stage starts from, which
files it reads, where it writes, layout, seed) is the pipeline's own, filled in by `stages` and refused where given.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ...engine.config import AUTO, flatten
from .common import LoRAConfig, ModelPaths, ParallelConfig, RolloutConfig, require
from .data import PromptData
from .evaluate import EvaluateConfig
from .ppo import PPOConfig
from .preference import RewardModelConfig
from .reward import RewardConfig, ShapedReward
from .run import FolderConfig, check_given, require_seconds
from .sft import SFTConfig


@dataclass(frozen=True)
class PromptsConfig(PromptData):
    """Prompts, the same for all stages after the first, and how many no stage learns from."""

    section = "prompts"
    eval_fraction: float = 0.15
    """share of the prompts, chosen by the seed, that no stage learns from: pairs and answers are measured on them"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(0 < self.eval_fraction < 1, "eval_fraction", self.eval_fraction, "above 0 and below 1")
        require(not self.probabilities, "probabilities", repr(self.probabilities), "empty: each prompt is met once")


@dataclass(frozen=True)
class PreferencesRun:
    """The labeling itself."""

    output: str = "runs/preferences"
    """folder for the answers and the pairs"""
    prompts: int = 0
    """answer this many of the prompts, chosen by the seed (0: all)"""
    pairs: int = 1
    """pairs a prompt: best answer against worst, second best against second worst, and so on; ties are left out"""
    prompts_per_save: int = 64
    """prompts whose answers are kept together; a run that is killed goes on behind the last of them"""
    micro_batch_size: int = 16
    """answers that a reward model scores at once on a data-parallel rank"""
    seed: int = 0
    """seeds sampling and the choice of prompts"""

    def __post_init__(self) -> None:
        for name in ("pairs", "prompts_per_save", "micro_batch_size"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("prompts", "seed"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")
        require(bool(self.output), "output", repr(self.output), "a folder")

    @property
    def folder(self) -> str:
        """Where the answers go."""
        return self.output


@dataclass(frozen=True)
class PreferencesConfig:
    """Preferences: a model answers each prompt several times, and a scorer says which answer is better."""

    model: ModelPaths = field(default_factory=ModelPaths)
    data: PromptData = field(default_factory=PromptData)
    rollout: RolloutConfig = field(default_factory=lambda: RolloutConfig(samples_per_prompt=4))
    reward: ShapedReward = field(default_factory=ShapedReward)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    run: PreferencesRun = field(default_factory=PreferencesRun)

    @property
    def lora(self) -> LoRAConfig:
        """Nothing is trained."""
        return LoRAConfig()

    def check(self, world: int) -> int:
        """As `ScriptConfig.check`."""
        dp = check_given(self.model, self.data, self.parallel, world, "prompts")
        self.reward.check_given()
        samples, pairs = self.rollout.samples_per_prompt, self.run.pairs
        if samples < 2 * pairs:
            raise ValueError(
                f"rollout.samples_per_prompt={samples}: run.pairs={pairs} needs {2 * pairs} responses at least"
            )
        return dp


@dataclass(frozen=True)
class RLHFRun(FolderConfig):
    """Run: folder for the report and for a folder a stage, logs, seed, time limits."""

    log: tuple[Literal["tensorboard", "wandb"], ...] = ("tensorboard",)
    """where metrics go beside the JSONL files"""
    seed: int = 0
    """seeds every stage, and the choice of the prompts that are held out"""
    show: int = 8
    """held-out prompts whose answers before and after stand in the report; the first ones, whatever they are"""
    timeout: float = 1800.0
    """seconds that a rank may keep the others waiting before the run ends and the late rank is named"""
    grace: float = 15.0
    """seconds after a request to stop in which the step at hand may still end; one that will not is dropped"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_seconds(self.timeout, self.grace)
        for name in ("seed", "show"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")


@dataclass(frozen=True)
class RLHFConfig:
    """RLHF from a model to an aligned one: fine-tuning, preferences, reward model, PPO, and a report of all of it.

    Where defaults come from: [P] PPO, [I] InstructGPT, [D] dual clip, [Z] Ziegler et al., [O] OpenRLHF, [V] verl,
    [T] TRL.
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
        for stage, names in FILLED.items():
            section = getattr(self, stage)
            given, own = flatten(section), flatten(type(section)())
            for name in (*OF_EVERY_STAGE, *names):
                for option in (option for option in own if option == name or option.startswith(f"{name}.")):
                    if given[option] != own[option]:
                        raise ValueError(
                            f"{stage}.{option}={given[option]}: the pipeline fills it in; {_instead(stage, name)}"
                        )
        dp = check_given(self.model, self.prompts, self.parallel, world, "prompts")
        root = Path(self.run.folder).resolve()
        reads = {"model.path": (self.model.path,), "prompts.sources": self.prompts.sources}
        reads |= {"sft.data.sources": self.sft.data.sources, "sft.data.eval_sources": self.sft.data.eval_sources}
        for option, paths in reads.items():
            for path in paths:
                if Path(path).resolve().is_relative_to(root):
                    raise ValueError(
                        f"{option}={path}: is within run.output={self.run.folder}, which a run writes anew"
                    )
        names = [Path(name).name for name in stages(self).ppo.reward.names]
        if len(set(names)) < len(names):
            raise ValueError(
                f"preferences.reward: {', '.join(names)}: scorers are told apart by the last part of their name"
            )
        for name, stage in stages(self)._asdict().items():
            try:
                stage.check(world)
            except ValueError as error:
                raise ValueError(f"[{name}] {error}") from None
        return dp


class Stages(NamedTuple):
    """Each stage's config with everything filled in, in the order they run."""

    sft: SFTConfig
    preferences: PreferencesConfig
    reward: RewardModelConfig
    ppo: PPOConfig
    evaluation: EvaluateConfig


PROMPTS = tuple(option.name for option in fields(PromptData))
SCORERS = tuple(option.name for option in fields(RewardConfig))
FILLED = {
    "sft": (),
    "preferences": tuple(f"data.{name}" for name in PROMPTS),
    "reward": ("data.sources", "data.eval_sources", "data.eval_fraction", "data.max_tokens", "steps"),
    "ppo": (
        *(f"data.{name}" for name in PROMPTS),
        *("model.critic", "reward.functions", "reward.models", "reward.servers", "reward.weights"),
    ),
    "evaluation": (
        *(f"data.{name}" for name in PROMPTS),
        *("model.against", "reward", "text", "dialogues", "passes"),
    ),
}
"""Knobs and sections of each stage that the pipeline fills in, besides those of every stage."""
OF_EVERY_STAGE = (
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
    """The files of the prompts that are learned from and of those held out."""
    folder = Path(config.run.folder) / "prompts"
    return str(folder / "train.jsonl"), str(folder / "held_out.jsonl")


def stages(config: RLHFConfig) -> Stages:
    """The config of each stage, tied to the stages before it."""
    root, dtype = Path(config.run.folder), config.model.dtype
    train, held_out = prompt_files(config)
    tuned, learned = str(root / "sft" / "model"), str(root / "reward" / "model")
    scorer = config.preferences.reward

    def prompts(data: Any, *sources: str) -> Any:
        shared = {name: getattr(config.prompts, name) for name in PROMPTS}
        return replace(data, **(shared | {"sources": sources, "reader": ""}))  # the pipeline wrote these files

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

    # The true reward is measured wherever the learned one is, and weighs nothing.
    by_both = {
        "functions": scorer.functions,
        "models": (learned, *scorer.models),
        "servers": scorer.servers,
        "weights": (0.0,) * len(scorer.functions) + (1.0,) + (0.0,) * (len(scorer.models) + len(scorer.servers)),
    }
    longest = config.prompts.max_prompt_tokens + config.preferences.rollout.max_new_tokens
    pairs = replace(
        config.reward.data,
        sources=(str(root / "preferences" / "train.jsonl"),),
        eval_sources=(str(root / "preferences" / "held_out.jsonl"),),
        max_tokens=longest,
    )
    return Stages(
        fill("sft", config.model.path),
        fill("preferences", tuned, data=prompts(config.preferences.data, train, held_out)),
        fill("reward", tuned, data=pairs),
        # The critic begins as the reward model [I].
        fill(
            "ppo",
            tuned,
            model={"critic": learned},
            data=prompts(config.ppo.data, train),
            reward=replace(config.ppo.reward, **by_both),
        ),
        fill(
            "evaluation",
            str(root / "ppo" / "model"),
            model={"against": tuned},
            data=prompts(config.evaluation.data, held_out),
            reward=RewardConfig(**({name: getattr(scorer, name) for name in SCORERS} | by_both)),  # not shaped
        ),
    )


def _instead(stage: str, name: str) -> str:
    """Where that is said."""
    if name in OF_EVERY_STAGE:
        section, _, option = name.partition(".")
        return f"give {name}" if option != "resume" else "--resume RUN goes on with all stages"
    if name.removeprefix("data.") in PROMPTS and stage != "reward":
        return f"give prompts.{name.removeprefix('data.')}"
    if name.startswith("reward") and stage == "evaluation":
        return "the rewards are those of preferences.reward and the one that is learned"
    if name.startswith("reward."):
        return "PPO's reward is the model that the stage before it trains"
    return "it is no choice here"
