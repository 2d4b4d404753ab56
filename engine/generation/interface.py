"""Generator interface: sampling parameters, requests and completions, and the service between them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from ..mesh import Mesh


@dataclass(frozen=True)
class SamplingParams:
    """Sampling options of a request.

    Attributes:
        temperature: divides the logits; 0 is greedy.
        top_k: sample among the k likeliest tokens; 0 for all.
        top_p: sample among the fewest tokens with at least this total probability; 1 for all.
        max_new_tokens: length at which a response is cut off.
        min_new_tokens: stop ids cannot be sampled before the response has this many tokens.
        stop_ids: tokens that end a response, kept as its last token.
        seed: of the random numbers, with a request's sample id.

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
        tokens: including the stop id that ended it, if any.
        logprobs: under the distribution that each token was sampled from.
        versions: of the weights that sampled each token.
        finish: "abort" if the request was aborted, with the tokens sampled until then.
    """

    id: int = field(compare=False)
    tokens: list[int]
    logprobs: list[float]
    versions: list[int]
    finish: Literal["stop", "length", "abort"]


class Interrupted(Exception):
    """Raised by `generate` after an interruption."""


class Generator(Protocol):
    """Service that samples responses. Requests can be added, aborted and collected while it runs.

    Every DP rank of `mesh` has one; the ranks of its tp and pp make the same calls in the same order and get the same
    results.

    Attributes:
        version: of the weights that sample the next tokens.
        interrupted: polled while requests run; True aborts them all.
    """

    mesh: Mesh
    version: int
    interrupted: Callable[[], bool]

    @property
    def busy(self) -> bool:
        """Whether any request is not collected yet."""
        ...

    def add(self, request: Request) -> int:
        """Queues a request and returns its id.

        Raises:
            ValueError: a prompt that is empty, too long for the model or for the cache, or holds a token outside the
                vocabulary; a stop id outside the vocabulary.
        """
        ...

    def abort(self, request_id: int) -> None:
        """Ends a request early; a later `step` returns its completion. Ignored if it is collected already.

        Raises:
            ValueError: an id that `add` has not returned.
        """
        ...

    def step(self) -> list[Completion]:
        """Samples about one token of each running request; returns the completions that are ready and not collected."""
        ...

    def generate(self, prompts: list[list[int]], sample_ids: list[int], params: SamplingParams) -> list[Completion]:
        """One completion for each prompt, in order. Other requests run on meanwhile.

        Raises:
            ValueError: as `add`, before any request is added; numbers of prompts and sample ids differ.
            Interrupted: on all ranks of tp and pp, where `interrupted` was true on one.
        """
        ...

    def pause(self) -> None:
        """Finishes the steps in flight; no token is sampled until `resume`. Requests keep their tokens and cache."""
        ...

    def resume(self) -> None:
        """Continues after `pause`."""
        ...

    def load(self, weights: Any, version: int) -> None:
        """Samples from these weights from now on, in running requests too; steps in flight finish with the old ones."""
        ...
