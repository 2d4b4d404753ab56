"""Configs of scripts that learn from preferences: reward models, DPO and its kin, KTO. [O] OpenRLHF, [T] TRL."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ...engine.config import ContentPath
from ..losses.preference import PairLoss
from .common import ModelPaths, OptimizerConfig, require
from .data import ResponseData, RowData
from .run import EpochRun
from .supervised import SupervisedConfig


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
class RewardLoss:
    """Loss of a reward model."""

    center_coef: float = 0.0
    """weight of (r_chosen + r_rejected)², which keeps rewards near 0 (0: off) [T]"""

    def __post_init__(self) -> None:
        require(0 <= self.center_coef < math.inf, "center_coef", self.center_coef, "0 (off) or more")


@dataclass(frozen=True)
class RewardModelConfig(SupervisedConfig):
    """A reward model: a scalar head that ranks two responses (Bradley-Terry), or labels steps as right or wrong.

    Where defaults come from: [O] OpenRLHF, [V] verl, [T] TRL.
    """

    noun = "pairs, or of steps in steps.sources"

    data: PairData = field(default_factory=PairData)
    run: EpochRun = field(default_factory=lambda: EpochRun(output="runs/reward"))
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=9e-6))
    steps: StepData = field(default_factory=StepData)
    """rows of labeled steps instead of pairs, where steps.sources are given"""
    loss: RewardLoss = field(default_factory=RewardLoss)

    @property
    def rows(self) -> PairData | StepData:
        """Pairs, or steps where they are given."""
        return self.steps if self.steps.sources else self.data

    def check(self, world: int) -> int:
        """As `ScriptConfig.check`."""
        if self.data.sources and self.steps.sources:
            raise ValueError("data.sources and steps.sources: a reward model learns from pairs or from steps, not both")
        dp = super().check(world)
        if self.rows is self.data:
            self.update.check(dp, 2 * self.data.max_tokens, "2 × data.max_tokens")
        else:
            self.update.check(dp, self.steps.max_tokens, "steps.max_tokens")
        return dp


@dataclass(frozen=True)
class DPOModels(ModelPaths):
    """Policy to train, and its reference."""

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
    average_log_probs: bool = False
    """a response's log-ratio is the mean over its tokens instead of their sum [T: IPO]"""
    nll_coef: float = 0.0
    """weight of -log π of the chosen response (0: off) [O]"""
    nll_average_log_probs: bool = True
    """that is the mean over its tokens instead of their sum"""
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


@dataclass(frozen=True)
class DPOConfig(SupervisedConfig):
    """Direct preference optimization and its kin: the policy learns from pairs, without a reward model.

    Where defaults come from: [O] OpenRLHF, [V] verl, [T] TRL.
    """

    noun = "pairs"

    model: DPOModels = field(default_factory=DPOModels)
    data: PairData = field(default_factory=PairData)
    run: EpochRun = field(default_factory=lambda: EpochRun(output="runs/dpo"))
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=5e-7))
    loss: DPOLoss = field(default_factory=DPOLoss)

    def check(self, world: int) -> int:
        """As `ScriptConfig.check`."""
        if self.loss.reference_free and self.model.reference:
            raise ValueError(f"model.reference={self.model.reference}: loss.reference_free asks for none")
        dp = super().check(world)
        self.update.check(dp, 2 * self.data.max_tokens, "2 × data.max_tokens")
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
class KTOConfig(SupervisedConfig):
    """Kahneman-Tversky optimization: the policy learns from responses labeled good or bad, no pairs needed.

    Where defaults come from: [O] OpenRLHF, [V] verl, [T] TRL.
    """

    noun = "responses with labels"

    model: DPOModels = field(default_factory=DPOModels)
    data: LabelData = field(default_factory=LabelData)
    run: EpochRun = field(default_factory=lambda: EpochRun(output="runs/kto"))
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=5e-7))
    loss: KTOLoss = field(default_factory=KTOLoss)

    def check(self, world: int) -> int:
        """As `ScriptConfig.check`."""
        dp = super().check(world)
        self.update.check(dp, self.data.max_tokens, "data.max_tokens", even=False)
        return dp
