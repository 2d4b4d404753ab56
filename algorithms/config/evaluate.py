"""Config of launch/evaluate.py: evaluation of a model, alone or against a baseline."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ...engine.config import ContentPath
from .common import ModelPaths, ParallelConfig, RolloutConfig, require, require_at_least
from .data import PromptData
from .pretrain import TextData
from .reward import RewardConfig
from .run import FolderConfig, check_world
from .sft import SFTData


@dataclass(frozen=True)
class EvaluatedModels(ModelPaths):
    """Model to evaluate."""

    path: ContentPath = ""
    """folder of the model in Hugging Face format, tokenizer included"""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """compute dtype"""
    baseline: ContentPath = ""
    """folder of a baseline model, evaluated alike; the win rate over it is reported (empty: none)"""


@dataclass(frozen=True)
class EvaluatedPrompts(PromptData):
    """Prompts."""

    limit: int = 0
    """number of prompts, chosen by run.seed (0: all)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 0, "limit")


@dataclass(frozen=True)
class EvaluatedText(TextData):
    """Documents for perplexity, packed into rows."""

    section = "text"


@dataclass(frozen=True)
class EvaluatedDialogues(SFTData):
    """Dialogues, or prompts with their responses, for perplexity."""

    section = "dialogues"


@dataclass(frozen=True)
class EvaluatedRollout(RolloutConfig):
    """Sampling of responses."""

    temperature: float = 1.0
    """sampling temperature (0: greedy)"""

    def __post_init__(self) -> None:
        require_at_least(self, 0, "temperature")
        values: dict[str, Any] = asdict(self) | {"temperature": self.temperature or 1.0}
        RolloutConfig(**values)  # the rest is as in training
        if not self.temperature and self.samples_per_prompt > 1:
            raise ValueError(f"samples_per_prompt={self.samples_per_prompt}: must be 1 with temperature=0 (greedy)")


@dataclass(frozen=True)
class MetricsConfig:
    """Metrics of the rewards."""

    pass_at_k: tuple[int, ...] = ()
    """k of pass@k, by the unbiased estimator of Chen et al. 2021"""
    pass_threshold: float = 0.5
    """minimum reward of a response that passes"""

    def __post_init__(self) -> None:
        require(all(k >= 1 for k in self.pass_at_k), "pass_at_k", self.pass_at_k, "at least 1 each")
        require(math.isfinite(self.pass_threshold), "pass_threshold", self.pass_threshold, "a finite number")


@dataclass(frozen=True)
class EvaluateRun(FolderConfig):
    """Run: folder, chunks, seed, timeout."""

    prompts_per_save: int = 256
    """prompts per chunk of responses and scores; finished chunks are skipped on restart"""
    micro_batch_size: int = 8
    """responses, dialogues or rows of text per forward pass of a DP rank"""
    show: int = 3
    """number of responses shown below the table"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "prompts_per_save", "micro_batch_size")
        require_at_least(self, 0, "show")


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluation: rewards of responses to prompts, pass@k, win rate, perplexity.

    Sources of defaults: [O] OpenRLHF, [V] verl, [T] TRL.
    """

    model: EvaluatedModels = field(default_factory=EvaluatedModels)
    data: EvaluatedPrompts = field(default_factory=EvaluatedPrompts)
    text: EvaluatedText = field(default_factory=EvaluatedText)
    dialogues: EvaluatedDialogues = field(default_factory=EvaluatedDialogues)
    rollout: EvaluatedRollout = field(default_factory=EvaluatedRollout)
    reward: RewardConfig = field(default_factory=RewardConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    run: EvaluateRun = field(default_factory=lambda: EvaluateRun(output="runs/evaluate"))

    def check(self, world: int) -> int:
        """As `ScriptConfig.check`."""
        if not self.model.path:
            raise ValueError("model.path is not given: the folder of the model to evaluate, in Hugging Face format")
        if not (self.data.sources or self.text.sources or self.dialogues.sources):
            raise ValueError("no data: give data.sources, text.sources, dialogues.sources or several")
        for data in (self.data, self.text, self.dialogues):
            names = ("probabilities", "eval_sources", "eval_fraction")
            for name in (name for name in names if getattr(data, name, None)):
                raise ValueError(f"{data.section}.{name}={getattr(data, name)}: every row is evaluated once")
            data.check_reader()
        baseline = self.model.baseline
        if baseline and Path(baseline).resolve() == Path(self.model.path).resolve():
            raise ValueError(f"model.baseline={baseline}: must be another model than model.path")
        samples, scored = self.rollout.samples_per_prompt, bool(self.data.sources and self.reward.names)
        if self.metrics.pass_at_k and not scored:
            raise ValueError(f"metrics.pass_at_k={self.metrics.pass_at_k}: needs data.sources and a reward")
        if any(k > samples for k in self.metrics.pass_at_k):
            raise ValueError(
                f"metrics.pass_at_k={self.metrics.pass_at_k}: at most rollout.samples_per_prompt={samples}"
            )
        if self.data.sources and baseline and not scored:
            raise ValueError(f"model.baseline={baseline}: the win rate needs a reward")
        return check_world(self.parallel, world)
