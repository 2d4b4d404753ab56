"""Serves a reward model by HTTP, for the reward.servers of other runs.

    python launch/serve_reward.py --model.path runs/reward/model --port 8000

    POST /score {"prompts": ["..."], "completions": ["..."]}   ->  {"scores": [0.5, ...]}
    GET  /health                                               ->  {"model": "...", "scored": 128}

A prompt is what the user says, or a list of {role, content} messages; the completion is the assistant's turn after it.
Lists beside these two, one entry a row, say more: "messages", the whole chat that a prompt ends (null or []: none),
"finished", false for a completion that was cut and has no end of turn (default: true), and in "fields" the column
"tools" for the chat template. The score is read where a run with this model in reward.models reads it: behind the
prompt that the model is asked with, at the completion's last token or the end of turn after it.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

from trialign.algorithms.batch import micro_batches, pack
from trialign.algorithms.build import build_decoder, load_tokenizer, read_shape
from trialign.algorithms.config import ModelPaths, ParallelConfig, RunConfig, require
from trialign.algorithms.messages import read_messages, render
from trialign.algorithms.reward_worker import brief
from trialign.algorithms.roles import Role
from trialign.algorithms.text_files import parse_json
from trialign.engine.config import parse
from trialign.models.hf import stop_ids
from world import mesh_of, world_size

MOST_BYTES = 64 << 20
"""Of a request."""


@dataclass(frozen=True)
class ServeConfig:
    """A reward model behind an address, on one process."""

    model: ModelPaths = field(default_factory=ModelPaths)
    host: str = "127.0.0.1"
    """address to listen at; 0.0.0.0 for all, to whom anyone may then post"""
    port: int = 8000
    """port to listen at (0: any that is free)"""
    chat_template: bool = True
    """wrap prompt and completion in the tokenizer's chat template; false feeds the bare text"""
    max_tokens: int = 2048
    """longer prompts and completions together are refused"""
    batch_tokens: int = 8192
    """tokens in one forward"""

    def __post_init__(self) -> None:
        require(0 <= self.port < 65536, "port", self.port, "0 to 65535")
        require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1")
        require(self.batch_tokens >= self.max_tokens, "batch_tokens", self.batch_tokens, "at least max_tokens")


class Row(NamedTuple):
    """What a score is asked for."""

    where: str
    messages: list[dict[str, Any]]  # what is answered
    completion: str
    finished: bool
    tools: list[Any] | None


class Scores:
    """The model and its tokenizer; one request at a time.

    Raises:
        ValueError: the folder holds no reward model, or has no chat template though one is asked for.
    """

    def __init__(self, config: ServeConfig, mesh: Any):
        self.config, folder = config, config.model.path
        self.shape = read_shape(folder, ParallelConfig(), RunConfig(), "score")
        self.tokenizer = load_tokenizer(folder, self.shape)
        if config.chat_template and not self.tokenizer.chat_template:
            raise ValueError(f"chat_template=true, but the tokenizer of {folder} has none: set it to false")
        self.end = self._end_of_turn(stop_ids(folder, self.shape, self.tokenizer))
        model = build_decoder(folder, self.shape, mesh, config.model.dtype, head="score")
        self.role, self.lock, self.scored = Role(model), threading.Lock(), 0

    def __call__(self, rows: Sequence[Row]) -> list[float]:
        """One score a row.

        Raises:
            ValueError: a row is too long, or the chat template refuses it; names the row.
        """
        with self.lock:
            batch = pack([self._tokens(row) for row in rows]).to(self.role.mesh.device)
            shares = micro_batches(range(len(batch)), batch.lengths, 1, self.config.batch_tokens)
            self.scored += len(batch)
            return self.role.scores(batch, shares).tolist()

    def _tokens(self, row: Row) -> list[int]:
        """The prompt as a model is asked with it, the completion, and the end of its turn if it came to one."""
        if self.config.chat_template:
            text = render(row.where, row.messages, self.tokenizer, row.tools)
            head: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        elif len(row.messages) == 1:
            head = self.tokenizer(row.messages[0]["content"])["input_ids"]
        else:
            raise ValueError(f"{row.where}: a chat of {len(row.messages)} messages: needs chat_template=true")
        answer: list[int] = self.tokenizer(row.completion, add_special_tokens=False)["input_ids"]
        tokens = [*head, *answer, *([self.end] if row.finished else [])]
        if len(tokens) > self.config.max_tokens:
            raise ValueError(f"{row.where}: {len(tokens)} tokens, max_tokens={self.config.max_tokens}")
        return tokens

    def _end_of_turn(self, ends: Sequence[int]) -> int:
        """The token that an answer ends with: the one of the model's that its chat template writes, or its first."""
        written: list[int] = []
        if self.config.chat_template:
            chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
            text = render("a chat of two turns", chat, self.tokenizer, None, generation_prompt=False)
            written = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        known: list[Any] = [
            token for token in (*reversed(written), self.tokenizer.eos_token_id, *ends) if token in ends
        ]
        if not known:
            raise ValueError(f"{self.config.model.path}: neither its configs nor its tokenizer name an eos_token_id")
        return known[0]


