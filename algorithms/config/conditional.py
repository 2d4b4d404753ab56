"""Config of launch/conditional.py, conditional SFT."""

from __future__ import annotations

from dataclasses import dataclass, field

from .common import require, require_at_least
from .data import ResponseData
from .reward import RewardConfig
from .sft import SFTRun
from .supervised import SupervisedConfig

CONDITION = "{input} <rm_score>: {reward} "
"""OpenRLHF's template of a prompt with its reward."""


@dataclass(frozen=True)
class RewardedData(ResponseData):
    """Responses with their rewards."""

    prompt_key: str = "prompt"
    """column of the prompt, a string or messages; rows without it hold whole dialogues in response_key"""
    response_key: str = "response"
    """column of the response: a string, or a dialogue that ends with it"""
    reward_key: str = "reward"
    """column of the reward, a number; not read if the section reward has scorers"""


@dataclass(frozen=True)
class ConditionConfig:
    """Rewards in prompts."""

    template: str = CONDITION
    """template of the last user message: {input}, and {reward} with two decimals [O]"""
    normalize: bool = True
    """subtract the mean of all rewards and divide by their standard deviation [O]"""
    buckets: int = 0
    """number of quantile buckets; a reward is replaced by the mean of its bucket (0: off)"""
    target_reward: str = ""
    """reward in the prompt when the trained model responds (empty: the highest in the training prompts)"""

    def __post_init__(self) -> None:
        require(self.buckets >= 0 and self.buckets != 1, "buckets", self.buckets, "0 (off) or at least 2")
        for part in ("{input}", "{reward}"):
            require(part in self.template, "template", repr(self.template), f"a text with {part} in it")


@dataclass(frozen=True)
class ConditionalRun(SFTRun):
    """Scoring of the rows, run over them in epochs, and responses to show at its end."""

    rows_per_save: int = 1024
    """rows per scoring chunk; finished chunks are skipped on restart"""
    show: int = 3
    """number of rows, of the eval split if there is one, with greedy responses before and after in the final table"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 1, "rows_per_save")


@dataclass(frozen=True)
class ConditionalConfig(SupervisedConfig):
    """Conditional SFT: fine-tuning on responses whose prompts contain their rewards.

    Sources of defaults: [O] OpenRLHF, [V] verl, [T] TRL.
    """

    noun = "prompts with responses and rewards"

    data: RewardedData = field(default_factory=RewardedData)
    run: ConditionalRun = field(default_factory=lambda: ConditionalRun(output="runs/conditional"))
    reward: RewardConfig = field(default_factory=RewardConfig)
    condition: ConditionConfig = field(default_factory=ConditionConfig)
