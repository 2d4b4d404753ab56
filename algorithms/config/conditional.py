"""Config of launch/conditional.py, conditional SFT. [O] OpenRLHF, [S] SteerLM (Dong et al. 2023)."""

from __future__ import annotations

from dataclasses import dataclass, field

from .common import require
from .data import ResponseData
from .reward import RewardConfig
from .sft import SFTRun
from .supervised import SupervisedConfig

CONDITION = "{input} <rm_score>: {reward} "
"""OpenRLHF's template of a prompt with its reward."""


@dataclass(frozen=True)
class RewardedData(ResponseData):
    """Answers with what they are worth."""

    prompt_key: str = "prompt"
    """column that holds the prompt, a string or messages; rows without it hold whole dialogues in the next"""
    response_key: str = "response"
    """column with the answer: a string, or a dialogue that ends with it"""
    reward_key: str = "reward"
    """column with its reward, a number; where rewards are given in the section below, they score instead"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("prompt_key", "response_key", "reward_key"):
            require(bool(getattr(self, name)), name, repr(getattr(self, name)), "the name of a column")


@dataclass(frozen=True)
class ConditionConfig:
    """How a reward is written into the prompt."""

    template: str = CONDITION
    """the user's last words with the reward: {input} and {reward}, which has two decimals [O]"""
    normalize: bool = True
    """write rewards less their mean, over their deviation, both over all rows [O]"""
    buckets: int = 0
    """write the mean of the reward's bucket, of so many with equally many rows each (0: the reward itself)"""
    best: str = ""
    """what is written when the trained model answers ("": the best reward or bucket that was written)"""

    def __post_init__(self) -> None:
        require(self.buckets >= 0 and self.buckets != 1, "buckets", self.buckets, "0 (off) or at least 2")
        for part in ("{input}", "{reward}"):
            require(part in self.template, "template", repr(self.template), f"a text with {part} in it")


@dataclass(frozen=True)
class ConditionalRun(SFTRun):
    """Run over rows in epochs, their scoring before it, and responses to show at its end."""

    rows_per_save: int = 1024
    """rows that are scored at once; their rewards are then kept, should the run be stopped before it has scored all"""
    show: int = 3
    """rows whose prompt is answered greedily before and after, with the best reward in it; held-out ones if any"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.rows_per_save >= 1, "rows_per_save", self.rows_per_save, "at least 1")


@dataclass(frozen=True)
class ConditionalConfig(SupervisedConfig):
    """Conditional SFT: rewards are written into the prompts, and the model learns which responses earn which.

    Where defaults come from: [O] OpenRLHF, [V] verl, [T] TRL.
    """

    noun = "prompts with responses and rewards"

    data: RewardedData = field(default_factory=RewardedData)
    run: ConditionalRun = field(default_factory=lambda: ConditionalRun(output="runs/conditional"))
    reward: RewardConfig = field(default_factory=RewardConfig)
    condition: ConditionConfig = field(default_factory=ConditionConfig)

    def check(self, world: int) -> int:
        """As `ScriptConfig.check`."""
        dp = super().check(world)
        self.update.check(dp, self.data.max_tokens, "data.max_tokens")
        return dp
