"""launch/show_data.py: what it shows of each kind of data is what the run would learn, token by token."""

import importlib
import json
import re
from pathlib import Path

import pytest
from samples import write_jsonl
from scripts import ROOT, launch, succeed
from tiny import tiny_chat_model
from trialign.algorithms.config.pretrain import TextData
from trialign.algorithms.data.documents import TextStream


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Path:
    """A tiny model and a file of each kind of rows, with one that is too long."""
    folder = tmp_path_factory.mktemp("data")
    tiny_chat_model(folder / "model")
    long = "long " * 50
    files = {
        "sft": [{"prompt": "hi", "response": "yo"}, {"prompt": "hi", "response": long}],
        "dpo": [
            {"prompt": "p", "chosen": "good", "rejected": "bad"},
            {"prompt": "p", "chosen": long, "rejected": "bad"},
        ],
        "kto": [{"prompt": "p", "response": "x", "label": True}, {"prompt": "q", "response": "y", "label": False}],
        "ppo": [{"prompt": "ask"}, {"prompt": long}],
        "conditional": [{"prompt": "p", "response": "r", "reward": r} for r in (0, 1)],
        "reward": [{"prompt": "p", "steps": ["a", "b"], "labels": [True, False]}],
        "pretrain": [{"text": "one"}, {"text": "two"}, {"text": ""}],
    }
    for name, lines in files.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        section = "steps" if name == "reward" else "data"
        (folder / f"{name}_tiny.toml").write_text(
            f'[model]\npath = "{folder}/model"\n[{section}]\nsources = ["{folder}/{name}.jsonl"]\n'
        )
    return folder


@pytest.mark.parametrize(
    ("name", "knobs", "shown"),
    [
        (
            "sft",
            ("--data.max_tokens", 64),
            ["1 dropped for more than 64 tokens", "25 tokens, 3 learned", "<s>user: hi</s><s>assistant: ⟦yo</s>⟧"],
        ),
        (
            "dpo",
            ("--data.max_tokens", 64),
            ["1 pairs of", "1 dropped for", "<s>assistant: ⟦good</s>⟧", "<s>assistant: ⟦bad</s>⟧", "1, chosen: "],
        ),
        ("kto", (), ["<s>assistant: ⟦x</s>⟧", "1, wanted: ", "2, not wanted: "]),
        (
            "ppo",
            ("--data.max_prompt_tokens", 64),
            ["1 prompts, 1 dropped", " 0 learned", "<s>user: ask</s><s>assistant: "],
        ),
        ("conditional", (), ["user: p <rm_score>: -0.71 </s><s>assistant: ⟦r</s>⟧", "2 rewards written: -0.71, 0.71"]),
        ("reward", (), ["labels (True, False): ", "1 responses in steps", "2 learned"]),
        ("pretrain", (), ["row 1: ", "o⟦ne</s>⟧", "t⟦wo</s>⟧", "1 dropped for fewer than 2 tokens"]),
    ],
)
def test_rows_as_the_model_sees_them(setting, name, knobs, shown):
    said = succeed("show_data", "--config", setting / f"{name}_tiny.toml", *knobs)
    assert said.startswith(f"{name}: ")
    flat = re.sub(r"\s+", " ", said)
    for part in shown:
        assert re.sub(r"\s+", " ", part) in flat, said


def test_which_script_it_is_for(setting, tmp_path):
    config = tmp_path / "mine.toml"
    config.write_text((setting / "sft_tiny.toml").read_text())
    unsure = launch("show_data", "--config", config)
    assert unsure.returncode != 0 and "fits several scripts (" in unsure.stderr and "--script" in unsure.stderr
    config.write_text(config.read_text() + "[loss]\ndesirable_weight = 2.0\n")
    wrong = launch("show_data", "--config", config)
    assert wrong.returncode != 0 and "sft.jsonl:1: no column 'label'" in wrong.stderr  # only KTO has it
    assert "invalid choice: 'sff'" in launch("show_data", "--script", "sff").stderr
    missing = launch("show_data", "--script", "sft", "--model.path", setting / "model")
    assert missing.returncode != 0 and "data.sources is not given" in missing.stderr


@pytest.fixture
def show(monkeypatch):
    """launch/show_data.py in this process."""
    monkeypatch.syspath_prepend(str(ROOT / "launch"))
    monkeypatch.setenv("COLUMNS", "200")
    return importlib.import_module("show_data").main


