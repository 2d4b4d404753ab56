"""Refused preference data, by file and row."""

from typing import Any

import pytest
from samples import chat, write_jsonl
from trialign.algorithms.config.preference import LabelData, PairData, StepData
from trialign.algorithms.data.conditional import bucketed, normalized
from trialign.algorithms.data.preferences import LabeledStream, PairStream, read_steps
from trialign.algorithms.data.streams import RowStream

GOOD: dict[str, dict[str, Any]] = {
    "pairs": {"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1},
    "labels": {"prompt": "a", "response": "b", "label": True},
    "steps": {"prompt": "a", "steps": ["b"], "labels": [True]},
}


def stream(kind: str, tokenizer, *sources, **options) -> RowStream[Any]:
    """As the scripts read them."""
    given = {"sources": tuple(map(str, sources)), **options}
    if kind == "pairs":
        return PairStream(PairData(**given), tokenizer, (2,))
    if kind == "labels":
        return LabeledStream(LabelData(**given), tokenizer, (2,))
    config = StepData(**given)
    return RowStream(config, lambda source: read_steps(source, config, tokenizer), lambda row: row.lengths, 0, kind)


ROWS: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {  # kind, changes to a good row, options, message
    "no chosen": ("pairs", {"chosen": ...}, {}, "no column 'chosen' (data.chosen_key); it has: 'prompt', 'rejected'"),
    "empty chosen": ("pairs", {"chosen": " \n"}, {}, "'chosen' is empty"),
    "tools without a template": ("pairs", {"tools": [{"name": "clock"}]}, {"chat_template": False}, "'tools' is not e"),
    "different dialogues": (
        "pairs",
        {"prompt": ..., "chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: x\n\nAssistant: b"},
        {},
        "'chosen' and 'rejected' are responses to different dialogues",
    ),
    "no prompt anywhere": ("pairs", {"prompt": ...}, {}, "'chosen' is neither a response to a prompt column nor a"),
    "no template": (
        "pairs",
        {"prompt": ..., "chosen": chat(*"abcd")},
        {"chat_template": False},
        "data.chat_template=true",
    ),
    "a number": ("pairs", {"chosen": 3}, {}, "'chosen' must be a string or a list of {role, content} messages, not 3"),
    "a response of weight 0": ("labels", {"response": [chat("a", "b")[1] | {"weight": 0}]}, {}, "has weight 0"),
    "a dialogue with another prompt": ("labels", {"response": chat("x", "b")}, {}, "that do not begin with 'prompt'"),
    "a dialogue that the user ends": ("labels", {"response": chat("a")}, {}, "must end with the assistant, not with u"),
    "no user": ("labels", {"prompt": [{"role": "system", "content": "s"}]}, {}, "'response' has no user turn"),
    "steps in numbers": ("steps", {"steps": [1]}, {}, "'steps' must be a list of strings, not [1]"),
    "a margin of NaN": ("pairs", {"margin": float("nan")}, {"margin_key": "margin"}, "at least 0, not nan"),
    "a label in words": ("labels", {"label": "good"}, {}, "'label' must be true or false, not 'good'"),
    "a label too few": ("steps", {"steps": ["b", "c"]}, {}, "2 steps but 1 labels"),
    "labels in numbers": ("steps", {"labels": [0.7]}, {}, "'labels' must be a list of true and false, not [0.7]"),
}


@pytest.mark.parametrize("case", ROWS)
def test_invalid_preference_rows_are_refused(case, tiny, tmp_path):
    kind, changes, options, message = ROWS[case]
    bad = {key: value for key, value in (GOOD[kind] | changes).items() if value is not ...}
    if changes.get("prompt") is ... and "rejected" not in changes:
        bad["rejected"] = "\n\nHuman: a\n\nAssistant: c"
    path = write_jsonl(tmp_path / "a.jsonl", [GOOD[kind], bad])
    with pytest.raises(ValueError) as error:
        stream(kind, tiny, path, **options)
    assert str(error.value).startswith(f"{path}:2: ") and message in str(error.value), error.value


FILES: dict[str, tuple[str, dict[str, Any], dict[str, Any], str]] = {  # as above, for all four rows
    "all equal": ("pairs", {"rejected": "b"}, {}, ": in all 4 pairs the chosen"),
    "all wanted": ("labels", {}, {}, ": all 4 responses have the label"),
    "all too long": (
        "pairs",
        {"rejected": "ccc"},
        {"max_tokens": 20},
        ": all 4 pairs are longer than data.max_tokens=20; the shortest has 25 tokens",
    ),
}


@pytest.mark.parametrize("case", FILES)
def test_invalid_preference_files_are_refused(case, tiny, tmp_path):
    kind, changes, options, message = FILES[case]
    path = write_jsonl(tmp_path / "a.jsonl", [GOOD[kind] | changes] * 4)
    with pytest.raises(ValueError) as error:
        stream(kind, tiny, path, **options)
    assert f"{path}{message}" in str(error.value), error.value


def test_equal_rewards_condition_nothing():
    with pytest.raises(ValueError, match=r"2 rewards are all \[0.5\]"):
        normalized([0.5, 0.5])
    with pytest.raises(ValueError, match="3 rewards fall into one of condition.buckets=2"):
        bucketed([0.5, 0.5, 0.5], 2)


def test_eval_sources_are_checked(tiny, tmp_path):
    good, bad = (write_jsonl(tmp_path / f"{name}.jsonl", [GOOD["pairs"]]) for name in ("good", "bad"))
    write_jsonl(bad, [GOOD["pairs"] | {"chosen": ""}])
    with pytest.raises(ValueError, match=r"bad.jsonl:1: 'chosen' is empty"):
        stream("pairs", tiny, good, eval_sources=(str(bad),))
    with pytest.raises(ValueError, match=r"eval_fraction=0.5: must be 0 with eval_sources"):
        stream("pairs", tiny, good, eval_sources=(str(good),), eval_fraction=0.5)
