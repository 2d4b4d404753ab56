"""Serves a reward model by HTTP, for the reward.servers of other runs.

    python launch/serve_reward.py --model.path runs/reward/model --port 8000

    POST /score {"prompts": ["..."], "completions": ["..."]}   ->  {"scores": [0.5, ...]}
    GET  /health                                               ->  {"model": "...", "scored": 128}

A prompt is what the user says, or a list of {role, content} messages; the completion is the assistant's turn after it.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from trialign.algorithms.batch import micro_batches, pack
from trialign.algorithms.build import build_decoder, load_tokenizer, read_shape
from trialign.algorithms.config import ModelPaths, ParallelConfig, RunConfig, require
from trialign.algorithms.dialogue import Dialogue, tokenise
from trialign.algorithms.roles import Role
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


class Scores:
    """The model and its tokenizer; one request at a time.

    Raises:
        ValueError: the folder holds no reward model.
    """

    def __init__(self, config: ServeConfig, mesh: Any):
        self.config, folder = config, config.model.path
        self.shape = read_shape(folder, ParallelConfig(), RunConfig(), "score")
        self.tokenizer = load_tokenizer(folder, self.shape)
        self.ends = stop_ids(folder, self.shape)
        model = build_decoder(folder, self.shape, mesh, config.model.dtype, head="score")
        self.role, self.lock, self.scored = Role(model), threading.Lock(), 0

    def __call__(self, prompts: list[Any], completions: list[str]) -> list[float]:
        """One score a completion, read at its last token.

        Raises:
            ValueError: a prompt is no prompt, or too long; names the row.
        """
        dialogues = [self._dialogue(i, *row) for i, row in enumerate(zip(prompts, completions, strict=True))]
        with self.lock:
            samples = list(tokenise(dialogues, self.tokenizer, self.ends, self.config.chat_template))
            for sample in samples:
                if len(sample.tokens) > self.config.max_tokens:
                    raise ValueError(
                        f"{sample.where}: {len(sample.tokens)} tokens, max_tokens={self.config.max_tokens}"
                    )
            batch = pack([sample.tokens.tolist() for sample in samples]).to(self.role.mesh.device)
            shares = micro_batches(range(len(batch)), batch.lengths, 1, self.config.batch_tokens)
            self.scored += len(batch)
            return self.role.scores(batch, shares).tolist()

    def _dialogue(self, row: int, prompt: Any, completion: Any) -> Dialogue:
        where = f"row {row}"
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        whole = isinstance(messages, list) and messages and all(isinstance(m, dict) and "role" in m for m in messages)
        if not whole or not isinstance(completion, str):
            raise ValueError(f"{where}: needs a prompt (a string, or messages) and a completion (a string)")
        return Dialogue(where, [*messages, {"role": "assistant", "content": completion}], [len(messages)], None)


def read_request(body: bytes) -> tuple[list[Any], list[str]]:
    """Prompts and completions of a request.

    Raises:
        ValueError: it is not what is asked for.
    """
    try:
        request = json.loads(body)
    except ValueError:
        raise ValueError("not JSON") from None
    prompts = request.get("prompts") if isinstance(request, dict) else None
    completions = request.get("completions") if isinstance(request, dict) else None
    if not isinstance(prompts, list) or not isinstance(completions, list):
        raise ValueError('needs {"prompts": [...], "completions": [...]}')
    if len(prompts) != len(completions) or not prompts:
        raise ValueError(f"{len(prompts)} prompts and {len(completions)} completions: as many of each, 1 at least")
    return prompts, completions


def handler(scores: Scores) -> type[BaseHTTPRequestHandler]:
    """What answers requests."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            if self.path != "/health":
                return self.answer(404, {"error": "GET /health, POST /score"})
            self.answer(200, {"model": scores.config.model.path, "scored": scores.scored})

        def do_POST(self) -> None:
            size = int(self.headers.get("Content-Length") or 0)
            if size > MOST_BYTES:
                self.close_connection = True  # what is not read would be taken for the next request
                return self.answer(413, {"error": f"{size} bytes: {MOST_BYTES} at most"})
            body = self.rfile.read(size)
            if self.path != "/score":
                return self.answer(404, {"error": "GET /health, POST /score"})
            try:
                self.answer(200, {"scores": scores(*read_request(body))})
            except ValueError as error:
                self.answer(400, {"error": str(error)})

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