def test_rewards_that_are_still_to_come_are_question_marks(setting, show, capsys):
    """The config that ships, on the tiny model: its rows are scored when it runs."""
    config = str(ROOT / "launch" / "configs" / "conditional_smollm2.toml")
    rows = str(ROOT / "launch" / "examples" / "dialogues.jsonl")
    path = ("--model.path", str(setting / "model"), "--data.sources", rows)
    show(["--config", config, *path, "--data.max_tokens", "2000", "--rows", "1"])
    said = capsys.readouterr().out
    assert "; ? stands for the rewards that launch/examples/sentiment.py:sentiment will give" in said.split("\n──")[0]
    assert re.search(r" <rm_score>: \? </s><s>assistant: ⟦.+</s>⟧", said.replace("\n", " ")), said


def test_a_pipeline_s_dialogues_and_prompts(setting, show, capsys):
    sources = ("--sft.data.sources", str(setting / "sft.jsonl"), "--prompts.sources", str(setting / "ppo.jsonl"))
    show(["--script", "rlhf", "--model.path", str(setting / "model"), *sources, "--prompts.max_prompt_tokens", "64"])
    said = capsys.readouterr().out
    assert "rlhf: 2 rows of" in said and "<s>assistant: ⟦yo</s>⟧" in said
    assert "rlhf: 1 prompts, 1 dropped for more than 64 tokens" in said and "<s>user: ask</s><s>assistant: " in said
    shipped = ("--sft.data.sources", str(ROOT / "launch/examples/dialogues.jsonl"), "--sft.data.max_tokens", "2000")
    shipped += ("--prompts.sources", str(ROOT / "launch/examples/prompts.jsonl"))
    config = str(ROOT / "launch/configs/rlhf_smollm2.toml")
    show(["--config", config, "--model.path", str(setting / "model"), *shipped, "--rows", "1"])
    assert " held out" in (said := capsys.readouterr().out) and said.count("rlhf: ") == 2


def test_what_evaluation_and_the_pretraining_mix_read(setting, show, capsys):
    texts, prompts = str(setting / "pretrain.jsonl"), ("--data.sources", str(setting / "ppo.jsonl"))
    model = ("--model.path", str(setting / "model"))
    measured = ("--text.sources", texts, "--dialogues.sources", str(setting / "sft.jsonl"))
    show(["--script", "evaluate", *model, *prompts, *measured])
    said = capsys.readouterr().out
    assert all(part in said for part in ("evaluate: 2 prompts", "o⟦ne</s>⟧", "⟦yo</s>⟧"))
    mix = ("--data.ptx_source", texts, "--data.ptx_tokens", "4", "--actor.ptx_coef", "1")
    show(["--script", "ppo", *model, *prompts, *mix, "--rows", "1"])
    assert "tokens of" in (said := capsys.readouterr().out) and "pretraining mix: 4 tokens, 3 learned" in said


def test_learned_tokens_are_green_and_bold_the_others_dim(setting, show, monkeypatch, capsys):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    rows = [{"messages": [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate("abcd")]}]
    path = write_jsonl(setting / "turns.jsonl", rows)
    show(["--script", "sft", "--model.path", str(setting / "model"), "--data.sources", str(path), "--rows", "1"])
    spans = re.findall(r"\x1b\[([\d;]+)m([^\x1b]*)\x1b\[0m", capsys.readouterr().out.partition(" learned")[2])
    told = [(style, words) for style, words in spans if style in ("2", "1;32")]
    assert told == [
        ("2", "<s>user: a</s><s>assistant: "),
        ("1;32", "b</s>"),
        ("2", "<s>user: c</s><s>assistant: "),
        ("1;32", "d</s>"),
    ]


def test_marks_are_those_of_the_stream(setting):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(setting / "model")
    data = TextStream(TextData(sources=(str(setting / "pretrain.jsonl"),)), tokenizer)
    said = succeed("show_data", "--config", setting / "pretrain_tiny.toml", "--rows", 1)
    pieces = [piece for row in data.next(1) for piece in row]
    assert said.count("⟦") == len(pieces)
    for piece in pieces:
        assert f"{tokenizer.decode(piece.tokens[:1])}⟦{tokenizer.decode(piece.tokens[1:])}⟧" in said
        assert f"{len(piece.tokens)} tokens, {len(piece.tokens) - 1} learned" in said
