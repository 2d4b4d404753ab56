"""The choices on which trainers in wide use differ, each named, and what each trainer chose.

`trialign` is what this project does where nothing else is asked. The other presets give the numbers of OpenRLHF 0.11,
TRL 1.10, verl 0.10, NeMo-RL and slime as of August 2026; tests/test_golden.py holds them to what those compute.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from .advantages import Gaps, GroupRule, KLRule, WhitenRule
from .segments import Aggregation

ConventionName = Literal["trialign", "openrlhf", "trl", "verl", "nemo", "slime"]
ALL_KINDS = ("k1", "k2", "k3", "abs")


@dataclass(frozen=True)
class Convention:
    """One set of choices. A 0 turns a limit off."""

    kl: KLRule = field(default_factory=KLRule)
    """limits of the KL estimators"""
    reward_clip: tuple[float, float] | None = None
    """of the score before it becomes a token's reward"""
    gaps: Gaps = "carry"
    """what GAE sees across tokens that are not the model's own, in a dialogue of several turns"""
    lam: float = 0.95
    """GAE's lambda"""
    gamma: float = 1.0
    """GAE's discount"""
    whiten: WhitenRule = field(default_factory=WhitenRule)
    """of advantages"""
    group: GroupRule = field(default_factory=GroupRule)
    """GRPO's baseline and deviation"""
    log_ratio_limit: float = 0.0
    """of |log pi - log pi_old| before the exponential"""
    dual_clip: float = 0.0
    """bound of the loss of negative advantages"""
    gspo_gradient: Literal["shared", "own"] = "shared"
    """through the sequence's mean, or to each token its own"""
    cispo_bounds: Literal["around one", "absolute"] = "around one"
    """what CISPO's numbers mean: 1 + high, or the ratio itself"""
    aggregation: Aggregation = "token-mean"
    """of per-token policy losses"""
    value_loss_factor: float = 0.5
    """of max((V - R)^2, clipped)"""
    value_clip: float = 0.2
    """of the value's change"""
    ipo: Literal["sum", "mean"] = "sum"
    """of an answer's log-ratio over its tokens"""
    importance_low: float = 0.0
    """least weight of an off-policy token"""
    importance_high: float = 2.0
    """largest weight of an off-policy token"""


PRESETS: dict[str, Convention] = {
    "trialign": Convention(),
    "openrlhf": Convention(
        kl=KLRule(ALL_KINDS, output_limit=10.0),
        reward_clip=(-10.0, 10.0),
        gaps="zero",
        lam=1.0,
        group=GroupRule(eps=1e-9),
        log_ratio_limit=20.0,
        value_clip=0.5,
        importance_low=0.5,
        importance_high=5.0,
    ),
    "trl": Convention(
        whiten=WhitenRule(unbiased=True, floor="add"),
        group=GroupRule(eps=1e-4),
        cispo_bounds="absolute",
        ipo="mean",
        importance_high=3.0,
    ),
    "verl": Convention(
        kl=KLRule(("k3",), input_limit=20.0, output_limit=10.0),
        lam=1.0,
        whiten=WhitenRule(unbiased=True, floor="add", count_eps=1e-8),
        group=GroupRule(eps=1e-6, alone="reward"),
        log_ratio_limit=20.0,
        dual_clip=3.0,
        gspo_gradient="own",
        value_clip=0.5,
    ),
    "nemo": Convention(
        kl=KLRule(ALL_KINDS, input_limit=20.0, output_limit=10.0, weighted=True),
        whiten=WhitenRule(unbiased=True, floor="add", count_eps=1e-8),
        group=GroupRule("others", "others", eps=1e-6, unscaled_at_zero=True),
    ),
    "slime": Convention(
        kl=KLRule(("k3",), output_limit=10.0),
        lam=1.0,
        whiten=WhitenRule(unbiased=True, floor="add"),
        group=GroupRule(eps=1e-6),
        aggregation="sample-mean",
        value_loss_factor=1.0,
    ),
}
assert set(PRESETS) == set(get_args(ConventionName))
