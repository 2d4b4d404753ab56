"""Config of launch/sft.py."""

from __future__ import annotations

from dataclasses import dataclass, field

from .common import require_at_least
from .data import ResponseData
from .run import EpochRun
from .supervised import SupervisedConfig


@dataclass(frozen=True)
class SFTData(ResponseData):
    """Dialogues, or prompts with their responses, and the eval split."""

    messages_key: str = "messages"
    """column of a whole dialogue, a list of {role, content}; rows without it need the next two columns"""
    prompt_key: str = "prompt"
    """column of the prompt: a string, or a list of {role, content} messages"""
    response_key: str = "response"
    """column of the response, a string"""


@dataclass(frozen=True)
class SFTRun(EpochRun):
    """Run over rows in epochs, and responses to show at its end."""

    show: int = 2
    """number of rows, of the eval split if there is one, with greedy responses before and after in the final table"""
    show_tokens: int = 128
    """maximum length of these responses in tokens"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 0, "show")
        require_at_least(self, 1, "show_tokens")


@dataclass(frozen=True)
class SFTConfig(SupervisedConfig):
    """Supervised fine-tuning on the assistant's turns of dialogues.

    Sources of defaults: [O] OpenRLHF, [V] verl, [T] TRL.
    """

    noun = "dialogues or prompts with responses"

    data: SFTData = field(default_factory=SFTData)
    run: SFTRun = field(default_factory=lambda: SFTRun(output="runs/sft"))
