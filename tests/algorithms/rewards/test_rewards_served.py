"""A reward model behind an address scores what the same model scores within the run; requests that are refused."""

import http.client
import json
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from harness import run_ranks
from tiny import tiny_llama, tiny_tokenizer
from trialign.algorithms.batch import Prompt, from_rollouts, single_turn
from trialign.algorithms.config.common import ModelPaths
from trialign.algorithms.config.reward import RewardConfig
from trialign.algorithms.rewards.scorer import Scorer
from trialign.engine.mesh import build_mesh

CHAT = [
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
]
# White space and cut answers are where text and tokens may come apart; the template writes a line after each turn.
TEMPLATE = (
    "{% if tools %}<s>tools: {{ tools | length }}</s>\n{% endif %}"
    "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    from transformers import AutoTokenizer

    path = tiny_tokenizer(tiny_llama(tmp_path_factory.mktemp("reward"), score=True, vocab_size=260))
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def serve_reward(launched):
    """launch/serve_reward.py as a module."""
    return launched("serve_reward")


@contextmanager
def served(module: Any, folder: Path, **options: Any) -> Iterator[str]:
    """The address of a reward model."""
    config = module.ServeConfig(ModelPaths(str(folder), dtype="float32"), max_tokens=128, **options)
    scores = module.Scores(config, build_mesh())
    with ThreadingHTTPServer(("127.0.0.1", 0), module.handler(scores)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/score"
        server.shutdown()


def post(url: str, body: bytes, **headers: str) -> tuple[int, dict[str, Any]]:
    """Code and answer of a request."""
    place, _, path = url.removeprefix("http://").partition("/")
    connection = http.client.HTTPConnection(place, timeout=10)
    connection.request("POST", f"/{path}", body, headers)
    response = connection.getresponse()
    return response.status, json.loads(response.read())


def test_tools_reach_the_template_and_older_requests_are_scored(folder, serve_reward):
    with served(serve_reward, folder) as url:

        def score(**more: Any) -> float:
            code, answer = post(url, json.dumps({"prompts": ["three"], "completions": ["four"], **more}).encode())
            assert code == 200, answer
            return answer["scores"][0]

        plain = score()
        assert score(messages=[CHAT[2:]], finished=[True]) == score(messages=[[]], finished=[None]) == plain
        assert score(fields={"tools": [None]}) == score(fields={"tools": [""]}) == plain
        assert score(prompts=[CHAT]) == score(messages=[CHAT])
        tools = [{"type": "function", "function": {"name": "look"}}]
        assert score(fields={"tools": [tools]}) == score(fields={"tools": [json.dumps(tools)]}) != plain
        assert len({plain, score(messages=[CHAT]), score(finished=[False])}) == 3


def request(**changes: Any) -> bytes:
    return json.dumps({"prompts": ["a", "b"], "completions": ["c", "d"]} | changes).encode()


BAD = {
    "not JSON": (b"nonsense", "not JSON"),
    "no role": (
        request(prompts=[[{"content": "x"}], "b"]),
        "row 0: 'messages'[0] must be a message {role, content}, not {'content': 'x'}",
    ),
    "messages of one": (request(messages=[[]]), "messages: must be a list of 2, one entry a row"),
    "tools in words": (request(fields={"tools": ["look", None]}), "row 0: tools='look': must be a list of function"),
    "half a pair": (request(completions=["c", "d \ud83d"]), "row 1: 'completion' holds '\\ud83d', half of a surrogate"),
    "half a pair in a message": (
        request(prompts=["a", [{"role": "user", "content": "\udc00"}]]),
        "row 1: 'prompt' holds",
    ),
    "too long": (request(completions=["c", "d" * 200]), "max_tokens=128"),
}


def test_bad_requests_are_refused(folder, serve_reward):
    with served(serve_reward, folder) as url:
        for case, (body, message) in BAD.items():
            code, answer = post(url, body)
            assert code == 400 and message in answer["error"], (case, answer)
        assert post(url, b"", **{"Content-Length": "-1"})[0] == post(url, b"", **{"Content-Length": "x"})[0] == 413
        assert post(url, request())[0] == 200
    scores = serve_reward.Scores(serve_reward.ServeConfig(ModelPaths(str(folder), dtype="float32")), build_mesh())
    with pytest.raises(ValueError, match="row 1: .* which has positions for 256"):
        scores(serve_reward.read_request(request(completions=["c", "d" * 1000])))


def test_invalid_folders_are_refused_before_loading(serve_reward, tmp_path):
    endless = tiny_tokenizer(tiny_llama(tmp_path / "endless", score=True, vocab_size=260, eos_token_id=None))
    values = json.loads((endless / "tokenizer_config.json").read_text())
    (endless / "tokenizer_config.json").write_text(json.dumps(values | {"eos_token": None}))
    with pytest.raises(ValueError, match="endless: neither its configs nor its tokenizer name an eos_token_id"):
        serve_reward.Scores(serve_reward.ServeConfig(ModelPaths(str(endless))), build_mesh())
    (endless / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match="chat_template=true, but the tokenizer of .*endless has none: set it to"):
        serve_reward.Scores(serve_reward.ServeConfig(ModelPaths(str(endless))), build_mesh())


def fails_alone(rank: int, world: int) -> str:
    """The message on a rank of an error on the first one."""
    tokenizer: Any = None
    scorer = Scorer(RewardConfig(), tokenizer, build_mesh(dp=world))

    def work() -> None:
        raise KeyError("x")

    try:
        scorer._on_first_rank(work)
    except ValueError as error:
        return str(error)
    return ""


def test_errors_of_the_first_rank_reach_every_rank():
    messages = run_ranks(fails_alone, 2)
    assert messages[0] == messages[1] and messages[0].startswith("KeyError: 'x' (")


def test_a_reward_model_s_nan_names_file_and_row():
    rollouts = [single_turn(Prompt(i, [1], "", source=f"p.jsonl:{i + 1}"), [2], [0.0], "stop") for i in range(3)]
    models: Any = [SimpleNamespace(scores=lambda *_: torch.tensor([1.0, math.nan, math.inf]))]
    tokenizer: Any = SimpleNamespace(batch_decode=lambda rows, **_: [""] * len(rows))

    def score(on_failure: Any) -> tuple[list[float], list[str]]:
        scorer = Scorer(RewardConfig(models=("runs/m",), on_failure=on_failure), tokenizer, build_mesh())
        combined = scorer.combined(scorer(rollouts, from_rollouts(rollouts), models))
        return combined, scorer.failures() + scorer.failures()

    with pytest.raises(ValueError, match="reward model runs/m: returned nan for p.jsonl:2: must be a finite number"):
        score("stop")
    combined, why = score("skip")
    assert combined[0] == 1.0 and math.isnan(combined[1]) and math.isnan(combined[2])
    assert [reason.split(": ")[1] for reason in why] == ["returned nan for p.jsonl:2", "returned inf for p.jsonl:3"]
