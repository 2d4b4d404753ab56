"""launch/show_data.py: rows of each kind of data with the tokens that are learned."""

import json
import re
from pathlib import Path

import pytest
from samples import write_jsonl
from scripts import ROOT, launch, succeed
from tiny import tiny_chat_model


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Path:
    """A tiny model, and rows of each kind with one that is too long."""
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
    ("name", "given", "shown"),
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
def test_rows_are_shown_with_learned_tokens_marked(setting, name, given, shown):
    printed = succeed("show_data", "--config", setting / f"{name}_tiny.toml", *given)
    assert printed.startswith(f"{name}: ")
    for part in shown:
        assert part in re.sub(r"\s+", " ", printed), printed


def test_script_is_found_by_config_or_asked_for(setting, tmp_path):
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
def show(launched, monkeypatch, capsys):
    """Runs launch/show_data.py in this process; returns its output."""
    monkeypatch.setenv("COLUMNS", "200")
    main = launched("show_data").main
    return lambda *arguments: main(list(map(str, arguments))) or capsys.readouterr().out


def test_rewards_of_later_scoring_are_question_marks(setting, show):
    """The shipped config on the tiny model; the rows are scored when it runs."""
    config, rows = ROOT / "launch/configs/conditional_smollm2.toml", ROOT / "launch/examples/dialogues.jsonl"
    given = ("--model.path", setting / "model", "--data.sources", rows, "--data.max_tokens", 2000, "--rows", 1)
    printed = show("--config", config, *given)
    assert "launch/examples/sentiment.py:sentiment" in printed.split("\n──")[0]
    assert re.search(r" <rm_score>: \? </s><s>assistant: ⟦.+</s>⟧", printed.replace("\n", " ")), printed


def test_rlhf_dialogues_and_prompts_are_shown(setting, show):
    sources = ("--sft.data.sources", setting / "sft.jsonl", "--prompts.sources", setting / "ppo.jsonl")
    printed = show("--script", "rlhf", "--model.path", setting / "model", *sources, "--prompts.max_prompt_tokens", 64)
    assert "rlhf: 2 rows of" in printed and "<s>assistant: ⟦yo</s>⟧" in printed
    assert "rlhf: 1 prompts, 1 dropped for more than 64 tokens" in printed and "<s>user: ask</s><s>ass" in printed


def test_evaluation_data_and_pretraining_mix_are_shown(setting, show):
    given = ("--model.path", setting / "model", "--data.sources", setting / "ppo.jsonl")
    texts = setting / "pretrain.jsonl"
    sources = ("--text.sources", texts, "--dialogues.sources", setting / "sft.jsonl")
    printed = show("--script", "evaluate", *given, *sources)
    assert all(part in printed for part in ("evaluate: 2 prompts", "o⟦ne</s>⟧", "⟦yo</s>⟧"))
    mix = ("--data.ptx_source", texts, "--data.ptx_tokens", 4, "--actor.ptx_coef", 1)
    assert "pretraining mix: 4 tokens, 3 learned" in show("--script", "ppo", *given, *mix, "--rows", 1)


def test_learned_tokens_are_green_and_bold(setting, show, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    rows = [{"messages": [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate("abcd")]}]
    path = write_jsonl(setting / "turns.jsonl", rows)
    printed = show("--script", "sft", "--model.path", setting / "model", "--data.sources", path, "--rows", 1)
    spans = re.findall(r"\x1b\[([\d;]+)m([^\x1b]*)\x1b\[0m", printed.partition(" learned")[2])
    assert [(style, words) for style, words in spans if style in ("2", "1;32")] == [
        ("2", "<s>user: a</s><s>assistant: "),
        ("1;32", "b</s>"),
        ("2", "<s>user: c</s><s>assistant: "),
        ("1;32", "d</s>"),
    ]
