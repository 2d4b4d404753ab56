"""The configs of what learns from preferences: reward models, DPO and its kin, KTO. [O] OpenRLHF, [T] TRL."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Literal

from ...engine.config import ContentPath
from ..losses.preference import PairLoss
from .common import (
    EpochRun,
    LoRAConfig,
    ModelPaths,
    OptimizerConfig,
    ParallelConfig,
    UpdateConfig,
    check_given,
    require,
)
from .convention import ConventionConfig
from .data import ResponseData, RowData


def _columns(data: object, *names: str) -> None:
    for name in names:
        require(bool(getattr(data, name)), name, repr(getattr(data, name)), "the name of a column")


@dataclass(frozen=True)
class PairData(ResponseData):
    """Pairs of answers: prompt, chosen and rejected, or two dialogues. max_tokens is of each, prompt included."""

    prompt_key: str = "prompt"
    """column with the prompt, a string or messages; the next two may be whole dialogues, which need none"""
    chosen_key: str = "chosen"
    """column with the better answer: a string, or a dialogue that ends with it"""
    rejected_key: str = "rejected"
    """column with the worse answer"""
    margin_key: str = ""
    """column that says by how much it is better, 0 or more ("": pairs have no margins)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        _columns(self, "prompt_key", "chosen_key", "rejected_key")


@dataclass(frozen=True)
class LabelData(ResponseData):
    """Answers with a label each."""

    prompt_key: str = "prompt"
    """column with the prompt, a string or messages; the next may be a whole dialogue, which needs none"""
    response_key: str = "response"
    """column that holds the answer: a string, or a dialogue that ends with it"""
    label_key: str = "label"
    """column that is true where the answer is wanted"""

    def __post_init__(self) -> None:
        super().__post_init__()
        _columns(self, "prompt_key", "response_key", "label_key")


@dataclass(frozen=True)
class StepData(RowData):
    """Answers in steps with a label each, for a process reward model."""

    section = "steps"

    prompt_key: str = "prompt"
    """column that holds the prompt"""
    steps_key: str = "steps"
    """column with the list of an answer's steps"""
    labels_key: str = "labels"
    """column with a true or false for each step"""
    separator: str = "\n\n"
    """what stands between steps; the score is read at its last token"""

    def __post_init__(self) -> None:
        super().__post_init__()
        _columns(self, "prompt_key", "steps_key", "labels_key", "separator")


@dataclass(frozen=True)
class RewardRun(EpochRun):
    """The run itself."""

    output: str = "runs/reward"
    """folder for logs, checkpoints and the exported model"""


@dataclass(frozen=True)
class RewardLoss:
    """What a reward model learns."""

    centering: float = 0.0
    """weight of (r_chosen + r_rejected)², which keeps rewards near 0 (0: off) [T]"""

    def __post_init__(self) -> None:
        require(0 <= self.centering < math.inf, "centering", self.centering, "0 (off) or more")


@dataclass(frozen=True)
class RewardModelConfig:
    """A reward model: a scalar head that tells the better of two answers (Bradley-Terry), or right steps from wrong.

    Where defaults come from: [O] OpenRLHF, [V] verl, [T] TRL.
    """

    model: ModelPaths = field(default_factory=ModelPaths)
    data: PairData = field(default_factory=PairData)
    steps: StepData = field(default_factory=StepData)
    """rows of labeled steps instead of pairs, where steps.sources are given"""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=9e-6))
    update: UpdateConfig = field(default_factory=UpdateConfig)
    loss: RewardLoss = field(default_factory=RewardLoss)
    run: RewardRun = field(default_factory=RewardRun)

    @property
    def rows(self) -> PairData | StepData:
        """What is read: pairs or steps."""
        return self.steps if self.steps.sources else self.data


def check_reward(config: RewardModelConfig, world: int) -> int:
    """Cross-checks that need no model; returns the size of the data axis. ValueError names the knobs."""
    if config.data.sources and config.steps.sources:
        raise ValueError("data.sources and steps.sources: a reward model learns from pairs or from steps, not both")
    dp = check_given(config.model, config.rows, config.parallel, world, rows="pairs, or of steps in steps.sources")
    if config.rows is config.data:
        config.update.check(dp, 2 * config.data.max_tokens, "2 × data.max_tokens")
    else:
        config.update.check(dp, config.steps.max_tokens, "steps.max_tokens")
    return dp


@dataclass(frozen=True)
class DPOModels(ModelPaths):
    """The policy, and what it is compared with."""

    reference: ContentPath = ""
    """folder of the reference ("": the policy as it is before the first step)"""


