"""launch/sft.py, pretrain.py, reward.py, dpo.py and kto.py: outputs, resume, layouts, refused input."""

import importlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from samples import write_jsonl
from scripts import AXES, agree, assert_resume_identical, launch, metrics, rewound, succeed, succeed_in_turn
from tiny import tiny_chat_model
from tiny_run import write_config
from trialign.algorithms.config.common import ParallelConfig
from trialign.algorithms.config.preference import PairData
from trialign.algorithms.config.run import RunConfig
from trialign.algorithms.data.dialogues import Encoder
from trialign.algorithms.data.preferences import read_pairs
from trialign.algorithms.reward_model import pack_pairs
from trialign.algorithms.roles.build import build_decoder, read_shape
from trialign.algorithms.roles.role import Role
from trialign.engine.mesh import build_mesh
from trialign.models.families.registry import head_of, read_config
from trialign.models.hf.convert import export_checkpoint

# Helpers of tests in other folders, which pyright does not search.
overflowing_model = importlib.import_module("test_nonfinite").overflowing_model
server = importlib.import_module("test_rewards_served")
STEPS = 4
SIDES = ("chosen", "rejected")
SCRIPTS = {kind: kind for kind in ("sft", "pretrain", "reward", "dpo", "kto")} | {"process": "reward"}  # labeled steps


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Path:
    """A folder with a tiny chat model, rows for each kind of run, and a config a kind."""
    folder = tmp_path_factory.mktemp("supervised")
    tiny_chat_model(folder / "model", num_hidden_layers=2)
    pairs = [{"prompt": f"say {i}", "chosen": "yes " * (1 + i % 3), "rejected": "no" * (1 + i % 4)} for i in range(14)]
    labeled = [{"prompt": r["prompt"], "response": r[k], "label": k == "chosen"} for r in pairs for k in SIDES]
    labels = [[True] * (1 + i % 2) + [False] * (1 + i % 3) for i in range(len(pairs))]
    words = [["yes" if good else "no" for good in own] for own in labels]
    steps = [{"prompt": "say", "steps": own, "labels": good} for own, good in zip(words, labels, strict=True)]
    counts: list[dict] = [{"prompt": f"to {i}", "response": " ".join(map(str, range(i + 1)))} for i in range(1, 12)]
    roles = ("user", "assistant", "user", "assistant")
    chats = [{"messages": [{"role": role, "content": f"{role[0]} {i}"} for role in roles]} for i in range(6)]
    texts = [{"text": row["response"]} for row in counts]
    rows = {"sft": counts + chats, "pretrain": texts, "reward": pairs, "process": steps, "dpo": pairs, "kto": labeled}
    for name, own in rows.items():
        section = "steps" if name == "process" else "data"
        given: dict = {"model_path": folder / "model", "model_dtype": "float32", f"{section}_eval_fraction": 0.25}
        given |= {f"{section}_sources": [write_jsonl(folder / f"{name}.jsonl", own)], f"{section}_max_tokens": 64}
        given |= {"optimizer_lr": 5e-3, "optimizer_eps": 1e-5, "update_batch_size": 4, "update_micro_batch_tokens": 128}
        given |= {"run_steps": STEPS, "run_eval_every": 2, "run_save_every": 1, "run_keep": STEPS, "run_log": ()}
        if name == "sft":
            given |= {"update_ema_decay": 0.5, "run_show": 1, "run_show_tokens": 4, "optimizer_lr": 1e-2}
        write_config(folder / f"{name}.toml", **given)
    return folder


@pytest.fixture(scope="module")
def whole(setting) -> dict[str, Path]:
    """An uninterrupted run of each kind."""
    for kind, script in SCRIPTS.items():
        printed = succeed(script, "--config", f"{setting}/{kind}.toml", "--run.output", f"{setting}/{kind}-whole")
        assert f"after {STEPS} steps:" in printed
        assert ("computed once" in printed) == (kind in ("dpo", "kto"))
        if kind == "sft":
            assert "13 rows of" in printed and "stop tokens: </s> (2)" in printed and "in the data" in printed
    return {kind: setting / f"{kind}-whole" for kind in SCRIPTS}


@pytest.mark.parametrize("kind", SCRIPTS)
def test_outputs_of_a_run(setting, whole, kind):
    run, script = whole[kind], SCRIPTS[kind]
    steps = metrics(run)
    assert [step["step"] for step in steps] == list(range(STEPS + 1))
    evaluated = {"sft": "eval_loss", "pretrain": "eval_perplexity"}.get(kind, "eval_accuracy")
    assert [evaluated in step for step in steps] == [True, False, True, False, True]
    if kind == "sft":
        assert steps[-1]["eval_loss"] < steps[2]["eval_loss"] < steps[0]["eval_loss"]
        assert steps[-1]["loss"] < steps[1]["loss"] and steps[-1]["epoch"] == pytest.approx(16 / 13)
    elif kind != "pretrain":
        assert steps[-1]["eval_accuracy"] >= 0.75  # "yes" against "no" is soon learned
    assert (run / f"{script}.png").stat().st_size > 10_000
    if script == "dpo":  # the policy is the reference
        assert steps[1]["loss"] == pytest.approx(0.6931472) and steps[0]["eval_accuracy"] == 0.5
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    auto = AutoModelForSequenceClassification if script == "reward" else AutoModelForCausalLM
    model = dict(auto.from_pretrained(run / "model", dtype=torch.float32).named_parameters())
    start = AutoModelForCausalLM.from_pretrained(setting / "model", dtype=torch.float32)
    moved = [not torch.equal(model[name], weight) for name, weight in start.named_parameters() if name in model]
    assert all(moved) and len(moved) >= len(model) - 1


