"""The `reward` section: scorers, and what is done to their scores."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, Literal

from ...engine.config import ContentPath
from .common import require


@dataclass(frozen=True)
class RewardConfig:
    """Scorers of responses: functions, reward models, servers; their weighted sum is the score."""

    functions: tuple[ContentPath, ...] = ()
    """path/to/file.py:function or module:function: (prompts, completions, **fields) -> one float each"""
    models: tuple[ContentPath, ...] = ()
    """folders of reward models (a decoder with a scalar head) in Hugging Face format"""
    servers: tuple[str, ...] = ()
    """addresses that score by HTTP, as http://host:8000/score of launch/serve_reward.py"""
    weights: tuple[float, ...] = ()
    """weight of each function, then of each model, then of each server (none: 1 each)"""
    time_limit: float = 60.0
    """seconds a function may take for one batch before it is killed, and a server for one request"""
    server_batch: int = 64
    """responses in one request to a server"""
    server_tries: int = 3
    """times a request is made before the server counts as failed; what is no score is not asked for again"""
    on_failure: Literal["stop", "abstain"] = "stop"
    """on a scorer that fails: stop the run, or leave the responses it has no score for out of the step"""

    def __post_init__(self) -> None:
        count = len(self.names)
        if self.weights and len(self.weights) != count:
            kinds = "functions and models" if not self.servers else "functions, models and servers"
            raise ValueError(f"weights={self.weights}: {len(self.weights)} weights for {count} {kinds}")
        require(all(math.isfinite(weight) for weight in self.weights), "weights", self.weights, "finite numbers")
        if len(set(self.names)) != count:
            servers = f", servers={self.servers}" if self.servers else ""
            raise ValueError(f"functions={self.functions}, models={self.models}{servers}: each may be named once")
        for url in self.servers:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"servers={url!r}: must be an address as http://host:8000/score")
        for name in ("server_batch", "server_tries"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for spec in self.functions:
            if not all(spec.rpartition(":")[::2]):
                raise ValueError(f"functions={spec!r}: must be path/to/file.py:function or module:function")
        require(0 < self.time_limit < math.inf, "time_limit", self.time_limit, "above 0 (seconds)")

    @property
    def names(self) -> tuple[str, ...]:
        """Every scorer, in the order of the weights."""
        return self.functions + self.models + self.servers

    def check_given(self) -> None:
        """Refuse a section without scorers."""
        if not self.names:
            raise ValueError("no reward: give reward.functions, reward.models, reward.servers or several")

    def check_time_limit(self, timeout: float, path: str) -> None:
        """Refuse a function's call, or a server's tries of a request, that may take `timeout` seconds."""
        if self.names and self.time_limit >= timeout:
            raise ValueError(f"{path}.time_limit={self.time_limit:g}: must be below run.timeout={timeout:g}")
        if self.servers and self.time_limit * self.server_tries >= timeout:
            raise ValueError(
                f"{path}.time_limit x {path}.server_tries = {self.time_limit:g} x {self.server_tries}:"
                f" must be below run.timeout={timeout:g}"
            )


@dataclass(frozen=True)
class ShapedReward(RewardConfig):
    """Scorers of responses, and shaping of their scores: clip, penalty."""

    clip: float = 10.0
    """scores are clipped to this size, after normalizing (0: off) [O]"""
    missing_eos_penalty: float = 0.0
    """taken off the reward of a response cut at max_new_tokens"""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("clip", "missing_eos_penalty"):
            require(0 <= getattr(self, name) < math.inf, name, getattr(self, name), "0 (off) or more")


@dataclass(frozen=True)
class PolicyReward(ShapedReward):
    """Scorers of responses, and shaping of their scores: normalize, clip, penalty."""

    normalize: bool = False
    """subtract the running mean of all scores so far and divide by their deviation"""
    clip_at: Literal["score", "token"] = "score"
    """clip the score of a response before baseline and penalty, or the reward that its last token gets [O]"""

    @property
    def score_clip(self) -> float:
        """Limit of a response's score; 0 for none."""
        return self.clip if self.clip_at == "score" else 0.0

    @property
    def token_clip(self) -> float:
        """Limit of the reward that a response's last token gets; 0 for none."""
        return self.clip if self.clip_at == "token" else 0.0


def check_time_limits(config: Any, timeout: float, path: str = "") -> None:
    """Refuse scorers, in any section, that may take longer than `timeout`: the other ranks wait for them."""
    for field in fields(config):
        section, name = getattr(config, field.name), f"{path}{field.name}"
        if isinstance(section, RewardConfig):
            section.check_time_limit(timeout, name)
        elif is_dataclass(section):
            check_time_limits(section, timeout, f"{name}.")