def read_request(body: bytes) -> list[Row]:
    """The rows of a request.

    Raises:
        ValueError: it is not what is asked for; names the row.
    """
    try:
        request = json.loads(body)
    except (ValueError, RecursionError):
        raise ValueError("not JSON") from None
    prompts = request.get("prompts") if isinstance(request, dict) else None
    completions = request.get("completions") if isinstance(request, dict) else None
    if not isinstance(prompts, list) or not isinstance(completions, list):
        raise ValueError('needs {"prompts": [...], "completions": [...]}')
    count = len(prompts)
    if count != len(completions) or not prompts:
        raise ValueError(f"{count} prompts and {len(completions)} completions: as many of each, 1 at least")
    chats, finished = (_listed(request, name, count) for name in ("messages", "finished"))
    tools = _listed(request.get("fields") or {}, "tools", count)
    rows = zip(prompts, completions, chats, finished, tools, strict=True)
    return [read_row(f"row {number}", *row) for number, row in enumerate(rows)]


def _listed(section: Any, name: str, count: int) -> list[Any]:
    """A list with an entry for each row; where there is none, of None."""
    values = section.get(name) if isinstance(section, dict) else None
    if values is None:
        return [None] * count
    if not isinstance(values, list) or len(values) != count:
        raise ValueError(f"{name}: must be a list of {count}, one entry a row")
    return values


def read_row(where: str, prompt: Any, completion: Any, chat: Any, finished: Any, tools: Any) -> Row:
    """A row as it came.

    Raises:
        ValueError: a part is not what it must be; names the row.
    """
    messages = chat or ([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)
    if not isinstance(messages, list) or not messages or not isinstance(completion, str):
        raise ValueError(f"{where}: needs a prompt (a string, or messages) and a completion (a string)")
    messages = read_messages(f"{where}: 'messages'", messages)
    if finished is not None and not isinstance(finished, bool):
        raise ValueError(f"{where}: finished={finished!r:.60}: must be true or false")
    if isinstance(tools, str):  # as a column may hold them
        with suppress(ValueError):
            tools = parse_json(tools)
    if tools and not isinstance(tools, list):
        raise ValueError(f"{where}: tools={tools!r:.60}: must be a list of function descriptions, or one as JSON")
    return Row(where, messages, completion, finished is not False, tools or None)


def handler(scores: Scores) -> type[BaseHTTPRequestHandler]:
    """What answers requests."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if self.path != "/health":
                return self.answer(404, {"error": "GET /health, POST /score"})
            self.answer(200, {"model": scores.config.model.path, "scored": scores.scored})

        def do_POST(self) -> None:
            given = self.headers.get("Content-Length") or "0"
            size = int(given) if given.isdecimal() else -1
            if not 0 <= size <= MOST_BYTES:
                self.close_connection = True  # what is not read would be taken for the next request
                return self.answer(413, {"error": f"Content-Length: {given}: must be 0 to {MOST_BYTES}"})
            body = self.rfile.read(size)
            if self.path != "/score":
                return self.answer(404, {"error": "GET /health, POST /score"})
            self.answer(*self.scored(body))

        def scored(self, body: bytes) -> tuple[int, dict[str, Any]]:
            """Code and answer. What nobody foresaw is told, so that the one who asks does not wait for an answer."""
            try:
                return 200, {"scores": scores(read_request(body))}
            except ValueError as error:
                return 400, {"error": str(error)}
            except Exception as error:
                return 500, {"error": brief(error)}

        def answer(self, code: int, what: dict[str, Any]) -> None:
            body = json.dumps(what).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Says nothing: a run makes thousands of requests."""

    return Handler


def main(argv: list[str]) -> None:
    """Loads the model, then answers until it is told to stop."""
    config = parse(ServeConfig, argv, prog="serve_reward.py")
    if not config.model.path:
        sys.exit("error: model.path is not given: the folder of a reward model, in Hugging Face format")
    if world_size() > 1:
        sys.exit("error: one process serves a model: start it with python, not with torchrun")
    try:
        with mesh_of(ParallelConfig()) as mesh:
            scores = Scores(config, mesh)
            with ThreadingHTTPServer((config.host, config.port), handler(scores)) as server:
                signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=server.shutdown).start())
                print(f"{config.model.path} at http://{config.host}:{server.server_port}/score", flush=True)
                server.serve_forever()
    except KeyboardInterrupt:
        pass
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
