"""Serves a reward model by HTTP, for the reward.servers of other runs.

    python launch/serve_reward.py --model.path runs/reward/model --port 8000

    POST /score {"prompts": ["..."], "completions": ["..."]}   ->  {"scores": [0.5, ...]}
    GET  /health                                               ->  {"model": "...", "scored": 128}

A prompt is a user message or a list of {role, content} messages; the completion is the assistant's turn after it.
Optional lists, one entry a row: "messages", the whole chat that ends with the prompt (null or []: none); "finished",
false for a completion that was cut and has no end of turn (default: true); in "fields" the column "tools" for the chat
template. The score is read where a run with this model in reward.models reads it: at the completion's last token, or
the end of turn after it.
"""

from __future__ import annotations

import common.interrupts  # noqa: F401  # isort: skip  (handles signals while torch is imported)

import json
import signal
import sys
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

from common.env import pick_device, world_size
from common.signals import SIGNALS
from trialign.algorithms.batch import pack
from trialign.algorithms.config.common import ModelPaths, ParallelConfig, require
from trialign.algorithms.config.run import RunConfig
from trialign.algorithms.config.supervised import UpdateConfig
from trialign.algorithms.data.chat import parse_tools, read_messages
from trialign.algorithms.data.text_files import refuse_half_pairs
from trialign.algorithms.rewards.encoder import ChatEncoder, Completion
from trialign.algorithms.rewards.worker import describe_error
from trialign.algorithms.roles.build import build_decoder, load_tokenizer, read_shape
from trialign.algorithms.roles.role import Role
from trialign.engine.config import ContentPath, parse
from trialign.engine.mesh import build_mesh

MOST_BYTES = 64 << 20
"""Largest request body."""


@dataclass(frozen=True)
class ServedModel(ModelPaths):
    """Reward model to serve."""

    path: ContentPath = ""
    """folder of the reward model in Hugging Face format, tokenizer included"""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """dtype of weights and computation"""


@dataclass(frozen=True)
class ServeConfig:
    """A reward model served over HTTP by one process."""

    model: ServedModel = field(default_factory=ServedModel)
    host: str = "127.0.0.1"
    """address to listen at; 0.0.0.0 accepts requests from other machines"""
    port: int = 8000
    """port to listen at (0: any that is free)"""
    chat_template: bool = True
    """format prompts with the tokenizer's chat template; false: plain text"""
    max_tokens: int = 2048
    """maximum length of a prompt with its completion in tokens; requests with a longer one are refused"""
    batch_tokens: int = 8192
    """maximum tokens per micro-batch of a forward pass"""

    def __post_init__(self) -> None:
        require(0 <= self.port < 65536, "port", self.port, "0 to 65535")
        require(self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1")
        require(self.batch_tokens >= self.max_tokens, "batch_tokens", self.batch_tokens, "at least max_tokens")


class Scores:
    """The model and its tokenizer; one request at a time.

    Raises:
        ValueError: the folder holds no reward model, or has no chat template though one is asked for.
    """

    def __init__(self, config: ServeConfig, mesh: Any):
        self.config, folder = config, config.model.path
        shape = read_shape(folder, ParallelConfig(), RunConfig(), "score")
        self.encode = ChatEncoder(folder, shape, load_tokenizer(folder, shape), config.chat_template)
        model = build_decoder(folder, shape, mesh, config.model.dtype, head="score")
        sizes = UpdateConfig(micro_batch_tokens=config.batch_tokens)
        self.role, self.lock, self.scored = Role(model, sizes=sizes), threading.Lock(), 0

    def __call__(self, rows: Sequence[Completion]) -> list[float]:
        """One score a row.

        Raises:
            ValueError: a row is too long, or the chat template refuses it; names the row.
        """
        with self.lock:
            batch = pack([self._tokens(row) for row in rows]).to(self.role.mesh.device)
            self.scored += len(batch)
            return self.role.scores(batch).tolist()

    def _tokens(self, row: Completion) -> list[int]:
        tokens = self.encode.within_positions(row)
        if len(tokens) > self.config.max_tokens:
            raise ValueError(f"{row.where}: {len(tokens)} tokens, max_tokens={self.config.max_tokens}")
        return tokens


def read_request(body: bytes) -> list[Completion]:
    """The rows of a request.

    Raises:
        ValueError: it is malformed; names the row.
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
    """The section's list with an entry a row; Nones where it is absent."""
    values = section.get(name) if isinstance(section, dict) else None
    if values is None:
        return [None] * count
    if not isinstance(values, list) or len(values) != count:
        raise ValueError(f"{name}: must be a list of {count}, one entry a row")
    return values


def read_row(where: str, prompt: Any, completion: Any, chat: Any, finished: Any, tools: Any) -> Completion:
    """A row of a request.

    Raises:
        ValueError: a field is malformed; names the row.
    """
    refuse_half_pairs(where, {"prompt": prompt, "completion": completion, "messages": chat, "tools": tools})
    messages = chat or ([{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt)
    if not isinstance(messages, list) or not messages or not isinstance(completion, str):
        raise ValueError(f"{where}: needs a prompt (a string, or messages) and a completion (a string)")
    messages = read_messages(f"{where}: 'messages'", messages)
    if finished is not None and not isinstance(finished, bool):
        raise ValueError(f"{where}: finished={finished!r:.60}: must be true or false")
    return Completion(where, messages, completion, finished is not False, parse_tools(where, tools))


def handler(scores: Scores) -> type[BaseHTTPRequestHandler]:
    """The request handler class."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if self.path != "/health":
                return self.reply(404, {"error": "GET /health, POST /score"})
            self.reply(200, {"model": scores.config.model.path, "scored": scores.scored})

        def do_POST(self) -> None:
            given = self.headers.get("Content-Length") or "0"
            size = int(given) if given.isdecimal() else -1
            if not 0 <= size <= MOST_BYTES:
                self.close_connection = True  # the unread body would be parsed as the next request
                return self.reply(413, {"error": f"Content-Length: {given}: must be 0 to {MOST_BYTES}"})
            body = self.rfile.read(size)
            if self.path != "/score":
                return self.reply(404, {"error": "GET /health, POST /score"})
            self.reply(*self.scored(body))

        def scored(self, body: bytes) -> tuple[int, dict[str, Any]]:
            """(status, response); also an unexpected error gets a response, so that no client waits for one."""
            try:
                return 200, {"scores": scores(read_request(body))}
            except ValueError as error:
                return 400, {"error": str(error)}
            except Exception as error:
                return 500, {"error": describe_error(error)}

        def reply(self, code: int, response: dict[str, Any]) -> None:
            body = json.dumps(response).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            """Logs nothing: a run sends thousands of requests."""

    return Handler


def main(argv: list[str]) -> None:
    """Loads the model and serves requests until a signal, with exit code 0; a second signal ends it at once."""
    config = parse(ServeConfig, argv)
    if not config.model.path:
        sys.exit("error: model.path is not given: the folder of a reward model, in Hugging Face format")
    if world_size() > 1:
        sys.exit(f"error: {world_size()} ranks: one process serves a model; start it with python, not with torchrun")
    try:
        scores = Scores(config, build_mesh(device=pick_device("auto")))
        with ThreadingHTTPServer((config.host, config.port), handler(scores)) as server:

            def stop(*_: Any) -> None:
                for number in SIGNALS:
                    signal.signal(number, signal.SIG_DFL)
                threading.Thread(target=server.shutdown).start()

            for number in SIGNALS:
                signal.signal(number, stop)
            print(f"{config.model.path} at http://{config.host}:{server.server_port}/score", flush=True)
            server.serve_forever()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
