"""The config of supervised fine-tuning. [O] OpenRLHF, [T] TRL, [I] InstructGPT (Ouyang et al. 2022)."""

from __future__ import annotations

from dataclasses import dataclass, field

from .common import (
    EpochRun,
    LoRAConfig,
    ModelPaths,
    OptimizerConfig,
    ParallelConfig,
    UpdateConfig,
    check_given,
    require,
)
from .data import ResponseData


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
    """The run itself."""

    output: str = "runs/sft"
    """folder for logs, checkpoints and the exported model"""
    show: int = 2
    """rows whose prompt is answered greedily before and after, for the table at the end; held-out ones if there are"""
    show_tokens: int = 128
    """longest of these answers in tokens"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require(self.show >= 0, "show", self.show, "0 or more")
        require(self.show_tokens >= 1, "show_tokens", self.show_tokens, "at least 1")


@dataclass(frozen=True)
class SFTConfig:
    """Supervised fine-tuning: the model learns to say what the assistant says in the data.

    Where defaults come from: [I] InstructGPT, [O] OpenRLHF, [V] verl, [T] TRL.
    """

    model: ModelPaths = field(default_factory=ModelPaths)
    data: SFTData = field(default_factory=SFTData)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-5))
    update: UpdateConfig = field(default_factory=UpdateConfig)
    run: SFTRun = field(default_factory=SFTRun)


def check(config: SFTConfig, world: int) -> int:
    """Cross-checks that need no model.

    Returns:
        The size of the data axis.

    Raises:
        ValueError: naming the knobs and numbers that do not fit.
    """
    dp = check_given(config.model, config.data, config.parallel, world, rows="dialogues or prompts with responses")
    config.update.check(dp, config.data.max_tokens, "data.max_tokens")
    return dp
