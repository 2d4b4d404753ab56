"""Configs: file under command line, exact round trips, help for every option. Refused input: test_bad_input.py."""

import dataclasses

import pytest
from trialign.algorithms.config.grpo import GRPOConfig
from trialign.algorithms.config.ppo import PPOConfig
from trialign.engine.config import flatten, load, parse, to_toml

GIVEN = ["--model.path", "m", "--data.sources", "p.jsonl", "--reward.functions", "r.py:f"]


def test_the_command_line_overrides_the_file_and_the_file_the_defaults(tmp_path):
    file = tmp_path / "a.toml"
    file.write_text('[actor.optimizer]\nlr = 1e-3\nschedule = "linear"\n[run]\nsteps = 7\n')
    for flag in (["--config", str(file)], [f"--config={file}"]):
        config = parse(PPOConfig, [*flag, "--actor.optimizer.lr", "5e-4", "--run.log", "--data.sources", "a", "b"])
        assert config.actor.optimizer.lr == 5e-4
        assert config.actor.optimizer.schedule == "linear" and config.run.steps == 7
        assert config.critic.optimizer.lr == 9e-6
        assert config.run.log == () and config.data.sources == ("a", "b")


def test_saved_configs_load_unchanged(tmp_path):
    config = parse(
        PPOConfig,
        [*GIVEN, "--reward.weights", "0.25", "--parallel.recompute", "full", "--data.system_prompt", 'a "b"\\c\n\té'],
    )
    (tmp_path / "config.toml").write_text(to_toml(config), encoding="utf-8")
    assert load(PPOConfig, tmp_path / "config.toml") == config


def test_resume_loads_the_config_of_the_run(tmp_path):
    started = parse(PPOConfig, [*GIVEN, "--run.steps", "9", "--run.output", "elsewhere"])
    (tmp_path / "config.toml").write_text(to_toml(started), encoding="utf-8")
    resumed = parse(PPOConfig, ["--resume", str(tmp_path), "--run.steps", "12"])
    assert resumed.run.resume == resumed.run.folder == str(tmp_path)
    assert resumed == dataclasses.replace(started, run=dataclasses.replace(started.run, steps=12, resume=str(tmp_path)))


def test_help_explains_every_option_with_its_default(capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse(PPOConfig, ["--help"])
    assert exit_info.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    keys = flatten(PPOConfig())
    assert len(keys) <= 120 and len(flatten(GRPOConfig())) <= 120
    parts = text.split(" --")  # one an option: its name, its explanation, its default
    for key in keys:
        (part,) = [part for part in parts if part.startswith(f"{key} ")]
        explanation = part[len(key) : part.index("default: ")]
        assert any(word.isalpha() and word.islower() for word in explanation.split()), f"{key}: {explanation!r}"
