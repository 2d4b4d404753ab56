"""launch/sft.py, pretrain.py, reward.py, dpo.py and kto.py: outputs, resume, layouts, refused input."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from samples import write_jsonl
from scripts import (
    AXES,
    ROOT,
    agree,
    agree_in_metrics,
    assert_resume_is_identical,
    launch,
    metrics,
    reports,
    rewound,
    succeed,
    succeed_in_turn,
)
from tiny import tiny_chat_model
from tiny_run import write_config
from trialign.algorithms.config.common import ParallelConfig
from trialign.algorithms.config.preference import PairData
from trialign.algorithms.config.run import RunConfig
from trialign.algorithms.config.sft import SFTConfig, SFTData
from trialign.algorithms.data.dialogues import DialogueDataset, Encoder, joined
from trialign.algorithms.data.preferences import Pair, read_pairs
from trialign.algorithms.reward_model import pack_pairs
from trialign.algorithms.roles.build import build_decoder, read_shape
from trialign.algorithms.roles.role import Role
from trialign.engine.config import parse
from trialign.engine.mesh import build_mesh
from trialign.models.families.registry import head_of, read_config
from trialign.models.hf.convert import export_checkpoint
from trialign.models.hf.tokenizer import stop_ids

STEPS = 4
METRICS = {
    "sft": ("loss", "entropy"),
    "pretrain": ("loss", "entropy"),
    "reward": ("loss", "accuracy", "chosen", "rejected"),
    "process": ("loss", "accuracy"),
    "dpo": ("loss", "accuracy", "chosen", "rejected", "margin", "nll"),
    "kto": ("loss", "kl"),
}
SCRIPTS = {name: "reward" if name == "process" else name for name in METRICS}  # process: labeled steps


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Path:
    """A folder with a tiny chat model, rows for each kind of run, and a config a kind."""
    folder = tmp_path_factory.mktemp("supervised")
    tiny_chat_model(folder / "model", num_hidden_layers=2)
    pairs = [{"prompt": f"say {i}", "chosen": "yes " * (1 + i % 3), "rejected": "no" * (1 + i % 4)} for i in range(14)]
    labeled = [
        {"prompt": row["prompt"], "response": row[key], "label": key == "chosen"}
        for row in pairs
        for key in ("chosen", "rejected")
    ]
    steps = [
        {"prompt": row["prompt"], "steps": ["yes"] * (1 + i % 2) + ["no"] * (1 + i % 3), "labels": labels}
        for i, row in enumerate(pairs)
        for labels in [[True] * (1 + i % 2) + [False] * (1 + i % 3)]
    ]
    counts: list[dict] = [{"prompt": f"to {i}", "response": " ".join(map(str, range(i + 1)))} for i in range(1, 12)]
    turns = ("user", "hi"), ("assistant", "yo"), ("user", "and now?")
    chats = [
        {"messages": [{"role": role, "content": text} for role, text in (*turns, ("assistant", f"bye {i}"))]}
        for i in range(6)
    ]
    texts = [{"text": row["response"]} for row in counts]
    rows = {"sft": counts + chats, "pretrain": texts, "reward": pairs, "process": steps, "dpo": pairs, "kto": labeled}
    for name, own in rows.items():
        section = "steps" if name == "process" else "data"
        given = {
            "model_path": f"{folder}/model",
            "model_dtype": "float32",
            f"{section}_sources": [str(write_jsonl(folder / f"{name}.jsonl", own))],
            f"{section}_max_tokens": 64 if name == "sft" else 48,
            f"{section}_eval_fraction": 0.25,
            "optimizer_lr": 5e-3,
            "optimizer_eps": 1e-5,
            "update_batch_size": 4,
            "update_micro_batch_tokens": 128,
            "run_steps": STEPS,
            "run_eval_every": 2,
            "run_save_every": 1,
            "run_keep": STEPS,
            "run_log": (),
        }
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
    assert all(name in step for name in METRICS[kind] for step in steps[1:])
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


def test_exported_sft_model_has_the_eval_loss(setting, whole):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run = whole["sft"]
    model = AutoModelForCausalLM.from_pretrained(run / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(run / "model")
    shape = read_config(run / "model")
    data = SFTData(sources=(f"{setting}/sft.jsonl",), max_tokens=64, eval_fraction=0.25)
    evaluated = joined(DialogueDataset(data, tokenizer, stop_ids(run / "model", shape, tokenizer)).eval_rows)
    targets = sum(sample.targets for sample in evaluated)
    loss = 0.0
    for sample in evaluated:
        tokens = torch.tensor(sample.tokens.tolist())[None]
        labels = torch.where(torch.tensor(list(sample.mask)).bool(), tokens, -100)
        with torch.no_grad():
            loss += model(input_ids=tokens, labels=labels, num_items_in_batch=targets).loss.item()
    assert metrics(run)[-1]["eval_loss"] == pytest.approx(loss, rel=1e-5)
    average = AutoModelForCausalLM.from_pretrained(run / "model_ema", dtype=torch.float32)
    start = AutoModelForCausalLM.from_pretrained(setting / "model", dtype=torch.float32)
    for a, b, c in zip(start.parameters(), average.parameters(), model.parameters(), strict=True):
        assert (b - a).norm() < (c - a).norm()


@pytest.mark.parametrize(("side", "end"), [("right", "</s>"), ("left", "</s>"), ("right", "")])
def test_exported_reward_model_scores_alike_by_the_code_of_the_docs(setting, whole, tmp_path, side, end):
    """A padded batch in transformers; the template writes a newline after the end token, or no end token at all, and
    then `append_eos` and the change described in the docs add it."""
    from transformers import AutoTokenizer

    folder = tmp_path / "model"
    export_checkpoint(whole["reward"] / "checkpoints" / f"step_{STEPS}", folder, role="reward", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side=side)
    tokenizer.chat_template = str(tokenizer.chat_template).replace("</s>{% endfor", f"{end}\n{{% endfor")
    tokenizer.save_pretrained(folder)
    shape, mesh = read_config(folder), build_mesh()
    assert shape.pad_id == tokenizer.pad_token_id != tokenizer.eos_token_id
    data = PairData(append_eos=not end)
    drawn: list[Pair] = read_pairs(f"{setting}/reward.jsonl", data, Encoder(data, tokenizer, (2,)))
    batch = pack_pairs(drawn)
    role = Role(build_decoder(str(folder), shape, mesh, "float32", head="score"))
    scores = role.scores(batch)
    rows = [json.loads(line) for line in (setting / "reward.jsonl").read_text().splitlines()]
    chats = [
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[key]}]
        for row in rows
        for key in ("chosen", "rejected")
    ]
    (lines,) = re.findall(r"```python\n(import torch\n.*?)```", (ROOT / "docs" / "reward.md").read_text(), re.DOTALL)
    if not end:
        lines = lines.replace(".rstrip()", ".rstrip() + tokenizer.eos_token")
    names = {"chats": chats}
    with torch.no_grad():
        exec(lines.replace("runs/reward_smollm2/model", str(folder)), names)
    expected: Any = names["scores"]
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)
    assert (scores[::2] > scores[1::2]).float().mean() >= 0.75 and len(set(batch.lengths)) > 2


@pytest.mark.parametrize("place", ["model", f"checkpoints/step_{STEPS}"])
def test_process_reward_model_is_refused_as_reward_model(whole, place):
    with pytest.raises(ValueError, match="process reward model"):
        read_shape(str(whole["process"] / place), ParallelConfig(), RunConfig(), "score")
    assert head_of(read_shape(str(whole["reward"] / place), ParallelConfig(), RunConfig(), "score")) == "score"


@pytest.mark.parametrize("kind", SCRIPTS)
def test_resume_is_bit_identical(setting, whole, kind):
    given = (SCRIPTS[kind], "--config", f"{setting}/{kind}.toml")
    printed = assert_resume_is_identical("checkpoints/step_*", setting / f"{kind}-killed", whole[kind], STEPS, *given)
    assert "computed once" not in printed  # the reference's log-probabilities are in the folder


@pytest.fixture(scope="module")
def moved(setting, whole) -> None:
    """Each run's last three steps in every layout."""
    runs = []
    for kind, axis in ((kind, axis) for kind in SCRIPTS for axis in AXES):
        folder = rewound(whole[kind], setting / f"{kind}-{axis}", 1)
        shutil.rmtree(folder / "reference", ignore_errors=True)  # computed again, in this layout
        runs.append((SCRIPTS[kind], "--resume", folder, f"--parallel.{axis}", 2))
    succeed_in_turn(runs)