@dataclass(frozen=True)
class DPOLoss:
    """The loss of a pair."""

    kind: PairLoss = "dpo"
    """dpo with label_smoothing is cDPO; ipo is IPO; robust, hinge, exo, apo_zero, apo_down as their papers have them"""
    beta: float = 0.1
    """how strongly the policy is held to the reference [O, T]"""
    label_smoothing: float = 0.0
    """share of pairs thought to be labeled the wrong way round, for dpo (cDPO), robust and exo"""
    average: Literal["preset", "sum", "mean"] = "preset"
    """an answer's log-ratio is the sum over its tokens or their mean; preset: a sum, but IPO's as convention.preset"""
    nll_coef: float = 0.0
    """weight of -log π of the chosen answer (0: off) [O]"""
    nll_average: Literal["preset", "sum", "mean"] = "preset"
    """that is the sum over its tokens or their mean; preset: as convention.preset"""
    reference_free: bool = False
    """the reference counts as uniform: none is computed"""

    def __post_init__(self) -> None:
        require(0 < self.beta < math.inf, "beta", self.beta, "above 0")
        require(0 <= self.nll_coef < math.inf, "nll_coef", self.nll_coef, "0 (off) or more")
        require(0 <= self.label_smoothing < 0.5, "label_smoothing", self.label_smoothing, "0 or more and below 0.5")
        if self.label_smoothing and self.kind not in ("dpo", "robust", "exo"):
            raise ValueError(f"label_smoothing={self.label_smoothing}: {self.kind} has none; dpo, robust and exo do")
        if self.kind == "exo" and not self.label_smoothing:
            raise ValueError("label_smoothing=0: exo needs a number above 0, its paper takes 0.001")

    def made(self, convention: ConventionConfig) -> DPOLoss:
        """The loss with every choice made: the knob's that is given, else the preset's."""
        rules = convention.resolved()
        preset = {"average": rules.ipo if self.kind == "ipo" else "sum", "nll_average": rules.nll}
        return replace(self, **{name: made for name, made in preset.items() if getattr(self, name) == "preset"})


@dataclass(frozen=True)
class DPORun(EpochRun):
    """The run itself."""

    output: str = "runs/dpo"
    """folder for logs, checkpoints and the exported model"""


@dataclass(frozen=True)
class DPOConfig:
    """Direct preference optimization and its kin: the policy learns from pairs, without a reward model.

    Where defaults come from: [O] OpenRLHF, [V] verl, [T] TRL.
    """

    model: DPOModels = field(default_factory=DPOModels)
    data: PairData = field(default_factory=PairData)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=5e-7))
    update: UpdateConfig = field(default_factory=UpdateConfig)
    loss: DPOLoss = field(default_factory=DPOLoss)
    convention: ConventionConfig = field(default_factory=ConventionConfig)
    run: DPORun = field(default_factory=DPORun)

    @property
    def pair_loss(self) -> DPOLoss:
        """The loss with every choice made."""
        return self.loss.made(self.convention)


def check_dpo(config: DPOConfig, world: int) -> int:
    """Cross-checks that need no model; returns the size of the data axis. ValueError names the knobs."""
    if config.loss.reference_free and config.model.reference:
        raise ValueError(f"model.reference={config.model.reference}: loss.reference_free asks for none")
    dp = check_given(config.model, config.data, config.parallel, world, rows="pairs")
    config.update.check(dp, 2 * config.data.max_tokens, "2 × data.max_tokens")
    return dp


@dataclass(frozen=True)
class KTOLoss:
    """The loss of an answer."""

    beta: float = 0.1
    """how strongly the policy is held to the reference [T]"""
    desirable_weight: float = 1.0
    """weight of wanted answers; with unequal numbers, keep weight × number of the two kinds within 1 to 4/3 [T]"""
    undesirable_weight: float = 1.0
    """weight of unwanted answers"""

    def __post_init__(self) -> None:
        require(0 < self.beta < math.inf, "beta", self.beta, "above 0")
        for name in ("desirable_weight", "undesirable_weight"):
            require(0 < getattr(self, name) < math.inf, name, getattr(self, name), "above 0")


@dataclass(frozen=True)
class KTORun(EpochRun):
    """The run itself."""

    output: str = "runs/kto"
    """folder for logs, checkpoints and the exported model"""


@dataclass(frozen=True)
class KTOConfig:
    """Kahneman-Tversky optimization: the policy learns from answers that are wanted or not, no pairs needed.

    Where defaults come from: [O] OpenRLHF, [V] verl, [T] TRL.
    """

    model: DPOModels = field(default_factory=DPOModels)
    data: LabelData = field(default_factory=LabelData)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=5e-7))
    update: UpdateConfig = field(default_factory=UpdateConfig)
    loss: KTOLoss = field(default_factory=KTOLoss)
    run: KTORun = field(default_factory=KTORun)


def check_kto(config: KTOConfig, world: int) -> int:
    """Cross-checks that need no model; returns the size of the data axis. ValueError names the knobs."""
    dp = check_given(config.model, config.data, config.parallel, world, rows="answers with labels")
    config.update.check(dp, config.data.max_tokens, "data.max_tokens", even=False)
    return dp
