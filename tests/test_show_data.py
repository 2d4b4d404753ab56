"""launch/data.py: what it shows of each kind of data is what the run would learn, token by token."""

import json
import re
from pathlib import Path

import pytest
from scripts import launch, succeed
from tiny import tiny_chat_model
from trialign.algorithms.pretrain_config import TextData
from trialign.algorithms.text import TextStream


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
        ("reward", (), ["labels (True, False): ", "1 answers in steps", "2 learned"]),
        ("pretrain", (), ["row 1: ", "o⟦ne</s>⟧", "t⟦wo</s>⟧", "1 dropped for fewer than 2 tokens"]),
    ],
)
def test_rows_as_the_model_sees_them(setting, name, knobs, shown):
    said = succeed("data", "--config", setting / f"{name}_tiny.toml", *knobs)
    assert said.startswith(f"{name}: ")
    flat = re.sub(r"\s+", " ", said)
    for part in shown:
        assert re.sub(r"\s+", " ", part) in flat, said


def test_which_script_it_is_for(setting, tmp_path):
    config = tmp_path / "mine.toml"
    config.write_text((setting / "sft_tiny.toml").read_text())
    unsure = launch("data", "--config", config)
    assert unsure.returncode != 0 and "fits several scripts (" in unsure.stderr and "--script" in unsure.stderr
    config.write_text(config.read_text() + "[loss]\ndesirable_weight = 2.0\n")
    wrong = launch("data", "--config", config)
    assert wrong.returncode != 0 and "sft.jsonl:1: no column 'label'" in wrong.stderr  # only KTO has it
    assert "invalid choice: 'sff'" in launch("data", "--script", "sff").stderr
    missing = launch("data", "--script", "sft", "--model.path", setting / "model")
    assert missing.returncode != 0 and "data.sources is not given" in missing.stderr


def test_marks_are_those_of_the_stream(setting):
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(setting / "model")
    data = TextStream(TextData(sources=(str(setting / "pretrain.jsonl"),)), tokenizer)
    said = succeed("data", "--config", setting / "pretrain_tiny.toml", "--rows", 1)
    pieces = [piece for row in data.next(1) for piece in row]
    assert said.count("⟦") == len(pieces)
    for piece in pieces:
        assert f"{tokenizer.decode(piece.tokens[:1])}⟦{tokenizer.decode(piece.tokens[1:])}⟧" in said
        assert f"{len(piece.tokens)} tokens, {len(piece.tokens) - 1} learned" in said