@pytest.mark.parametrize("axis", AXES)
@pytest.mark.parametrize("kind", SCRIPTS)
def test_resume_in_another_layout_agrees(setting, whole, moved, kind, axis):
    agree(setting / f"{kind}-{axis}", whole[kind], STEPS)
    if kind in ("sft", "pretrain"):
        agree_in_metrics(setting / f"{kind}-{axis}", whole[kind])


@pytest.mark.parametrize(
    ("kind", "given", "reported"),
    [
        ("dpo", ("--update.batch_size", "3"), "update.batch_size=3"),
        ("dpo", ("--update.micro_batch_tokens", "64"), "update.micro_batch_tokens=64"),
        ("dpo", [{"prompt": "a", "chosen": "b", "rejected": "c"}, {"prompt": "a", "chosen": "b"}], "bad.jsonl:2"),
        ("sft", [{"prompt": "a", "response": "b"}, {"prompt": "a", "response": ""}], "bad.jsonl:2"),
    ],
)
def test_bad_input_is_reported_once_by_two_ranks(setting, tmp_path, kind, given, reported):
    if isinstance(given, list):
        given = ("--data.sources", write_jsonl(tmp_path / "bad.jsonl", given))
    done = launch(kind, "--config", f"{setting}/{kind}.toml", "--run.output", tmp_path / "run", *given, ranks=2)
    assert done.returncode != 0 and reports(done, reported) == 1, done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("kind", "score"), [("reward", "(chosen)"), ("process", "(step 1)")])
def test_nonfinite_eval_score_is_reported_by_row(setting, tmp_path, kind, score):
    """The weights are finite, the scores are not."""
    shutil.copytree(setting / "model", tmp_path / "model")
    weights = load_file(setting / "model" / "model.safetensors")
    weights["model.norm.weight"].fill_(3e38)
    save_file(weights, tmp_path / "model" / "model.safetensors", {"format": "pt"})
    given = ("--model.path", f"{tmp_path}/model", "--run.output", f"{tmp_path}/run")
    done = launch("reward", "--config", f"{setting}/{kind}.toml", *given)
    assert done.returncode != 0 and "Traceback" not in done.stderr, done.stderr
    assert re.search(rf"error: \S+/{kind}\.jsonl:\d+ {re.escape(score)}:", done.stderr), done.stderr


@pytest.mark.parametrize(
    ("given", "world", "reported"),
    [
        ("--data.sources a.jsonl", 1, "model.path"),
        ("--model.path m", 1, "data.sources"),
        ("--model.path m --data.sources a --parallel.tp 2", 3, "world size 3"),
    ],
)
def test_missing_or_unfit_options_are_refused(given, world, reported):
    with pytest.raises(ValueError, match=reported):
        parse(SFTConfig, given.split()).check(world)
