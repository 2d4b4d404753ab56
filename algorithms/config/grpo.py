"""The config of what learns from groups of answers without a critic: GRPO and kin.

Where a default comes from is said beside the knob: [G] GRPO (Shao et al. 2024), [R] RLOO (Ahmadian et al. 2024),
[A] DAPO (Yu et al. 2025), [S] GSPO (Zheng et al. 2025), [O] OpenRLHF, [V] verl, [T] TRL.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any, Literal

from ..advantages import GroupRule, KLKind
from ..losses.aggregation import Aggregation
from ..losses.policy import Correction, Level
from .common import (
    LoRAConfig,
    ModelPaths,
    OptimizerConfig,
    ParallelConfig,
    PromptData,
    RewardConfig,
    RolloutConfig,
    require,
)
from .convention import AS_PRESET, GroupConvention, changed, check_preset_number, is_preset
from .online import OnlineRunConfig, check_online
from .presets import Convention

Algorithm = Literal["grpo", "dr_grpo", "rloo", "reinforce++", "reinforce++_baseline", "dapo", "gspo", "cispo"]
KLPlace = Literal["off", "score", "reward", "advantage", "loss"]


@dataclass(frozen=True)
class Choices:
    """What one update does, every choice made."""

    group: GroupRule
    rules: Convention
    whiten: bool = False
    loss: Literal["clip", "cispo"] = "clip"
    level: Level = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    aggregation: Aggregation = "token-mean"
    constant: float = 1.0
    kl_in: KLPlace = "off"
    kl: KLKind = "k3"
    kl_coef: float = 0.0
    importance: Correction = "off"
    dynamic: bool = False
    overlong_buffer: int = 0

    @property
    def needs_reference(self) -> bool:
        """Whether anything is compared with the reference."""
        return self.kl_in != "off"

    @property
    def bounds(self) -> tuple[float, float]:
        """CISPO's bounds of the ratio itself."""
        if self.rules.cispo_bounds == "absolute":
            return self.clip_low, self.clip_high
        return 1 - self.clip_low, 1 + self.clip_high


RECIPES: dict[str, dict[str, Any]] = {
    "grpo": {"kl_in": "loss", "kl_coef": 0.04},
    "dr_grpo": {"baseline": "mean", "scale": "none", "aggregation": "constant"},
    "rloo": {"baseline": "others", "scale": "none", "kl": "k1", "kl_coef": 0.05, "importance": "off"},
    "reinforce++": {"baseline": "none", "scale": "none", "whiten": True, "kl": "k1", "kl_coef": 0.01},
    "reinforce++_baseline": {"baseline": "mean", "scale": "none", "whiten": True, "kl": "k1", "kl_coef": 0.01},
    "dapo": {"clip_high": 0.28, "aggregation": "token-mean", "dynamic": True},
    "gspo": {"level": "sequence", "clip_low": 3e-4, "clip_high": 4e-4, "aggregation": "sample-mean"},
    "cispo": {"loss": "cispo", "clip_low": 1.0, "clip_high": 4.0},
}  # fmt: skip
"""What each algorithm says; `recipe` adds what the convention says."""


def recipe(algorithm: Algorithm, rules: Convention) -> dict[str, Any]:
    """The choices of an algorithm, and the convention's where the algorithm leaves them open."""
    made = {"aggregation": rules.aggregation, "importance": rules.importance} | RECIPES[algorithm]
    if algorithm == "cispo" and rules.cispo_bounds == "absolute":
        made |= {"clip_low": 0.0, "clip_high": 5.0}
    if algorithm == "rloo":
        made |= {"kl_in": rules.rloo_kl, "level": rules.rloo_level}
        if rules.rloo_level == "sequence-sum":  # one loss an answer
            made |= {"aggregation": "sample-mean"}
    if algorithm == "reinforce++":
        made |= {"kl_in": rules.reinforce_kl}
    if algorithm == "reinforce++_baseline":
        made |= {"kl_in": rules.reinforce_baseline_kl}
    return made


