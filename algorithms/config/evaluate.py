"""Config of launch/evaluate.py: measurements of one model, or of two side by side."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ...engine.config import ContentPath
from ...engine.mesh import check_layout
from .common import ModelPaths, ParallelConfig, RolloutConfig, require
from .data import PromptData
from .pretrain import TextData
from .reward import RewardConfig
from .run import FolderConfig, require_seconds
from .sft import SFTData


@dataclass(frozen=True)
class EvaluatedModels(ModelPaths):
    """Model to evaluate."""

    path: ContentPath = ""
    """folder in Hugging Face format, tokenizer included"""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """compute type"""
    against: ContentPath = ""
    """folder of a second model, measured likewise; the first one's wins over it are counted ("": none)"""


@dataclass(frozen=True)
class EvaluatedPrompts(PromptData):
    """Prompts that are answered."""

    limit: int = 0
    """answer this many of them, chosen by the seed (0: all)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.limit >= 0, "limit", self.limit, "0 (all) or more")
        require(not self.probabilities, "probabilities", repr(self.probabilities), "empty: each prompt is met once")


@dataclass(frozen=True)
class EvaluatedText(TextData):
    """Text whose perplexity is measured, and how it is cut and packed."""

    section = "text"


@dataclass(frozen=True)
class EvaluatedDialogues(SFTData):
    """Dialogues, or prompts with their responses, whose perplexity is measured."""

    section = "dialogues"


@dataclass(frozen=True)
class EvaluatedRollout(RolloutConfig):
    """How prompts are answered."""

    temperature: float = 1.0
    """divides the logits when a token is drawn (0: the likeliest token)"""

    def __post_init__(self) -> None:
        require(0 <= self.temperature < math.inf, "temperature", self.temperature, "0 (greedy) or more")
        values: dict[str, Any] = asdict(self) | {"temperature": self.temperature or 1.0}
        RolloutConfig(**values)  # the rest is as in training
        if not self.temperature and self.samples_per_prompt > 1:
            raise ValueError(f"samples_per_prompt={self.samples_per_prompt}: at temperature=0 all are the same answer")


@dataclass(frozen=True)
class PassConfig:
    """When an answer passes."""

    at: tuple[int, ...] = ()
    """k of pass@k: the chance that one of k answers passes, by the unbiased estimator of Chen et al. 2021"""
    threshold: float = 0.5
    """an answer passes whose reward is at least this"""

    def __post_init__(self) -> None:
        require(all(k >= 1 for k in self.at), "at", self.at, "at least 1 each")
        require(math.isfinite(self.threshold), "threshold", self.threshold, "a finite number")


@dataclass(frozen=True)
class EvaluateRun(FolderConfig):
    """Run: folder, chunks, seed, time limit."""

    prompts_per_save: int = 256
    """prompts that are answered and scored at once; their answers are then kept, should the run be stopped"""
    micro_batch_size: int = 8
    """answers, dialogues or rows of text that a data-parallel rank scores at once"""
    show: int = 3
    """answers that are shown beneath the table"""
    seed: int = 0
    """seeds sampling and the choice of prompts"""
    timeout: float = 1800.0
    """seconds that a rank may keep the others waiting before the run ends and the late rank is named"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_seconds(self.timeout)
        for name in ("prompts_per_save", "micro_batch_size"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("show", "seed"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 or more")


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluation: answers to a set of prompts scored by any reward, pass@k, win rate, perplexity.

    Where defaults come from: [O] OpenRLHF, [V] verl, [T] TRL.
    """

    model: EvaluatedModels = field(default_factory=EvaluatedModels)
    data: EvaluatedPrompts = field(default_factory=EvaluatedPrompts)
    text: EvaluatedText = field(default_factory=EvaluatedText)
    dialogues: EvaluatedDialogues = field(default_factory=EvaluatedDialogues)
    rollout: EvaluatedRollout = field(default_factory=EvaluatedRollout)
    reward: RewardConfig = field(default_factory=RewardConfig)
    passes: PassConfig = field(default_factory=PassConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    run: EvaluateRun = field(default_factory=lambda: EvaluateRun(output="runs/evaluate"))

    def check(self, world: int) -> int:
        """As `ScriptConfig.check`."""
        if not self.model.path:
            raise ValueError("model.path is not given: the folder of the model to evaluate, in Hugging Face format")
        if not (self.data.sources or self.text.sources or self.dialogues.sources):
            raise ValueError("nothing to measure on: give data.sources, text.sources, dialogues.sources or several")
        for section in ("text", "dialogues"):
            data = getattr(self, section)
            if data.probabilities:
                raise ValueError(
                    f"{section}.probabilities={data.probabilities!r}: each row of {section}.sources is met once"
                )
            if data.eval_sources or data.eval_fraction:
                raise ValueError(
                    f"{section}.eval_sources and {section}.eval_fraction: all of {section}.sources is measured"
                )
        for data in (self.data, self.text, self.dialogues):
            data.check_reader()
        if self.model.against and Path(self.model.against).resolve() == Path(self.model.path).resolve():
            raise ValueError(
                f"model.against={self.model.against}: is model.path itself, and a model wins nothing over it"
            )
        samples, scored = self.rollout.samples_per_prompt, bool(self.data.sources and self.reward.names)
        if self.passes.at and not scored:
            raise ValueError(f"passes.at={self.passes.at}: needs data.sources and a reward that says what passes")
        if any(k > samples for k in self.passes.at):
            raise ValueError(f"passes.at={self.passes.at}: at most rollout.samples_per_prompt={samples}")
        if self.data.sources and self.model.against and not scored:
            raise ValueError(f"model.against={self.model.against}: wins are counted by a reward, and none is given")
        parallel = self.parallel
        return check_layout(world, tp=parallel.tp, pp=parallel.pp, dp=parallel.dp or None, ep=parallel.ep)
