"""Rewards by HTTP: prompts and completions go out as JSON, scores come back.

    POST {"prompts": ["..."], "completions": ["..."], "fields": {"column": [...]}}
    200  {"scores": [0.5, ...]}

A server that is down, slow or overloaded is asked again; one that answers with what are no scores is not, for asking
again would not make them true.
"""

from __future__ import annotations

import http.client
import json
import math
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from typing import Any

from .batch import Prompt

AGAIN = (429, 500, 502, 503, 504)
"""HTTP codes after which the same request may succeed."""


class NoAnswer(Exception):
    """No answer this time; another try may get one."""


class RewardServer:
    """Scores by HTTP.

    Args:
        url: where to post.
        time_limit: seconds for one request, its answer included.
        batch: completions in a request.
        tries: of one request.
        abstain: completions of requests that failed get NaN instead of raising.
        pause: seconds before the second try; doubles with each.

    Attributes:
        failures: why completions are without a score, since it was last emptied.
    """

    def __init__(
        self,
        url: str,
        time_limit: float = 60.0,
        *,
        batch: int = 64,
        tries: int = 3,
        abstain: bool = False,
        pause: float = 0.5,
    ):
        self.url, self.time_limit, self.batch, self.tries = url, time_limit, batch, tries
        self.abstain, self.pause = abstain, pause
        self.failures: list[str] = []

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        """One finite score for each completion; NaN where it abstains.

        Raises:
            ValueError: the server is down, too slow, or lies; names the rows. Not where it abstains.
        """
        scores: list[float] = []
        for start in range(0, len(completions), self.batch):
            part = slice(start, start + self.batch)
            try:
                scores += self._request(prompts[part], completions[part])
            except ValueError as error:
                if not self.abstain:
                    raise
                self.failures.append(str(error))
                scores += [math.nan] * len(completions[part])
        return scores

    def close(self) -> None:
        """Nothing stays open between requests."""

    def _request(self, prompts: Sequence[Prompt], completions: Sequence[str]) -> list[float]:
        columns = dict.fromkeys(key for prompt in prompts for key in prompt.fields)
        request = {
            "prompts": [prompt.text for prompt in prompts],
            "completions": list(completions),
            "fields": {key: [prompt.fields.get(key) for prompt in prompts] for key in columns},
        }
        body = json.dumps(request, default=str).encode()
        sources = [prompt.source or f"prompt {prompt.index}" for prompt in prompts]
        more = f" and {len(sources) - 8} more" if len(sources) > 8 else ""
        about = f"for {len(sources)} rows: {', '.join(sources[:8])}{more}"
        reason = ""
        for attempt in range(self.tries):
            if attempt:
                time.sleep(self.pause * 2 ** (attempt - 1))
            try:
                return self._scores(self._post(body, about), sources, about)
            except NoAnswer as error:
                reason = str(error)
        tries = f"{self.tries} tries" if self.tries > 1 else "1 try"
        raise ValueError(f"reward server {self.url}: {reason} ({tries}) {about}")

    def _post(self, body: bytes, about: str) -> bytes:
        """The answer's body.

        Raises:
            NoAnswer: there is none in time, or one of `AGAIN`.
            ValueError: the server refuses the request.
        """
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"})
        deadline = time.monotonic() + self.time_limit
        try:
            with urllib.request.urlopen(request, timeout=self.time_limit) as response:
                parts = []
                while part := response.read1(1 << 16):  # a time limit of the socket's is for each read alone
                    parts.append(part)
                    if time.monotonic() > deadline:
                        raise TimeoutError
                return b"".join(parts)
        except urllib.error.HTTPError as error:
            said = error.read(200).decode(errors="replace")
            if error.code in AGAIN:
                raise NoAnswer(f"answered HTTP {error.code}: {said!r}") from None
            raise ValueError(f"reward server {self.url}: answered HTTP {error.code}: {said!r} {about}") from None
        except TimeoutError as error:
            raise NoAnswer(f"took longer than reward.time_limit={self.time_limit:g} seconds") from error
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise NoAnswer(f"took longer than reward.time_limit={self.time_limit:g} seconds") from error
            raise NoAnswer(f"no connection: {reason!s}" if str(reason) else f"no connection: {reason!r}") from error

    def _scores(self, body: bytes, sources: Sequence[str], about: str) -> list[float]:
        """The scores in an answer.

        Raises:
            ValueError: it is not what was asked for.
        """
        try:
            answer: Any = json.loads(body)
        except ValueError:
            text = body[:60].decode(errors="replace")
            raise ValueError(f"reward server {self.url}: answered what is not JSON, {text!r}, {about}") from None
        scores = answer.get("scores") if isinstance(answer, dict) else None
        if not isinstance(scores, list):
            raise ValueError(
                f'reward server {self.url}: answered {str(answer)[:60]!r}: must be {{"scores": [...]}}, {about}'
            )
        if len(scores) != len(sources):
            raise ValueError(
                f"reward server {self.url}: gave {len(scores)} scores for {len(sources)} completions, {about}"
            )
        return [self._score(value, source) for value, source in zip(scores, sources, strict=True)]

    def _score(self, value: Any, source: str) -> float:
        if isinstance(value, int | float) and math.isfinite(value):
            return float(value)
        reason = f"reward server {self.url}: gave {value!r:.60} for {source}: must be a finite number"
        if not self.abstain:
            raise ValueError(reason)
        self.failures.append(reason)
        return math.nan
