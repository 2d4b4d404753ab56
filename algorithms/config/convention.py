"""The `convention` section: whose choices are made where trainers in wide use differ, and a knob for each of them.

One rule for all such knobs, here and in other sections (`ppo.lam`, `actor.dual_clip`, `critic.value_clip`,
`loss.average`, several of `grpo`): -1, or the word "preset", means what `convention.preset` says; a given value wins.
A script's section has the knobs that act in it.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Literal

from ..advantages import KLRule
from .common import require
from .presets import ALL_KINDS, PRESETS, Convention, ConventionName

AS_PRESET = -1.0
"""What a number says that leaves the choice to the preset."""

Switch = Literal["preset", "on", "off"]


def check_preset_number(config: Any, name: str, holds: bool, allowed: str) -> None:
    """Refuses a number of `config` that is neither -1 nor allowed."""
    value = getattr(config, name)
    require(value == AS_PRESET or holds, name, value, f"{allowed}, or -1 (as convention.preset says)")


def changed(base: Any, **choices: Any) -> Any:
    """A frozen dataclass with the choices that are made; -1 and "preset" leave what is there."""
    return dataclasses.replace(base, **{name: value for name, value in choices.items() if not is_preset(value)})


def is_preset(value: Any) -> bool:
    """Whether a knob leaves its choice to the preset."""
    return isinstance(value, int | float | str) and value in (AS_PRESET, "preset")


@dataclass(frozen=True)
class ConventionConfig:
    """Whose choices are made where trainers differ. -1 or "preset": as the preset says; a given value wins."""

    preset: ConventionName = "trialign"
    """whose choices: ours, or those of OpenRLHF, TRL, verl, NeMo-RL, slime"""

    def resolved(self, **elsewhere: Any) -> Convention:
        """The preset with every given choice in its place.

        Args:
            elsewhere: fields of a Convention whose knobs are in other sections, under the same rule.
        """
        return changed(self.made(PRESETS[self.preset]), **elsewhere)

    def made(self, preset: Convention) -> Convention:
        """The preset with this section's choices."""
        return preset


@dataclass(frozen=True)
class PolicyConvention(ConventionConfig):
    """Whose choices are made where trainers differ. -1 or "preset": as the preset says; a given value wins."""

    kl_input_limit: float = AS_PRESET
    """limit of |log-ratio| in every KL estimator (0: none)"""
    kl_output_limit: float = AS_PRESET
    """limit of every KL estimate's size (0: none)"""
    reward_clip_at: Literal["preset", "score", "token"] = "preset"
    """where reward.clip acts: on an answer's score before baseline and penalty, or on what its last token is given"""
    gaps: Literal["preset", "carry", "zero"] = "preset"
    """what a token sees across tokens that are not the model's own: the next of its own, or reward and value 0"""
    whiten_variance: Literal["preset", "population", "unbiased"] = "preset"
    """of whitened advantages"""
    whiten_floor: Literal["preset", "clamp", "add"] = "preset"
    """whiten_eps is the least variance, or added to it"""
    whiten_eps: float = AS_PRESET
    """see whiten_floor"""
    log_ratio_limit: float = AS_PRESET
    """limit of |log π - log π_old| before the exponential, token ratios only (0: none)"""

    def __post_init__(self) -> None:
        for name in ("kl_input_limit", "kl_output_limit", "whiten_eps", "log_ratio_limit"):
            check_preset_number(self, name, 0 <= getattr(self, name) < math.inf, "0 or more")

    def made(self, preset: Convention) -> Convention:
        """The preset with this section's choices. A KL limit that is given holds for every estimator."""
        kl: KLRule = preset.kl
        for name, value in (("input_limit", self.kl_input_limit), ("output_limit", self.kl_output_limit)):
            if not is_preset(value):
                kl = dataclasses.replace(kl, clamped=ALL_KINDS, **{name: value})
        unbiased = "preset" if self.whiten_variance == "preset" else self.whiten_variance == "unbiased"
        rule = {"unbiased": unbiased, "floor": self.whiten_floor, "eps": self.whiten_eps}
        return changed(
            super().made(preset),
            kl=kl,
            reward_clip_at=self.reward_clip_at,
            gaps=self.gaps,
            whiten=changed(preset.whiten, **rule),
            whiten_returns=changed(preset.whiten_returns, **rule),
            log_ratio_limit=self.log_ratio_limit,
        )


@dataclass(frozen=True)
class PPOConvention(PolicyConvention):
    """Whose choices are made where trainers differ. -1 or "preset": as the preset says; a given value wins."""

    aggregation: Literal["preset", "token-mean", "token-sum", "sample-mean", "sample-sum", "sum-of-sample-means"] = (
        "preset"
    )
    """how per-token policy losses become one"""
    value_aggregation: Literal[
        "preset", "token-mean", "token-sum", "sample-mean", "sample-sum", "sum-of-sample-means"
    ] = "preset"
    """how per-token value losses become one"""
    value_loss_factor: float = AS_PRESET
    """of the critic's squared error"""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_preset_number(self, "value_loss_factor", 0 < self.value_loss_factor < math.inf, "above 0")

    def made(self, preset: Convention) -> Convention:
        """The preset with this section's choices."""
        return changed(
            super().made(preset),
            aggregation=self.aggregation,
            value_aggregation=self.value_aggregation,
            value_loss_factor=self.value_loss_factor,
        )


@dataclass(frozen=True)
class GroupConvention(PolicyConvention):
    """Whose choices are made where trainers differ. -1 or "preset": as the preset says; a given value wins."""

    kl_weighted: Switch = "preset"
    """a KL in the loss is weighted by the probability ratio, which makes its gradient that of the KL"""
    group_eps: float = AS_PRESET
    """added to the deviation of a group's rewards"""
    group_alone: Literal["preset", "zero", "reward"] = "preset"
    """advantage of an answer without siblings"""
    gspo_gradient: Literal["preset", "shared", "own"] = "preset"
    """of a sequence's ratio: through its mean, or to each token its own"""
    sequence_log_ratio_limit: float = AS_PRESET
    """the most a sequence's log-ratio may be before the exponential (0: no limit)"""
    cispo_bounds: Literal["preset", "relative", "absolute"] = "preset"
    """CISPO's clip_low and clip_high are distances from 1, or bounds of the ratio itself"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("group_eps", "sequence_log_ratio_limit"):
            check_preset_number(self, name, 0 <= getattr(self, name) < math.inf, "0 or more")

    def made(self, preset: Convention) -> Convention:
        """The preset with this section's choices."""
        made = super().made(preset)
        return changed(
            made,
            kl=changed(made.kl, weighted=_switch(self.kl_weighted)),
            group=changed(made.group, eps=self.group_eps, alone=self.group_alone),
            gspo_gradient=self.gspo_gradient,
            sequence_log_ratio_limit=self.sequence_log_ratio_limit,
            cispo_bounds=self.cispo_bounds,
        )


def _switch(choice: Switch) -> bool | str:
    return choice if choice == "preset" else choice == "on"
