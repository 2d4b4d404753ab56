"""The choices on which trainers in wide use differ, each named, and what each trainer chose.

`trialign` is what this project does where nothing else is asked. The other presets give the numbers of OpenRLHF 0.11,
TRL 1.10, verl 0.10, NeMo-RL and slime as of August 2026;
tests/algorithms/losses/test_golden.py holds them to what those compute.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from ..advantages import Gaps, GroupRule, KLRule, WhitenRule
from ..losses.aggregation import Aggregation
from ..losses.policy import Correction, Level

ConventionName = Literal["trialign", "openrlhf", "trl", "verl", "nemo", "slime"]
ALL_KINDS = ("k1", "k2", "k3", "abs")


@dataclass(frozen=True)
class Convention:
    """One set of choices. A 0 turns a limit off."""

    kl: KLRule = field(default_factory=KLRule)
    """limits of the KL estimators"""
    reward_clip: float = 0.0
    """size of the largest reward"""
    reward_clip_at: Literal["score", "token"] = "score"
    """an answer's score before any baseline and penalty is clipped, or what its last token is given"""
    gaps: Gaps = "carry"
    """what GAE sees across tokens that are not the model's own, in a dialogue of several turns"""
    lam: float = 0.95
    """GAE's lambda"""
    whiten: WhitenRule = field(default_factory=WhitenRule)
    """of GAE's advantages"""
    whiten_returns: WhitenRule = field(default_factory=WhitenRule)
    """of REINFORCE++'s"""
    group: GroupRule = field(default_factory=GroupRule)
    """GRPO's baseline and deviation"""
    log_ratio_limit: float = 0.0
    """of |log pi - log pi_old| before the exponential, where each token has its own ratio"""
    dual_clip: float = 0.0
    """bound of the loss of negative advantages"""
    gspo_gradient: Literal["shared", "own"] = "shared"
    """through the sequence's mean, or to each token its own"""
    sequence_log_ratio_limit: float = 0.0
    """the most a sequence's log-ratio may be before the exponential"""
    cispo_bounds: Literal["relative", "absolute"] = "relative"
    """what CISPO's numbers mean: 1 - low and 1 + high, or the ratio itself"""
    aggregation: Aggregation = "token-mean"
    """of per-token policy losses"""
    value_aggregation: Aggregation = "token-mean"
    """of per-token value losses"""
    value_loss_factor: float = 0.5
    """of max((V - R)^2, clipped)"""
    value_clip: float = 0.2
    """of the value's change"""
    ipo: Literal["sum", "mean"] = "sum"
    """of an answer's log-ratio over its tokens"""
    nll: Literal["sum", "mean"] = "mean"
    """DPO's term for the chosen answer, of -log π over its tokens"""
    reinforce_kl: Literal["reward", "advantage"] = "reward"
    """REINFORCE++'s: in the token rewards, whose returns gather that of later tokens, or each token's own, once"""
    reinforce_baseline_kl: Literal["off", "reward", "advantage"] = "reward"
    """the same of its baseline form"""
    rloo_kl: Literal["score", "reward"] = "score"
    """RLOO's: in the score, before the baseline, or in the token rewards, after it"""
    rloo_level: Level = "token"
    """of RLOO's ratio"""
    importance: Correction = "off"
    """what corrects for a sampler that is not quite the actor, RLOO apart"""
    importance_low: float = 0.0
    """least weight of an off-policy token"""
    importance_high: float = 2.0
    """largest weight of an off-policy token"""

    @property
    def score_clip(self) -> float:
        """What an answer's score is clipped to; 0: not here."""
        return self.reward_clip if self.reward_clip_at == "score" else 0.0

    @property
    def token_clip(self) -> tuple[float, float] | None:
        """What the reward that a token is given is clipped to; None: not here."""
        there = self.reward_clip and self.reward_clip_at == "token"
        return (-self.reward_clip, self.reward_clip) if there else None


PRESETS: dict[ConventionName, Convention] = {
    "trialign": Convention(reward_clip=10.0, value_clip=0.5),
    "openrlhf": Convention(
        kl=KLRule(ALL_KINDS, output_limit=10.0),
        reward_clip=10.0,
        reward_clip_at="token",
        gaps="zero",
        lam=1.0,
        group=GroupRule(eps=1e-9),
        log_ratio_limit=20.0,
        value_clip=0.5,
        rloo_kl="reward",
        importance_low=0.5,
        importance_high=5.0,
    ),
    "trl": Convention(
        whiten=WhitenRule(unbiased=True, floor="add"),
        whiten_returns=WhitenRule(unbiased=True, floor="add"),
        group=GroupRule(eps=1e-4),
        cispo_bounds="absolute",
        ipo="mean",
        rloo_level="sequence-sum",
        importance="sequence-icepop",
        importance_high=3.0,
    ),
    "verl": Convention(
        kl=KLRule(("k3",), input_limit=20.0, output_limit=10.0),
        lam=1.0,
        whiten=WhitenRule(unbiased=True, floor="add", count_eps=1e-8),
        whiten_returns=WhitenRule(unbiased=True, floor="add", count_eps=1e-8),
        group=GroupRule(eps=1e-6, alone="reward"),
        log_ratio_limit=20.0,
        dual_clip=3.0,
        gspo_gradient="own",
        sequence_log_ratio_limit=10.0,
        value_clip=0.5,
        reinforce_baseline_kl="off",
    ),
    "nemo": Convention(
        nll="sum",
        kl=KLRule(ALL_KINDS, input_limit=20.0, output_limit=10.0, weighted=True),
        whiten=WhitenRule(unbiased=True, floor="add", count_eps=1e-8),
        group=GroupRule("others", "others", eps=1e-6),
        reinforce_kl="advantage",
        reinforce_baseline_kl="advantage",
    ),
    "slime": Convention(
        kl=KLRule(("k3",), output_limit=10.0),
        lam=1.0,
        whiten=WhitenRule(unbiased=True, floor="add"),
        whiten_returns=WhitenRule(unbiased=True, floor="add"),
        group=GroupRule(eps=1e-6),
        aggregation="sample-mean",
        value_aggregation="sample-mean",
        value_loss_factor=1.0,
        reinforce_baseline_kl="advantage",
    ),
}
assert set(PRESETS) == set(get_args(ConventionName))
