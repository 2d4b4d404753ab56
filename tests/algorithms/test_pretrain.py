"""Continued pretraining: text into packed rows, and launch/pretrain.py against transformers, killed, and in layouts."""

import json
import math
from array import array
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scripts import (
    AXES,
    agree,
    agree_in_metrics,
    digests,
    kill_after,
    metrics,
    options,
    succeed,
    succeed_in_turn,
)
from tiny import tiny_chat_model, tiny_tokenizer
from trialign.algorithms.config.pretrain import PretrainConfig, TextData
from trialign.algorithms.data.documents import (
    PackedRow,
    Passage,
    TextStream,
    cut,
    fill,
    pack_tokens,
    passages,
)
from trialign.engine.config import parse

BUDGET, STEPS = 32, 4


@given(st.lists(st.integers(2, 200), min_size=1, max_size=40), st.integers(2, 64))
@settings(deadline=None)
def test_rows_predict_every_later_token_once_within_the_budget(lengths, budget):
    documents = [Passage(array("i", range(n)), str(number)) for number, n in enumerate(lengths)]
    rows = fill(passages(documents, budget), budget)
    assert all(pack_tokens(row) <= budget for row in rows)
    predicted = {str(number): [] for number in range(len(lengths))}
    for piece in (piece for row in rows for piece in row):
        predicted[piece.where] += piece.tokens[1:]
    assert {where: sorted(tokens) for where, tokens in predicted.items()} == {
        str(number): list(range(1, n)) for number, n in enumerate(lengths)
    }
    assert sum(2 * pack_tokens(row) <= budget for row in rows) <= 1  # two half-full rows would have been one


def test_pieces_of_a_document_overlap_by_one_token():
    assert [list(piece) for piece in cut(range(8), 4)] == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7]]
    assert [list(piece) for piece in cut(range(7), 4)] == [[0, 1, 2, 3], [3, 4, 5, 6]]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def stream(tokenizer, *sources: object, **options) -> TextStream:
    return TextStream(TextData(sources=tuple(map(str, sources)), **options), tokenizer)


def words(rows: list[PackedRow], tokenizer) -> list[str]:
    return sorted(tokenizer.decode(piece.tokens) for row in rows for piece in row)


def test_sources_of_every_format_give_their_documents(tokenizer, tmp_path):
    import datasets

    (tmp_path / "a.txt").write_text("one\ntwo")
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n{"text": " "}\n{"text": "four"}\n')
    datasets.Dataset.from_dict({"text": ["five"]}).save_to_disk(tmp_path / "c")
    datasets.Dataset.from_dict({"text": ["six"]}).to_parquet(tmp_path / "d.parquet")
    data = stream(tokenizer, *(tmp_path / name for name in ("a.txt", "b.jsonl", "c", "d.parquet")), max_tokens=16)
    expected = ["one\ntwo</s>", "three</s>", "four</s>", "five</s>", "six</s>"]
    assert words(list(data.rows()), tokenizer) == sorted(expected)
    assert "out of 5 documents" in str(data) and "1 dropped for fewer than 2 tokens (1 tokens)" in str(data)
    assert len(data) == 2 and "28 tokens" in str(data) and "87.5% full" in str(data)


