"""Rows that have changed since a checkpoint: as many as before, and still every stream refuses them by name."""

import importlib
import json
from pathlib import Path

import pytest
from samples import write_jsonl
from trialign.algorithms.config.conditional import ConditionConfig, RewardedData
from trialign.algorithms.config.data import PromptData
from trialign.algorithms.config.preference import PairData, RewardModelConfig, StepData
from trialign.algorithms.config.pretrain import TextData
from trialign.algorithms.data.conditional import ConditionedRows, read_rewarded
from trialign.algorithms.data.documents import TextDataset, TextStream
from trialign.algorithms.data.preferences import PairStream
from trialign.algorithms.data.prompts import PromptDataset
from trialign.algorithms.data.sources import RowReader

STOP = (2,)  # </s> of the tiny tokenizer
ROW = {"prompt": "hi", "response": "yo", "text": "some text", "chosen": "yes", "rejected": "no"}
ROW |= {"reward": 0.0, "answer": "7", "steps": ["a", "b"], "labels": [1, 0]}
ROWS = [ROW, {**ROW, "prompt": "ho", "response": "ya", "reward": 1.0}]


def conditioned(tokenizer, path: str) -> ConditionedRows:
    data, reader = RewardedData(sources=(path,)), RowReader()
    rows = {path: read_rewarded(path, data, True, reader)}
    return ConditionedRows(data, ConditionConfig(), rows, tokenizer, STOP, reader=reader)


def in_steps(tokenizer, path: str):
    config = RewardModelConfig(steps=StepData(sources=(path,)))
    return importlib.import_module("reward").stream(config, tokenizer, STOP)


STREAMS = {
    "the pretraining mix": (lambda t, p: TextDataset(p, "text", t, 4), "text"),
    "prompts": (lambda t, p: PromptDataset(PromptData(sources=(p,)), t), "answer"),
    "text": (lambda t, p: TextStream(TextData(sources=(p,)), t), "text"),
    "pairs": (lambda t, p: PairStream(PairData(sources=(p,)), t, STOP), "rejected"),
    "rewards": (conditioned, "response"),
    "steps": (in_steps, "labels"),
}


def changed(value):
    return [value[0] ^ 1, *value[1:]] if isinstance(value, list) else f"{value[:-1]}#"


@pytest.mark.parametrize("case", STREAMS)
def test_changed_rows_are_refused_on_resume(case, tiny, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[3] / "launch"))
    make, key = STREAMS[case]
    path = write_jsonl(tmp_path / "rows.jsonl", ROWS)
    stream = make(tiny, str(path))
    stream.next(3)
    state = json.loads(json.dumps(stream.state()))
    there = make(tiny, str(write_jsonl(tmp_path / "moved.jsonl", ROWS)))
    there.load_state(state)
    assert there.state() == state
    write_jsonl(path, [{**ROWS[0], key: changed(ROWS[0][key])}, ROWS[1]])
    other = make(tiny, str(path))
    with pytest.raises(ValueError, match=r"data source \S+rows.jsonl: its rows have changed since the checkpoint"):
        other.load_state(state)
    other.load_state({name: value for name, value in state.items() if name != "digests"})  # of before they were kept
