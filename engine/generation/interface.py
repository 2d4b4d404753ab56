"""Generator interface: requests in, completions out, while weights change in between.

The rest of the project sees these types only, not what samples: the policy's own shards (embedded.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from ..mesh import Mesh


@dataclass(frozen=True)
class SamplingParams:
    """Sampling options of a request.

    Attributes:
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: sample among the k likeliest tokens only; 0 for all.
        top_p: sample among the fewest tokens that make up this probability; 1 for all.
        max_new_tokens: length at which a response is cut.
        min_new_tokens: stop ids cannot be sampled before the response has this many tokens.
        stop_ids: tokens that end a response; they are kept as its last token.
        seed: with a request's sample id, decides its random numbers.

    Raises:
        ValueError: a value out of range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    max_new_tokens: int = 128
    min_new_tokens: int = 0
    stop_ids: tuple[int, ...] = ()
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature}: must be 0 (greedy) or more, and finite")
        if self.top_k < 0:
            raise ValueError(f"top_k={self.top_k}: must be 0 (off) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p}: must be above 0 and at most 1 (off)")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens}: must be at least 1")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise ValueError(
                f"min_new_tokens={self.min_new_tokens}: must lie between 0 and max_new_tokens={self.max_new_tokens}"
            )


@dataclass(frozen=True)
class Request:
    """A prompt to continue. Equal prompts with different sample ids get independent samples."""

    prompt: list[int]
    sample_id: int
    params: SamplingParams


@dataclass(frozen=True)
class Completion:
    """A response.

    Attributes:
        id: of the request, as `add` returned it; not compared.
        tokens: with the stop id, if one ended it.
        logprobs: of the distribution that each token was sampled from.
        versions: of the weights that chose each token.
        finish: "abort" for a request that was aborted, with the tokens sampled until then.
    """

    id: int = field(compare=False)
    tokens: list[int]
    logprobs: list[float]
    versions: list[int]
    finish: Literal["stop", "length", "abort"]


class Interrupted(Exception):
    """Generation stopped because its completions are no longer wanted."""


class Generator(Protocol):
    """A service that requests can be added to, aborted in and collected from while it runs.

    One a DP rank of `mesh`: the ranks of its tp and pp make the same calls in the same order and get the same results.

    Attributes:
        version: of the weights that choose the next tokens.
        interrupted: polled while requests run; True aborts them all.
    """

    mesh: Mesh
    version: int
    interrupted: Callable[[], bool]

    @property
    def busy(self) -> bool:
        """Whether a request has not been collected yet."""
        ...

    def add(self, request: Request) -> int:
        """Queues a request and returns its id. Raises ValueError for one that can never run."""
        ...

    def abort(self, request_id: int) -> None:
        """Ends a request early; a later `step` returns what it has. One that was collected already is left alone."""
        ...

    def step(self) -> list[Completion]:
        """Samples about one token of each running request; returns the completions that are ready."""
        ...

    def generate(self, prompts: list[list[int]], sample_ids: list[int], params: SamplingParams) -> list[Completion]:
        """One completion a prompt, in the order of the prompts. Raises Interrupted where `interrupted` was true."""
        ...

    def pause(self) -> None:
        """Ends the steps in flight; until `resume` no token is sampled. Requests keep their state."""
        ...

    def resume(self) -> None:
        """Goes on after `pause`."""
        ...

    def load(self, weights: Any, version: int) -> None:
        """Samples from these weights from now on, requests that are running included."""
        ...