def test_eval_split_holds_whole_documents(tokenizer, tmp_path):
    for i in range(6):
        (tmp_path / f"{i}.txt").write_text(f"{i}" * 50)
    data = stream(tokenizer, *sorted(tmp_path.glob("*.txt")), max_tokens=16, eval_fraction=1 / 3)
    seen = {piece.where for row in data.rows() for piece in row}
    unseen = {piece.where for row in data.eval_rows for piece in row}
    assert len(seen) == 4 and len(unseen) == 2 and not seen & unseen
    named = stream(tokenizer, tmp_path / "0.txt", max_tokens=16, eval_sources=(str(tmp_path / "1.txt"),))
    assert {piece.where for row in named.eval_rows for piece in row} == {str(tmp_path / "1.txt")}


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (None, {}, "rows.jsonl: No such file"),
        ("", {}, "rows.jsonl: holds no documents"),
        ('{"body": "a"}\n', {}, r"rows.jsonl:1: no column 'text' \(data.text_key\); it has: 'body'"),
        ('{"text": "ab"}\n{"text": 3}\n', {}, "rows.jsonl:2: 'text' must be a string, not 3"),
        ('{"text": "ab"}\n', {"min_tokens": 9}, "all 1 documents have fewer tokens than data.min_tokens=9"),
        ('{"text": "ab"}\n', {"eval_fraction": 0.5}, "data.eval_fraction=0.5 of 1 documents leaves none"),
    ],
)
def test_invalid_text_is_refused(tokenizer, tmp_path, text, options, message):
    if text is not None:
        (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        stream(tokenizer, tmp_path / "rows.jsonl", **options)


def test_invalid_options_and_encodings_are_refused(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"ab\xff")
    with pytest.raises(ValueError, match=r"a.txt:1: not UTF-8"):
        stream(tokenizer, tmp_path / "a.txt")
    with pytest.raises(ValueError, match="chat_template=True"):
        TextData(chat_template=True)
    config = parse(PretrainConfig, options(model_path="m", data_sources="a.txt", update_batch_size=3))
    with pytest.raises(ValueError, match="update.batch_size=3 .*dp=2"):
        config.check(2)


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Path:
    """A folder with a tiny model and text."""
    folder = tmp_path_factory.mktemp("pretrain")
    tiny_chat_model(folder / "model")
    lines = [json.dumps({"text": " ".join(map(str, range(i)))}) for i in range(1, 30)]
    (folder / "text.jsonl").write_text("\n".join([*lines, '{"text": ""}']))
    return folder


def arguments(setting: Path) -> list[str]:
    return options(
        model_path=setting / "model", model_dtype="float32", data_sources=setting / "text.jsonl",
        data_max_tokens=BUDGET, data_eval_fraction=0.2, optimizer_lr=1e-2, optimizer_eps=1e-5, update_batch_size=4,
        update_micro_batch_size=2, run_steps=STEPS, run_eval_every=2, run_save_every=1, run_keep=STEPS, run_log=(),
    )  # fmt: skip


@pytest.fixture(scope="module")
def whole(setting) -> Path:
    output = succeed("pretrain", *arguments(setting), "--run.output", setting / "whole")
    assert "split" in output and "1 dropped for fewer than 2 tokens" in output and "for evaluation" in output
    return setting / "whole"


def test_exported_model_has_the_logged_perplexity(setting, whole):
    """By transformers, document by document: packing changes nothing."""
    steps = metrics(whole)
    assert [step["step"] for step in steps] == list(range(STEPS + 1))
    assert ["eval_perplexity" in step for step in steps] == [True, False, True, False, True]
    assert steps[-1]["eval_perplexity"] == pytest.approx(math.exp(steps[-1]["eval_loss"]))
    assert steps[-1]["eval_loss"] < steps[0]["eval_loss"] and (whole / "pretrain.png").stat().st_size > 10_000

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(whole / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(whole / "model")
    evaluated = stream(tokenizer, setting / "text.jsonl", max_tokens=BUDGET, eval_fraction=0.2).eval_rows
    nats, count = 0.0, 0
    for piece in (piece for row in evaluated for piece in row):
        tokens = torch.tensor(piece.tokens.tolist())[None]
        with torch.no_grad():
            nats += model(input_ids=tokens, labels=tokens, num_items_in_batch=1).loss.item()
        count += len(piece.tokens) - 1
    assert steps[-1]["eval_loss"] == pytest.approx(nats / count, rel=1e-5)


def test_killed_and_resumed_run_equals_the_whole_run(setting, whole):
    folder = setting / "killed"
    kill_after("checkpoints/step_*", folder, "pretrain", *arguments(setting), "--run.output", folder)
    assert not (folder / "checkpoints" / f"step_{STEPS}").exists(), "killed after its last step"
    succeed("pretrain", "--resume", folder)
    assert digests(folder, STEPS) == digests(whole, STEPS)
    assert metrics(folder) == metrics(whole)


def test_layouts_equal_one_process(setting, whole):
    succeed_in_turn(
        [("pretrain", *arguments(setting), "--run.output", setting / axis, f"--parallel.{axis}", 2) for axis in AXES]
    )
    for axis in AXES:
        agree(setting / axis, whole, STEPS)
        agree_in_metrics(setting / axis, whole)