@dataclass(frozen=True)
class GRPOOptions:
    """The algorithm, and each of its choices. -1 or "preset": as the algorithm says, or else convention.preset."""

    algorithm: Algorithm = "grpo"
    """sets every choice below that is not given"""
    baseline: Literal["preset", "mean", "others", "none"] = "preset"
    """what a reward is measured against: the mean of its group, that of the other answers, nothing"""
    scale: Literal["preset", "none", "unbiased", "population", "others", "batch"] = "preset"
    """deviation that advantages are divided by: of the group, of the other answers, of the whole batch"""
    whiten: Literal["preset", "on", "off"] = "preset"
    """advantages get mean 0 and deviation 1 over the response tokens of the global batch"""
    gamma: float = 1.0
    """discount of a token's reward seen from the tokens before it"""
    loss: Literal["preset", "clip", "cispo"] = "preset"
    """clipped surrogate, or CISPO's clipped weight times log π"""
    level: Literal["preset", "token", "sequence", "sequence-sum"] = "preset"
    """of the ratio: each token's, GSPO's geometric mean over the answer, or the whole answer's [T: RLOO]"""
    clip_low: float = AS_PRESET
    """the ratio is clipped below 1 - clip_low (0.2; GSPO 3e-4 [S]; CISPO 1, which is no bound)"""
    clip_high: float = AS_PRESET
    """the ratio is clipped above 1 + clip_high (0.2; DAPO 0.28 [A]; GSPO 4e-4 [S]; CISPO 4)"""
    dual_clip: float = AS_PRESET
    """bounds the loss of a negative advantage at this many times it, token ratios only (0: off)"""
    aggregation: Literal[
        "preset", "token-mean", "token-sum", "sample-mean", "sample-sum", "constant", "sum-of-sample-means"
    ] = "preset"
    """how per-token losses become one; constant is Dr. GRPO's sum over (samples x constant)"""
    constant: int = 0
    """tokens a sample counts for under aggregation constant (0: rollout.max_new_tokens)"""
    kl_in: Literal["preset", "off", "score", "reward", "advantage", "loss"] = "preset"
    """where the KL to the reference goes: an answer's score before the baseline [R], token rewards, whose returns
    gather that of later tokens [O], each token's own advantage, the loss [G]"""
    kl: Literal["preset", "k1", "k2", "k3", "abs", "k1+", "k3+"] = "preset"
    """its estimator; k1+ and k3+ have the gradient of k2"""
    kl_coef: float = AS_PRESET
    """its weight (GRPO 0.04 [G], RLOO 0.05 [T], REINFORCE++ 0.01 [O])"""
    importance: Literal[
        "preset", "off", "tis", "icepop", "sequence-tis", "sequence-icepop", "sequence-mask", "geometric-mask"
    ] = "preset"
    """weights by the ratio of actor to sampler: tis holds them within bounds, icepop drops what is outside them; of
    tokens or whole answers, or answers outside are masked and tokens keep their own"""
    importance_low: float = AS_PRESET
    """least ratio"""
    importance_high: float = AS_PRESET
    """largest ratio"""
    entropy_coef: float = 0.0
    """entropy bonus"""
    dynamic: Literal["preset", "on", "off"] = "preset"
    """groups whose rewards are all equal are set aside and further prompts drawn [A]"""
    max_draws: int = 4
    """times prompts are drawn in a step before groups without spread fill up the batch"""
    overlong_buffer: int = -1
    """last tokens before max_new_tokens in which an answer's penalty grows (0: off; -1: a fifth under DAPO [A])"""
    overlong_penalty: float = 1.0
    """penalty at max_new_tokens [A]"""
    epochs: int = 1
    """passes over each batch"""
    minibatches: int = 1
    """optimizer steps a pass: the batch is cut into this many equal parts, groups too"""
    micro_batch_size: int = 8
    """samples in one forward and backward of a data-parallel rank; changes speed and memory only"""
    micro_batch_tokens: int = 0
    """instead of a number of samples, at most this many tokens a micro-batch (0: by samples)"""
    ema_decay: float = 0.0
    """keeps an exponential moving average of the weights and exports it too (0: off)"""

    def __post_init__(self) -> None:
        require(0 <= self.gamma <= 1, "gamma", self.gamma, "from 0 to 1")
        for name in ("clip_low", "clip_high"):
            check_preset_number(self, name, 0 <= getattr(self, name) < math.inf, "0 or more")
        check_preset_number(
            self, "dual_clip", self.dual_clip == 0 or 1 < self.dual_clip < math.inf, "0 (off) or above 1"
        )
        for name in ("kl_coef", "importance_low"):
            check_preset_number(self, name, 0 <= getattr(self, name) < math.inf, "0 or more")
        check_preset_number(self, "importance_high", 0 < self.importance_high, "above 0")
        check_preset_number(self, "overlong_buffer", self.overlong_buffer >= 0, "0 (off) or more")
        require(math.isfinite(self.entropy_coef), "entropy_coef", self.entropy_coef, "a finite number")
        require(0 <= self.overlong_penalty < math.inf, "overlong_penalty", self.overlong_penalty, "0 or more")
        for name in ("max_draws", "epochs", "minibatches", "micro_batch_size"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("constant", "micro_batch_tokens"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "0 (off) or more")
        require(0 <= self.ema_decay < 1, "ema_decay", self.ema_decay, "0 (off) or more and below 1")


@dataclass(frozen=True)
class GRPORollout(RolloutConfig):
    """How the actor answers."""

    samples_per_prompt: int = 8
    """answers to each prompt: a group"""


@dataclass(frozen=True)
class GRPORun(OnlineRunConfig):
    """The run itself."""

    output: str = "runs/grpo"
    """folder for logs, checkpoints and the exported model"""
    prompts_per_step: int = 32
    """prompts of a step, over all ranks: the global batch is this many times rollout.samples_per_prompt"""


@dataclass(frozen=True)
class GRPOConfig:
    """Policy gradients from groups of answers, without a critic: GRPO, Dr. GRPO, RLOO, REINFORCE++, DAPO, GSPO, CISPO.

    Where defaults come from: [G] GRPO, [R] RLOO, [A] DAPO, [S] GSPO, [O] OpenRLHF, [V] verl, [T] TRL.
    """

    model: ModelPaths = field(default_factory=ModelPaths)
    data: PromptData = field(default_factory=PromptData)
    rollout: GRPORollout = field(default_factory=GRPORollout)
    reward: RewardConfig = field(default_factory=RewardConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    grpo: GRPOOptions = field(default_factory=GRPOOptions)
    convention: GroupConvention = field(default_factory=GroupConvention)
    run: GRPORun = field(default_factory=GRPORun)

    @property
    def batch_size(self) -> int:
        """Samples of a step over all ranks."""
        return self.run.prompts_per_step * self.rollout.samples_per_prompt

    @property
    def rules(self) -> Convention:
        """Every choice where trainers differ: the preset's, or the knob's that is given."""
        knobs = self.grpo
        return self.convention.resolved(
            reward_clip=self.reward.clip,
            dual_clip=knobs.dual_clip,
            importance_low=knobs.importance_low,
            importance_high=knobs.importance_high,
        )

    @property
    def choices(self) -> Choices:
        """Every choice made: the knob's that is given, else the algorithm's, else the convention's."""
        knobs, limit, rules = self.grpo, self.rollout.max_new_tokens, self.rules
        says = recipe(knobs.algorithm, rules)
        group = changed(rules.group, **{name: says.pop(name, "preset") for name in ("baseline", "scale")})
        group = changed(group, baseline=knobs.baseline, scale=knobs.scale)
        if group.baseline == "none":  # nothing is measured against siblings, so none are needed
            group = dataclasses.replace(group, alone="reward")
        made = Choices(group, rules, constant=float(limit), **says)
        return changed(
            made,
            **{
                name: "preset" if getattr(knobs, name) == "preset" else getattr(knobs, name) == "on"
                for name in SWITCHES
            },
            **{name: getattr(knobs, name) for name in PLAIN},
            constant=float(knobs.constant) if knobs.constant else "preset",
            overlong_buffer=(limit // 5 if knobs.algorithm == "dapo" else 0)
            if is_preset(knobs.overlong_buffer)
            else knobs.overlong_buffer,
        )


SWITCHES = ("whiten", "dynamic")
PLAIN = ("loss", "level", "clip_low", "clip_high", "aggregation", "kl_in", "kl", "kl_coef", "importance")


def check(config: GRPOConfig, world: int) -> int:
    """Cross-checks that need no model: what must be given, and the sizes that must divide.

    Returns:
        The size of the data axis.

    Raises:
        ValueError: naming the knobs and numbers that do not fit.
    """
    dp = check_online(config, world, "grpo", config.grpo)
    choices, answers = config.choices, config.rollout.samples_per_prompt
    if answers < 2 and choices.group.baseline != "none":
        raise ValueError(
            f"rollout.samples_per_prompt={answers}: grpo.algorithm={config.grpo.algorithm} measures an answer against"
            " its siblings, 2 answers at least"
        )
    if answers < 2 and choices.dynamic:
        raise ValueError(f"rollout.samples_per_prompt={answers}: grpo.dynamic needs groups, 2 answers at least")
    if choices.loss == "clip" and choices.clip_low >= 1:
        raise ValueError(f"grpo.clip_low={choices.clip_low}: must be below 1 for grpo.loss=clip")
    if choices.loss == "cispo" and choices.bounds[0] >= choices.bounds[1]:
        raise ValueError(f"grpo.clip_low and clip_high: CISPO's bounds {choices.bounds} leave no ratio between them")
    if choices.rules.importance_low > choices.rules.importance_high:
        raise ValueError(
            f"grpo.importance_low={choices.rules.importance_low} is above"
            f" importance_high={choices.rules.importance_high}"
        )
    if choices.overlong_buffer > config.rollout.max_new_tokens:
        raise ValueError(
            f"grpo.overlong_buffer={choices.overlong_buffer} is more than"
            f" rollout.max_new_tokens={config.rollout.max_new_tokens}"
        )
    return dp
