"""The `reward` section: scorers, and shaping of their scores."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal

from ...engine.config import ContentPath
from .common import require, require_at_least


@dataclass(frozen=True)
class RewardConfig:
    """Scorers of responses: functions, reward models, servers; the reward is their weighted sum."""

    functions: tuple[ContentPath, ...] = ()
    """custom reward functions, path/to/file.py:function or module:function: (prompts, completions, **columns) -> one
    float each"""
    models: tuple[ContentPath, ...] = ()
    """reward models: folders of decoders with a scalar head in Hugging Face format"""
    servers: tuple[str, ...] = ()
    """reward servers: URLs such as http://host:8000/score of launch/serve_reward.py"""
    weights: tuple[float, ...] = ()
    """weights of the functions, models and servers, in this order (empty: 1 each)"""
    time_limit: float = 60.0
    """timeout in seconds of a function for one batch, and of one request to a server"""
    function_gpus: str = ""
    """CUDA_VISIBLE_DEVICES of the functions' processes, such as 7 (empty: they see no GPU)"""
    server_batch_size: int = 64
    """responses per request to a server"""
    server_max_attempts: int = 3
    """attempts of a request to a server before it fails; an invalid response is not retried"""
    on_failure: Literal["stop", "skip"] = "stop"
    """on a function or server that fails: stop the run, or leave the responses without a score out of the step"""

    def __post_init__(self) -> None:
        count = len(self.names)
        if self.weights and len(self.weights) != count:
            raise ValueError(
                f"weights={self.weights}: {len(self.weights)} weights for {count} functions, models and servers"
            )
        require(all(math.isfinite(weight) for weight in self.weights), "weights", self.weights, "finite numbers")
        if len(set(self.names)) != count:
            raise ValueError(
                f"functions={self.functions}, models={self.models}, servers={self.servers}: each may be named once"
            )
        for url in self.servers:
            require(
                url.startswith(("http://", "https://")), "servers", repr(url), "a URL such as http://host:8000/score"
            )
        for spec in self.functions:
            named = all(spec.rpartition(":")[::2])
            require(named, "functions", repr(spec), "path/to/file.py:function or module:function")
        require_at_least(self, 1, "server_batch_size", "server_max_attempts")
        require(0 < self.time_limit < math.inf, "time_limit", self.time_limit, "above 0 (seconds)")

    @property
    def names(self) -> tuple[str, ...]:
        """All scorers, in the order of the weights."""
        return self.functions + self.models + self.servers

    def check_given(self) -> None:
        """Refuse a section without scorers."""
        if not self.names:
            raise ValueError("no reward: give reward.functions, reward.models, reward.servers or several")

    def check_time_limit(self, timeout: float, path: str) -> None:
        """Refuse a function's call, or all attempts of a request, that may take `timeout` seconds."""
        if self.names and self.time_limit >= timeout:
            raise ValueError(f"{path}.time_limit={self.time_limit:g}: must be below run.timeout={timeout:g}")
        if self.servers and self.time_limit * self.server_max_attempts >= timeout:
            raise ValueError(
                f"{path}.time_limit x {path}.server_max_attempts = {self.time_limit:g} x {self.server_max_attempts}:"
                f" must be below run.timeout={timeout:g}"
            )


@dataclass(frozen=True)
class ShapedReward(RewardConfig):
    """Scorers of responses, and shaping of the reward: clip, penalty."""

    clip: float = 10.0
    """rewards are clipped to [-clip, clip], after normalization (0: off) [O]"""
    missing_eos_penalty: float = 0.0
    """subtracted from the reward of a response truncated at rollout.max_new_tokens (0: off)"""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_at_least(self, 0, "clip", "missing_eos_penalty")


@dataclass(frozen=True)
class PolicyReward(ShapedReward):
    """Scorers of responses, and shaping of the reward: normalization, clip, penalty."""

    normalize: bool = False
    """subtract the running mean of all rewards and divide by their running standard deviation"""
    clip_at: Literal["score", "token"] = "score"
    """clip a response's reward before baseline and penalty, or the token reward of its last token [O]"""

    @property
    def score_clip(self) -> float:
        """Limit of a response's reward; 0: off."""
        return self.clip if self.clip_at == "score" else 0.0

    @property
    def token_clip(self) -> float:
        """Limit of the token reward of a response's last token; 0: off."""
        return self.clip if self.clip_at == "token" else 0.0


def check_time_limits(config: Any, timeout: float, path: str = "") -> None:
    """Refuse scorers, in any section, that may take longer than the other ranks wait for them."""
    for field in fields(config):
        section, name = getattr(config, field.name), f"{path}{field.name}"
        if isinstance(section, RewardConfig):
            section.check_time_limit(timeout, name)
        elif is_dataclass(section):
            check_time_limits(section, timeout, f"{name}.")
