"""Config of launch/sft.py. [O] OpenRLHF, [T] TRL, [I] InstructGPT (Ouyang et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass, field

from .common import require
from .data import ResponseData
from .run import EpochRun
from .supervised import SupervisedConfig


@dataclass(frozen=True)
class SFTData(ResponseData):
    """Dialogues, or prompts with their responses, and what is held out."""

    messages_key: str = "messages"
    """column with a whole dialogue, a list of {role, content}; rows without it need the two columns below"""
    prompt_key: str = "prompt"
    """column that holds the prompt: a string, or a list of {role, content} messages"""
    response_key: str = "response"
    """column that holds the answer to it, a string"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("messages_key", "prompt_key", "response_key"):
            require(bool(getattr(self, name)), name, repr(getattr(self, name)), "the name of a column")


@dataclass(frozen=True)
class SFTRun(EpochRun):
    """Run over rows in epochs, and responses to show at its end."""

    show: int = 2
    """rows whose prompt is answered greedily before and after, for the table at the end; held-out ones if there are"""
    show_tokens: int = 128
    """longest of these answers in tokens"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.show >= 0, "show", self.show, "0 or more")
        require(self.show_tokens >= 1, "show_tokens", self.show_tokens, "at least 1")


@dataclass(frozen=True)
class SFTConfig(SupervisedConfig):
    """Supervised fine-tuning: the model learns the assistant's turns in the data.

    Where defaults come from: [I] InstructGPT, [O] OpenRLHF, [V] verl, [T] TRL.
    """

    noun = "dialogues or prompts with responses"

    data: SFTData = field(default_factory=SFTData)
    run: SFTRun = field(default_factory=lambda: SFTRun(output="runs/sft"))

    def check(self, world: int) -> int:
        """As `ScriptConfig.check`."""
        dp = super().check(world)
        self.update.check(dp, self.data.max_tokens, "data.max_tokens")
        return dp
