"""Rewards by HTTP: servers that are down, slow or broken, scorers that abstain, and a served reward model."""

import http.server
import json
import math
import os
import re
import signal
import socket
import socketserver
import struct
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
import torch
from tiny import tiny_llama, tiny_tokenizer
from trialign.algorithms.batch import Prompt, pack
from trialign.algorithms.policy_step import without_unscored
from trialign.algorithms.rewards import http as reward_server
from trialign.algorithms.rewards.http import RewardClient
from trialign.algorithms.rewards.shaping import RewardShaper, combine

ROOT = Path(__file__).resolve().parents[3]
CHATS = [({"role": "system", "content": "be brief"}, {"role": "user", "content": f"p{i}"}) for i in range(5)]
PROMPTS = [Prompt(i, [1], f"p{i}", {"goal": i}, f"a.jsonl:{i + 1}", CHATS[i]) for i in range(5)]
TEXTS = ["a", "bb", "ccc", "dddd", "eeeee"]
ENDED = [True, False, True, True, True]


@contextmanager
def serving(answer: Callable[[dict], tuple[int, bytes]]) -> Iterator[tuple[str, list[dict]]]:
    """A server on loopback; `answer` gives code and body for a request."""
    seen: list[dict] = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            seen.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            made = answer(seen[-1])
            self.send_response(made[0])
            self.send_header("Content-Length", str(len(made[1])))
            self.end_headers()
            self.wfile.write(made[1])

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/score", seen
    finally:
        server.shutdown()
        server.server_close()


def lengths(request: dict) -> tuple[int, bytes]:
    return 200, json.dumps({"scores": [len(c) for c in request["completions"]]}).encode()


def test_requests_are_batches_with_columns():
    with serving(lengths) as (url, seen):
        assert RewardClient(url, batch=2).score(PROMPTS, TEXTS, ENDED) == [1, 2, 3, 4, 5]
    assert [len(request["completions"]) for request in seen] == [2, 2, 1]
    assert seen[0]["finished"] == [True, False]
    assert seen[1] == {
        "prompts": ["p2", "p3"],
        "completions": ["ccc", "dddd"],
        "messages": [list(chat) for chat in CHATS[2:4]],
        "finished": [True, True],
        "fields": {"goal": [2, 3]},
    }
    columns = [{"goal": math.nan, "deep": {"a": [1.5, math.inf]}}, {"goal": 2.0}]  # JSON has no such numbers
    with serving(lengths) as (url, seen):
        RewardClient(url).score([Prompt(i, [1], "p", own) for i, own in enumerate(columns)], TEXTS[:2], ENDED[:2])
    assert seen[0]["fields"] == {"goal": [None, 2.0], "deep": [{"a": [1.5, None]}, None]}


@pytest.mark.parametrize(
    "row", [Prompt(0, [1], "p", {}, "a.jsonl:1"), Prompt(0, [1], "p", {"id": "\ud83d"}, "a.jsonl:1")]
)
def test_half_a_surrogate_pair_is_refused_by_its_row(row):
    """It is no text: a server would refuse the whole request. A whole pair, an emoji, is text."""
    with serving(lengths) as (url, seen), pytest.raises(ValueError, match=r"a\.jsonl:1: '\w+' holds '\\ud83d', half"):
        RewardClient(url).score([row], ["a \U0001f600" if row.fields else "a \ud83d"], [True])
    assert not seen
    with serving(lengths) as (url, _):
        assert RewardClient(url).score([Prompt(0, [1], "p")], ["\U0001f600"], [True]) == [1]


INVALID = {
    "wrong count": (lambda r: (200, b'{"scores": [1, 2]}'), "returned 2 scores for 5 completions"),
    "NaN": (lambda r: (200, b'{"scores": [1, 2, NaN, 4, 5]}'), "returned nan for a.jsonl:3: must be a finite number"),
    "text": (lambda r: (200, b'{"scores": ["1", 2, 3, 4, 5]}'), "returned '1' for a.jsonl:1: must be a finite number"),
    "a huge integer": (
        lambda r: (200, b'{"scores": [1, 2, 3, 4, 1%s]}' % (b"0" * 400)),
        "for a.jsonl:5: must be a fini",
    ),
    "no scores": (lambda r: (200, b"[1, 2, 3, 4, 5]"), 'must be {"scores": [...]}'),
    "brackets": (lambda r: (200, b"[" * 100_000), "response is not JSON, '[[["),
    "refusal": (lambda r: (400, b"no such model"), "answered HTTP 400: 'no such model'"),
}