@pytest.mark.parametrize(("side", "end"), [("left", "</s>"), ("right", "")])
def test_exported_reward_model_scores_alike_by_the_code_of_the_docs(setting, whole, tmp_path, side, end):
    """A padded batch; the template ends with a newline, or without an end token, which `append_eos` adds."""
    from transformers import AutoTokenizer

    folder = tmp_path / "model"
    export_checkpoint(whole["reward"] / "checkpoints" / f"step_{STEPS}", folder, role="reward", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side=side)
    tokenizer.chat_template = str(tokenizer.chat_template).replace("</s>{% endfor", f"{end}\n{{% endfor")
    tokenizer.save_pretrained(folder)
    shape, mesh = read_config(folder), build_mesh()
    assert shape.pad_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    data = PairData(append_eos=not end)
    batch = pack_pairs(read_pairs(f"{setting}/reward.jsonl", data, Encoder(data, tokenizer, (2,))))
    scores = Role(build_decoder(str(folder), shape, mesh, "float32", head="score")).scores(batch)
    rows = [json.loads(line) for line in (setting / "reward.jsonl").read_text().splitlines()]
    texts = [(row["prompt"], row[key]) for row in rows for key in SIDES]
    chats = [[{"role": "user", "content": p}, {"role": "assistant", "content": r}] for p, r in texts]
    (lines,) = re.findall(r"```python\n(import torch\n.*?)```", (ROOT / "docs" / "reward.md").read_text(), re.DOTALL)
    if not end:
        lines = lines.replace(".rstrip()", ".rstrip() + tokenizer.eos_token")
    names = {"chats": chats}
    with torch.no_grad():
        exec(lines.replace("runs/reward_smollm2/model", str(folder)), names)
    expected: Any = names["scores"]
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)
    assert (scores[::2] > scores[1::2]).float().mean() >= 0.75 and len(set(batch.lengths)) > 2


def test_reward_server_survives_unexpected_errors(whole, launched, monkeypatch):
    module = launched("serve_reward")

    def fail(body: bytes) -> None:
        raise TypeError("planted")

    with server.served(module, whole["reward"] / "model") as url:
        with monkeypatch.context() as patch:
            patch.setattr(module, "read_request", fail)
            status, response = server.post(url, server.request())
            assert status == 500 and response["error"].startswith("TypeError: planted")
        assert server.post(url, server.request())[0] == 200


@pytest.mark.parametrize("place", ["model", f"checkpoints/step_{STEPS}"])
def test_process_reward_model_is_refused_as_reward_model(whole, place):
    with pytest.raises(ValueError, match="process reward model"):
        read_shape(str(whole["process"] / place), ParallelConfig(), RunConfig(), "score")
    assert head_of(read_shape(str(whole["reward"] / place), ParallelConfig(), RunConfig(), "score")) == "score"


@pytest.mark.parametrize("kind", SCRIPTS)
def test_resume_is_bit_identical(setting, whole, kind):
    given = (SCRIPTS[kind], "--config", f"{setting}/{kind}.toml")
    printed = assert_resume_identical("checkpoints/step_*", setting / f"{kind}-killed", whole[kind], STEPS, *given)
    assert "computed once" not in printed  # the reference's log-probabilities are in the folder


def test_resume_in_another_layout_agrees(setting, whole):
    """The last three steps of each run."""
    folders = {(kind, axis): setting / f"{kind}-{axis}" for kind in SCRIPTS for axis in AXES}
    for (kind, _), folder in folders.items():
        # The reference's log-probabilities are computed again, in this layout.
        shutil.rmtree(rewound(whole[kind], folder, 1) / "reference", ignore_errors=True)
    succeed_in_turn([(SCRIPTS[k], "--resume", folder, f"--parallel.{a}", 2) for (k, a), folder in folders.items()])
    for (kind, _), folder in folders.items():
        agree(folder, whole[kind], STEPS, logged=kind in ("sft", "pretrain"))


def test_bad_input_is_reported_once_by_two_ranks(setting, tmp_path):
    bad = write_jsonl(tmp_path / "bad.jsonl", [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a"}])
    for given, reported in (
        (("--update.batch_size", 3), "update.batch_size=3"),
        (("--data.sources", bad), "bad.jsonl:2"),
    ):
        done = launch("dpo", "--config", setting / "dpo.toml", "--run.output", tmp_path / "run", *given, ranks=2)
        reports = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode != 0 and len(reports) == 1 and reported in reports[0], done.stderr
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("kind", "score"), [("reward", "(chosen)"), ("process", "(step 1)")])
def test_nonfinite_eval_score_is_reported_by_row(setting, tmp_path, kind, score):
    """The weights are finite, the scores are not."""
    overflowing_model(tmp_path / "model")
    given = ("--model.path", f"{tmp_path}/model", "--run.output", f"{tmp_path}/run")
    done = launch("reward", "--config", f"{setting}/{kind}.toml", *given)
    assert done.returncode != 0 and "Traceback" not in done.stderr, done.stderr
    assert re.search(rf"error: \S+/{kind}\.jsonl:\d+ {re.escape(score)}:", done.stderr), done.stderr
