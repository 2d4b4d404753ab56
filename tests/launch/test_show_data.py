"""launch/show_data.py: rows of each kind of data with the tokens that are learned."""

import re
from pathlib import Path

import pytest
from samples import write_jsonl
from tiny import tiny_chat_model
from tiny_run import write_config


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Path:
    """A tiny model, and rows of each kind with one that is too long."""
    folder = tmp_path_factory.mktemp("data")
    tiny_chat_model(folder / "model")
    long = "long " * 50
    files = {
        "sft": [{"prompt": "hi", "response": "yo"}, {"prompt": "hi", "response": long}],
        "dpo": [{"prompt": "p", "chosen": chosen, "rejected": "bad"} for chosen in ("good", long)],
        "kto": [{"prompt": "p", "response": "x", "label": True}, {"prompt": "q", "response": "y", "label": False}],
        "ppo": [{"prompt": "ask"}, {"prompt": long}],
        "conditional": [{"prompt": "p", "response": "r", "reward": r} for r in (0, 1)],
        "reward": [{"prompt": "p", "steps": ["a", "b"], "labels": [True, False]}],
        "pretrain": [{"text": "one"}, {"text": "two"}, {"text": ""}],
    }
    for name, lines in files.items():
        sources = {f"{'steps' if name == 'reward' else 'data'}_sources": [write_jsonl(folder / f"{name}.jsonl", lines)]}
        write_config(folder / f"{name}_tiny.toml", model_path=folder / "model", **sources)
    return folder


@pytest.fixture
def show(launched, monkeypatch, capsys):
    """Runs launch/show_data.py in this process; returns its output."""
    monkeypatch.setenv("COLUMNS", "200")
    main = launched("show_data").main
    return lambda *arguments: main(list(map(str, arguments))) or re.sub(r"\s+", " ", capsys.readouterr().out)


SHORT = ("--data.max_tokens", 64)
SHOWN = {
    "sft": (SHORT, "1 dropped for more than 64", "25 tokens, 3 learned", "<s>user: hi</s><s>assistant: ⟦yo</s>⟧"),
    "dpo": (SHORT, "1 pairs of", "1 dropped for", "assistant: ⟦good</s>⟧", "assistant: ⟦bad</s>⟧", "1, chosen: "),
    "kto": ((), "<s>assistant: ⟦x</s>⟧", "1, wanted: ", "2, not wanted: "),
    "ppo": (("--data.max_prompt_tokens", 64), "1 dropped", " 0 learned", "<s>user: ask</s><s>assistant: "),
    "conditional": ((), "user: p <rm_score>: -0.71 </s><s>assistant: ⟦r</s>⟧", "2 rewards written: -0.71, 0.71"),
    "reward": ((), "labels (True, False): ", "1 responses in steps", "2 learned"),
    "pretrain": ((), "row 1: ", "o⟦ne</s>⟧", "t⟦wo</s>⟧", "1 dropped for fewer than 2 tokens"),
}


@pytest.mark.parametrize("name", SHOWN)
def test_rows_are_shown_with_learned_tokens_marked(setting, show, name):
    given, *parts = SHOWN[name]
    printed = show("--config", setting / f"{name}_tiny.toml", *given)
    assert all(part in printed for part in (f"{name}: ", *parts)), printed


def test_script_is_found_by_config_or_asked_for(setting, show, tmp_path):
    config = tmp_path / "mine.toml"
    config.write_text((setting / "sft_tiny.toml").read_text())
    with pytest.raises(SystemExit, match=r"fits several scripts \(.*--script"):
        show("--config", config)
    config.write_text(config.read_text() + "[loss]\ndesirable_weight = 2.0\n")
    with pytest.raises(SystemExit, match="sft.jsonl:1: no column 'label'"):  # only KTO has it
        show("--config", config)
    with pytest.raises(SystemExit, match="data.sources is not given"):
        show("--script", "sft", "--model.path", setting / "model")


def test_learned_tokens_are_green_and_bold(setting, show, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    printed = show("--config", setting / "sft_tiny.toml", "--rows", 1, *SHORT)
    assert "\x1b[2m<s>user: hi</s><s>assistant: \x1b[0m\x1b[1;32myo</s>\x1b[0m" in printed


def test_all_data_of_a_script_is_shown(setting, show):
    """Rewards to be given, dialogues and prompts of rlhf, texts of an evaluation, the pretraining mix of PPO."""
    printed = show("--config", setting / "conditional_tiny.toml", "--reward.functions", "a.py:f")
    assert "user: p <rm_score>: ? </s>" in printed and "the rewards that a.py:f will give" in printed
    model, texts, prompts = ("--model.path", setting / "model"), setting / "pretrain.jsonl", setting / "ppo.jsonl"
    sources = ("--sft.data.sources", setting / "sft.jsonl", "--prompts.sources", prompts)
    printed = show("--script", "rlhf", *model, *sources)
    assert "<s>assistant: ⟦yo</s>⟧" in printed and "<s>user: ask</s><s>ass" in printed
    sources = ("--text.sources", texts, "--dialogues.sources", setting / "sft.jsonl")
    printed = show("--script", "evaluate", *model, "--data.sources", prompts, *sources)
    assert all(part in printed for part in ("evaluate: 2 prompts", "o⟦ne</s>⟧", "⟦yo</s>⟧"))
    mix = ("--data.ptx_source", texts, "--data.ptx_tokens", 4, "--actor.ptx_coef", 1)
    assert "pretraining mix: 4 tokens, 3 learned" in show("--script", "ppo", *model, "--data.sources", prompts, *mix)