@pytest.mark.parametrize("case", INVALID)
def test_invalid_scores_are_refused_at_once(case):
    answer, message = INVALID[case]
    with serving(answer) as (url, seen):
        with pytest.raises(ValueError) as error:
            RewardClient(url, pause=0.01).score(PROMPTS, TEXTS, ENDED)
    assert message in str(error.value) and url in str(error.value) and "a.jsonl:" in str(error.value)
    assert len(seen) == 1


def drip(connection: socket.socket) -> None:
    """A header without end, every part of it in time."""
    while True:
        connection.sendall(b"a")
        time.sleep(0.02)


def reset(connection: socket.socket) -> None:
    """The end of a connection of a process that is killed."""
    time.sleep(0.1)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


HALF, ERROR = b'HTTP/1.1 200 X\r\nContent-Length: 99\r\n\r\n{"sco', b"HTTP/1.1 %d X\r\nContent-Length: 999\r\n\r\n"
BROKEN = {  # sent, what follows, message, attempts
    "no answer": (b"", lambda c: None, "no connection: ", 2),
    "half an answer": (HALF, lambda c: None, "IncompleteRead", 2),
    "a reset": (HALF, reset, "Connection reset", 2),
    "a header without end": (b"HTTP/1.1 200 X\r\n", drip, "took longer than reward.time_limit=0.4 seconds", 2),
    "an error without end": (ERROR % 503, drip, "answered HTTP 503: ''", 2),
    "a refusal that is cut": (ERROR % 400, reset, "answered HTTP 400: ''", 1),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_responses_are_given_up_in_time(case):
    """All rows are named, or abstain."""
    (begin, then, message, attempts), seen = BROKEN[case], []

    class Handler(socketserver.BaseRequestHandler):
        def handle(self):
            seen.append(self.request.recv(1 << 16))
            with suppress(OSError):
                self.request.sendall(begin)
                then(self.request)

    class Server(socketserver.ThreadingTCPServer):
        daemon_threads, block_on_close = True, False

    with Server(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url, started = f"http://127.0.0.1:{server.server_address[1]}/score", time.monotonic()
        with pytest.raises(ValueError, match=f"{re.escape(message)}.* for 5 rows: a.jsonl:1"):
            RewardClient(url, 0.4, attempts=2, pause=0.01).score(PROMPTS, TEXTS, ENDED)
        assert len(seen) == attempts and time.monotonic() - started < 1.5
        abstaining = RewardClient(url, 0.4, attempts=1, skip_failures=True)
        assert all(score is not None and math.isnan(score) for score in abstaining.score(PROMPTS, TEXTS, ENDED))
        assert len(abstaining.failures) == 1 and message in abstaining.failures[0]
        server.shutdown()


def test_an_answer_without_end_is_given_up(monkeypatch):
    """Not read until memory is full, nor asked for again."""
    monkeypatch.setattr(reward_server, "LONGEST", 1 << 20)
    with serving(lambda request: (200, b" " * (3 << 20))) as (url, seen):
        with pytest.raises(ValueError, match="answered more than 1,048,576 bytes for 5 rows: a.jsonl:1"):
            RewardClient(url).score(PROMPTS, TEXTS, ENDED)
    assert len(seen) == 1


def test_busy_servers_are_tried_again():
    answers = iter([(503, b"busy"), (429, b"later")])

    def busy(request: dict) -> tuple[int, bytes]:
        return next(answers, None) or lengths(request)

    with serving(busy) as (url, seen):
        assert RewardClient(url, pause=0.01).score(PROMPTS, TEXTS, ENDED) == [1, 2, 3, 4, 5]
    assert len(seen) == 3
    with serving(lambda request: (503, b"busy")) as (url, _):
        with pytest.raises(ValueError, match=r"answered HTTP 503: 'busy' \(3 attempts\)"):
            RewardClient(url, pause=0.01).score(PROMPTS, TEXTS, ENDED)


def test_only_failed_rows_abstain():
    def second_fails(request: dict) -> tuple[int, bytes]:
        return (400, b"no") if "ccc" in request["completions"] else lengths(request)

    with serving(second_fails) as (url, _):
        server = RewardClient(url, batch=2, skip_failures=True)
        scores = server.score(PROMPTS, TEXTS, ENDED)
    assert [s if s == s else None for s in scores] == [1, 2, None, None, 5]
    assert len(server.failures) == 1 and "answered HTTP 400" in server.failures[0]
    with serving(lambda request: (200, b'{"scores": [null, 2, 3, 4, null]}')) as (url, _):  # rows that are not its own
        assert RewardClient(url).score(PROMPTS, TEXTS, ENDED) == [None, 2, 3, 4, None]
    with serving(INVALID["NaN"][0]) as (url, _):
        scores = RewardClient(url, skip_failures=True).score(PROMPTS, TEXTS, ENDED)
    assert [s if s == s else None for s in scores] == [1, 2, None, 4, 5]


def test_abstaining_samples_move_no_statistic():
    nan = math.nan
    combined = combine({"a": [1.0, nan, 3.0, None, None, nan], "b": [1.0, 2.0, nan, 5.0, None, None]}, [1.0, 0.5])
    assert str(combined) == "[1.5, nan, nan, 2.5, nan, nan]"  # None: the scorer does not apply to the row
    shaper, alone = (RewardShaper(0.5, normalize=True) for _ in range(2))
    rewards = shaper([1.0, nan, 3.0, 5.0], [True] * 4)
    assert math.isnan(rewards[1]) and [rewards[i] for i in (0, 2, 3)] == alone([1.0, 3.0, 5.0], [True] * 3)
    assert shaper.state() == alone.state()


def test_abstaining_samples_have_no_targets():
    batch = pack([[1, 2, 3], [1, 2], [1, 2, 3, 4]])
    left = without_unscored(batch, torch.tensor([0.5, math.nan, 1.0]))
    assert left.response.tolist() == [1, 2, 6, 7, 8] and left.lengths == batch.lengths
    assert without_unscored(batch, torch.tensor([0.5, 0.0, 1.0])).mask is batch.mask
    with pytest.raises(ValueError, match="no response of the step has a score"):
        without_unscored(batch, torch.full((3,), math.nan))


def test_a_served_reward_model_gives_transformers_scores(tmp_path):
    folder = tiny_tokenizer(tiny_llama(tmp_path / "reward", score=True, vocab_size=260))
    command = [sys.executable, str(ROOT / "launch/serve_reward.py"), "--port", "0", "--max_tokens", "64"]
    command += ["--batch_tokens", "64", "--model.path", str(folder), "--model.dtype", "float32"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        server = RewardClient(url, batch=2, pause=0.01)
        scores = server.score(PROMPTS, TEXTS, ENDED)
        health = json.loads(urllib.request.urlopen(url.replace("/score", "/health"), timeout=10).read())
        assert health == {"model": str(folder), "scored": 5}
        with pytest.raises(ValueError, match=r"HTTP 400: .*row 1: \d+ tokens, max_tokens=64"):
            server.score(PROMPTS[:2], ["a", "b" * 80], ENDED[:2])
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 0

    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    for chat, text, ended, mine in zip(CHATS, TEXTS, ENDED, scores, strict=True):
        whole = [*chat, {"role": "assistant", "content": text}]
        tokens = tokenizer.apply_chat_template(whole, return_tensors="pt", return_dict=True)["input_ids"]
        body = model.model(tokens).last_hidden_state[0, -1 if ended else -2]
        assert mine == pytest.approx(model.score(body).item(), rel=1e-4, abs=1e-5)
