"""Rows that a reward function cannot score are refused by file and row, before a model is loaded, by every script."""

import runpy
import sys
from pathlib import Path

import pytest
from samples import write_jsonl
from scripts import ROOT, options
from tiny import tiny_chat_model

MATHS = "trialign.algorithms.maths:maths"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A model without weights: whoever loads it fails with another error than the rows'."""
    folder = tiny_chat_model(tmp_path_factory.mktemp("model"), max_position_embeddings=4096)
    for weights in folder.glob("*.safetensors"):
        weights.unlink()
    return folder


def refused(script: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> str:
    """What a script says as it leaves."""
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *arguments])
    monkeypatch.syspath_prepend(str(ROOT / "launch"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(ROOT / "launch" / f"{script}.py"), run_name="__main__")
    return str(left.value)


def asked(script: str, model: Path, source: Path, function: str, folder: Path) -> list[str]:
    """A script's arguments."""
    if script == "rlhf":
        return options(
            model_path=model,
            prompts_sources=source,
            prompts_eval_fraction=0.5,
            run_output=folder,
            **{"preferences_reward.functions": function, "sft_data.sources": source},
        )
    return options(model_path=model, data_sources=source, reward_functions=function, run_output=folder)


SCRIPTS = ("ppo", "grpo", "rejection", "conditional", "evaluate", "rlhf")


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_reference_that_cannot_be_read_stops_the_run_by_its_row(script, model, tmp_path, monkeypatch):
    wanted = ["3", "none", "2\\sqrt{3}", "none"]
    rows = [{"prompt": f"p{i}", "response": "r", "answer": right} for i, right in enumerate(wanted)]
    source = write_jsonl(tmp_path / "rows.jsonl", rows)
    said = refused(script, asked(script, model, source, MATHS, tmp_path / "run"), monkeypatch)
    assert "answer='none'" in said and MATHS in said
    assert "rows.jsonl:2: " in said or script == "rlhf" and "prompts/" in said


@pytest.mark.parametrize("script", SCRIPTS)
def test_columns_with_the_names_of_arguments_stop_the_run(script, model, tmp_path, monkeypatch):
    (tmp_path / "f.py").write_text("def f(prompts, completions, **fields): return [0.0 for _ in prompts]")
    for name in ("prompts", "completions"):
        rows = [{"prompt": "p0", "response": "r"}, {"prompt": "p1", "response": "r", name: ["x"]}]
        source = write_jsonl(tmp_path / f"{name}.jsonl", rows)
        said = refused(script, asked(script, model, source, f"{tmp_path}/f.py:f", tmp_path / "run"), monkeypatch)
        assert f"the column '{name}' has the name of an argument" in said
        assert f"{name}.jsonl:2: " in said or script == "rlhf" and "prompts/" in said
