"""Configs of scripts that learn from preferences: reward models, DPO and variants, KTO."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from ...engine.config import ContentPath
from ..losses.preference import PairLoss
from .common import ModelPaths, OptimizerConfig, require, require_at_least
from .data import ResponseData, RowData
from .run import EpochRun
from .supervised import SupervisedConfig


@dataclass(frozen=True)
class PairData(ResponseData):
    """Pairs of responses: prompt, chosen and rejected, or two dialogues. max_tokens is of each, prompt included."""

    row_samples = 2

    prompt_key: str = "prompt"
    """column of the prompt, a string or messages; not needed if the next two are whole dialogues"""
    chosen_key: str = "chosen"
    """column of the chosen response: a string, or a dialogue that ends with it"""
    rejected_key: str = "rejected"
    """column of the rejected response"""
    margin_key: str = ""
    """column of the margin between chosen and rejected, 0 or more (empty: no margins)"""


@dataclass(frozen=True)
class LabelData(ResponseData):
    """Responses with a binary label each."""

    prompt_key: str = "prompt"
    """column of the prompt, a string or messages; not needed if response_key is a whole dialogue"""
    response_key: str = "response"
    """column of the response: a string, or a dialogue that ends with it"""
    label_key: str = "label"
    """column of the label, true if the response is desirable"""


@dataclass(frozen=True)
class StepData(RowData):
    """Responses in steps with a label each, for a process reward model."""

    section = "steps"

    prompt_key: str = "prompt"
    """column of the prompt"""
    steps_key: str = "steps"
    """column of the list of a response's steps"""
    labels_key: str = "labels"
    """column of the list of labels, true or false for each step"""
    separator: str = "\n\n"
    """text after each step; a step's score is read at its last token"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(bool(self.separator), "separator", repr(self.separator), "a text")


@dataclass(frozen=True)
class RewardLoss:
    """Loss of a reward model."""

    center_coef: float = 0.0
    """weight of (r_chosen + r_rejected)², which keeps rewards near 0 (0: off) [T]"""

    def __post_init__(self) -> None:
        require_at_least(self, 0, "center_coef")


@dataclass(frozen=True)
class RewardModelConfig(SupervisedConfig):
    """Reward model: a scalar head trained on pairs of responses (Bradley-Terry), or on labeled steps (process reward).

    Sources of defaults: [O] OpenRLHF, [V] verl, [T] TRL.
    """

    noun = "pairs, or of steps in steps.sources"

    data: PairData = field(default_factory=PairData)
    run: EpochRun = field(default_factory=lambda: EpochRun(output="runs/reward"))
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=9e-6))
    steps: StepData = field(default_factory=StepData)
    """labeled steps in place of pairs, if steps.sources are given"""
    loss: RewardLoss = field(default_factory=RewardLoss)

    @property
    def rows(self) -> PairData | StepData:
        """Pairs, or steps if they are given."""
        return self.steps if self.steps.sources else self.data

    def check(self, world: int) -> int:
        """As `ScriptConfig.check`."""
        if self.data.sources and self.steps.sources:
            raise ValueError("data.sources and steps.sources: a reward model learns from pairs or from steps, not both")
        return super().check(world)


@dataclass(frozen=True)
class DPOModels(ModelPaths):
    """Policy to train, and its reference."""

    reference: ContentPath = ""
    """folder of the reference model (empty: the initial policy)"""


@dataclass(frozen=True)
class DPOLoss:
    """Loss of a pair."""

    kind: PairLoss = "dpo"
    """loss: dpo (cDPO with label_smoothing), ipo, robust, hinge (SLiC), exo, apo_zero, apo_down (docs/dpo.md)"""
    beta: float = 0.1
    """β: strength of the KL constraint to the reference [O, T]"""
    label_smoothing: float = 0.0
    """assumed fraction of pairs with flipped labels, for dpo (cDPO), robust and exo"""
    average_log_probs: bool = False
    """average a response's log-ratio over its tokens instead of summing [T: IPO]"""
    nll_coef: float = 0.0
    """weight of the NLL loss, -log π of the chosen response (0: off) [O]"""
    nll_average_log_probs: bool = True
    """average the NLL over the response's tokens instead of summing"""
    reference_free: bool = False
    """use a uniform reference: no reference model is computed"""

    def __post_init__(self) -> None:
        require(0 < self.beta < math.inf, "beta", self.beta, "above 0")
        require_at_least(self, 0, "nll_coef")
        require(0 <= self.label_smoothing < 0.5, "label_smoothing", self.label_smoothing, "0 or more and below 0.5")
        if self.label_smoothing and self.kind not in ("dpo", "robust", "exo"):
            raise ValueError(f"label_smoothing={self.label_smoothing}: must be 0 for kind={self.kind}")
        if self.kind == "exo" and not self.label_smoothing:
            raise ValueError("label_smoothing=0.0: must be above 0 for kind=exo (0.001 in its paper)")


@dataclass(frozen=True)
class DPOConfig(SupervisedConfig):
    """Direct preference optimization and variants: the policy learns from pairs, without a reward model.

    Sources of defaults: [O] OpenRLHF, [V] verl, [T] TRL.
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
            raise ValueError(f"model.reference={self.model.reference}: must be empty with loss.reference_free")
        return super().check(world)


@dataclass(frozen=True)
class KTOLoss:
    """Loss of a labeled response."""

    beta: float = 0.1
    """β: strength of the KL constraint to the reference [T]"""
    desirable_weight: float = 1.0
    """weight of desirable responses; (weight x count) of desirable to undesirable should be within 1 to 4/3 [T]"""
    undesirable_weight: float = 1.0
    """weight of undesirable responses"""

    def __post_init__(self) -> None:
        for name in ("beta", "desirable_weight", "undesirable_weight"):
            require(0 < getattr(self, name) < math.inf, name, getattr(self, name), "above 0")


@dataclass(frozen=True)
class KTOConfig(SupervisedConfig):
    """Kahneman-Tversky optimization: the policy learns from single responses labeled desirable or undesirable.

    Sources of defaults: [O] OpenRLHF, [V] verl, [T] TRL.
    """

    noun = "responses with labels"
    even = False

    model: DPOModels = field(default_factory=DPOModels)
    data: LabelData = field(default_factory=LabelData)
    run: EpochRun = field(default_factory=lambda: EpochRun(output="runs/kto"))
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=5e-7))
    loss: KTOLoss = field(default_factory=KTOLoss)
