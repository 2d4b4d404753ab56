"""Reward servers by HTTP: requests and responses are JSON.

    POST {"prompts": ["..."], "completions": ["..."], "messages": [[{"role": "user", "content": "..."}]],
          "finished": [true], "fields": {"column": [...]}}
    200  {"scores": [0.5, null, ...]}

`prompts` are the last user messages, `messages` the whole chats; `finished` completions have an end of sequence. A
score is null for rows that the server does not score. Requests to a server that is down, slow or overloaded are
retried; invalid responses are not.
"""

from __future__ import annotations

import http.client
import json
import math
import queue
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

from ...engine.heartbeat import HEARTBEAT
from ..batch import Prompt, Score
from ..data.text_files import refuse_half_pairs

T = TypeVar("T")
LONGEST = 1 << 24
"""Maximum bytes of a response: 1,000 for each of 16,000 scores."""
AGAIN = (429, 500, 502, 503, 504)
"""HTTP codes of retried requests."""


class NoResponse(Exception):
    """A failed attempt; a retry may succeed."""


class RewardClient:
    """Scores by HTTP.

    Args:
        url: where to post.
        time_limit: seconds for one request with its response.
        batch: completions in a request.
        attempts: per request.
        skip_failures: completions of requests that failed get NaN instead of raising.
        pause: seconds before the second try; doubles with each.

    Attributes:
        failures: reasons for completions without a score, until emptied.
    """

    def __init__(
        self,
        url: str,
        time_limit: float = 60.0,
        *,
        batch: int = 64,
        attempts: int = 3,
        skip_failures: bool = False,
        pause: float = 0.5,
    ):
        self.url, self.time_limit, self.batch, self.attempts = url, time_limit, batch, attempts
        self.skip_failures, self.pause = skip_failures, pause
        self.failures: list[str] = []

    def score(self, prompts: Sequence[Prompt], completions: Sequence[str], finished: Sequence[bool]) -> list[Score]:
        """One score for each completion.

        Args:
            finished: the completion ended by itself, rather than at max_new_tokens.

        Raises:
            ValueError: the server is down, too slow, or returns invalid scores; names the rows. Not with skip_failures.
        """
        scores: list[Score] = []
        for start in range(0, len(completions), self.batch):
            part = slice(start, start + self.batch)
            try:
                scores += self._request(prompts[part], completions[part], finished[part])
                HEARTBEAT.tick()  # the other ranks wait
            except ValueError as error:
                if not self.skip_failures:
                    raise
                self.failures.append(str(error))
                scores += [math.nan] * len(completions[part])
        return scores

    def _request(self, prompts: Sequence[Prompt], completions: Sequence[str], finished: Sequence[bool]) -> list[Score]:
        columns = dict.fromkeys(key for prompt in prompts for key in prompt.fields)
        request = {
            "prompts": [prompt.text for prompt in prompts],
            "completions": list(completions),
            "messages": [prompt.messages for prompt in prompts],
            "finished": list(finished),
            "fields": {key: [prompt.fields.get(key) for prompt in prompts] for key in columns},
        }
        body = json.dumps(as_json(request), default=str, allow_nan=False)
        if "\\ud" in body:  # an escape of half a pair, or of a whole one
            for prompt, completion in zip(prompts, completions, strict=True):
                texts = {"prompt": prompt.text, "completion": completion, "messages": prompt.messages}
                refuse_half_pairs(f"reward server {self.url}: {prompt.where}", texts | prompt.fields)
        sources = [prompt.where for prompt in prompts]
        more = f" and {len(sources) - 8} more" if len(sources) > 8 else ""
        about = f"for {len(sources)} rows: {', '.join(sources[:8])}{more}"
        reason = ""
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(self.pause * 2 ** (attempt - 1))
            try:
                return self._scores(self._post(body.encode(), about), sources, about)
            except NoResponse as error:
                reason = str(error)
        count = f"{self.attempts} attempts" if self.attempts > 1 else "1 attempt"
        raise ValueError(f"reward server {self.url}: {reason} ({count}) {about}")

    def _post(self, body: bytes, about: str) -> bytes:
        """Body of the response.

        Raises:
            NoResponse: none in time, or a code of `AGAIN`.
            ValueError: the server refuses the request.
        """
        request = urllib.request.Request(self.url, body, {"Content-Type": "application/json"})
        deadline = time.monotonic() + self.time_limit

        def ask() -> bytes:
            with urllib.request.urlopen(request, timeout=self.time_limit) as response:
                parts, size = [], 0
                while part := response.read(1 << 16):
                    parts.append(part)
                    size += len(part)
                    if size > LONGEST:
                        raise ValueError(f"reward server {self.url}: answered more than {LONGEST:,} bytes {about}")
                    if time.monotonic() > deadline:  # the caller has stopped waiting
                        raise TimeoutError
                if response.length:
                    raise http.client.IncompleteRead(b"".join(parts), response.length)
                return b"".join(parts)

        try:
            return within(self.time_limit, ask)
        except urllib.error.HTTPError as error:
            detail = b""
            with suppress(OSError, http.client.HTTPException):  # the code is enough
                detail = within(max(0.0, deadline - time.monotonic()), partial(error.read, 200))
            reason = f"answered HTTP {error.code}: {detail.decode(errors='replace')!r}"
            if error.code in AGAIN:
                raise NoResponse(reason) from None
            raise ValueError(f"reward server {self.url}: {reason} {about}") from None
        except (OSError, http.client.HTTPException, UnicodeError) as error:
            reason = getattr(error, "reason", error)
            if isinstance(reason, TimeoutError):
                raise NoResponse(f"took longer than reward.time_limit={self.time_limit:g} seconds") from error
            raise NoResponse(f"no connection: {reason!s}" if str(reason) else f"no connection: {reason!r}") from error

    def _scores(self, body: bytes, sources: Sequence[str], about: str) -> list[Score]:
        """Scores of a response; ValueError if it is invalid."""
        try:
            answer: Any = json.loads(body)
        except (ValueError, RecursionError):
            text = body[:60].decode(errors="replace")
            raise ValueError(f"reward server {self.url}: response is not JSON, {text!r}, {about}") from None
        scores = answer.get("scores") if isinstance(answer, dict) else None
        if not isinstance(scores, list):
            raise ValueError(
                f'reward server {self.url}: response {str(answer)[:60]!r}: must be {{"scores": [...]}}, {about}'
            )
        if len(scores) != len(sources):
            raise ValueError(
                f"reward server {self.url}: returned {len(scores)} scores for {len(sources)} completions, {about}"
            )
        return [self._score(value, source) for value, source in zip(scores, sources, strict=True)]

    def _score(self, value: Any, source: str) -> Score:
        if value is None:
            return None
        number = math.nan
        if isinstance(value, int | float) and not isinstance(value, bool):
            with suppress(OverflowError):  # an integer may be larger than any float
                number = float(value)
        if math.isfinite(number):
            return number
        reason = f"reward server {self.url}: returned {value!r:.60} for {source}: must be a finite number, or null"
        if not self.skip_failures:
            raise ValueError(reason)
        self.failures.append(reason)
        return math.nan


def within(seconds: float, work: Callable[[], T]) -> T:
    """Result or error of `work`, run in a thread that is abandoned after the time limit.

    A socket's timeout is for each read: a server that sends a byte now and then would never exceed it.

    Raises:
        TimeoutError: after `seconds`.
    """
    outcome: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()

    def run() -> None:
        try:
            outcome.put((work(), None))
        except BaseException as error:  # raised again in the waiting thread
            outcome.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        result, error = outcome.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError from None
    if error is not None:
        raise error
    return result


def as_json(value: Any) -> Any:
    """The value with None for NaN and infinities, which JSON lacks."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: as_json(own) for key, own in value.items()}
    return [as_json(own) for own in value] if isinstance(value, list | tuple) else value
