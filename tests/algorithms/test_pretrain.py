"""Continued pretraining: text into packed rows, and launch/pretrain.py's perplexity against transformers."""

import math
from array import array

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scripts import metrics, options, succeed
from tiny_run import tiny_run
from trialign.algorithms.config.pretrain import TextData
from trialign.algorithms.data.documents import PackedRow, Passage, TextStream, fill, pack_tokens, passages

BUDGET = 32


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


def stream(tokenizer, *sources: object, **options) -> TextStream:
    return TextStream(TextData(sources=tuple(map(str, sources)), **options), tokenizer)


def words(rows: list[PackedRow], tokenizer) -> list[str]:
    return sorted(tokenizer.decode(piece.tokens) for row in rows for piece in row)


def test_sources_of_every_format_give_their_documents(tiny, tmp_path):
    import datasets

    (tmp_path / "a.txt").write_text("one\ntwo")
    (tmp_path / "b.jsonl").write_text('{"text": "three"}\n{"text": " "}\n{"text": "four"}\n')
    datasets.Dataset.from_dict({"text": ["five"]}).save_to_disk(tmp_path / "c")
    datasets.Dataset.from_dict({"text": ["six"]}).to_parquet(tmp_path / "d.parquet")
    data = stream(tiny, *(tmp_path / name for name in ("a.txt", "b.jsonl", "c", "d.parquet")), max_tokens=16)
    expected = ["one\ntwo</s>", "three</s>", "four</s>", "five</s>", "six</s>"]
    assert words(list(data.rows()), tiny) == sorted(expected)
    assert "out of 5 documents" in str(data) and "1 dropped for fewer than 2 tokens (1 tokens)" in str(data)
    assert len(data) == 2 and "28 tokens" in str(data) and "87.5% full" in str(data)


def test_eval_split_holds_whole_documents(tiny, tmp_path):
    for i in range(6):
        (tmp_path / f"{i}.txt").write_text(f"{i}" * 50)
    data = stream(tiny, *sorted(tmp_path.glob("*.txt")), max_tokens=16, eval_fraction=1 / 3)
    seen = {piece.where for row in data.rows() for piece in row}
    unseen = {piece.where for row in data.eval_rows for piece in row}
    assert len(seen) == 4 and len(unseen) == 2 and not seen & unseen
    named = stream(tiny, tmp_path / "0.txt", max_tokens=16, eval_sources=(str(tmp_path / "1.txt"),))
    assert {piece.where for row in named.eval_rows for piece in row} == {str(tmp_path / "1.txt")}


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (b"\xff", {}, "rows.jsonl:1: not UTF-8"),
        ("", {}, "rows.jsonl: holds no documents"),
        ('{"body": "a"}\n', {}, r"rows.jsonl:1: no column 'text' \(data.text_key\); it has: 'body'"),
        ('{"text": "ab"}\n{"text": 3}\n', {}, "rows.jsonl:2: 'text' must be a string, not 3"),
        ('{"text": "ab"}\n', {"min_tokens": 9}, "all 1 documents have fewer tokens than data.min_tokens=9"),
        ('{"text": "ab"}\n', {"eval_fraction": 0.5}, "data.eval_fraction=0.5 of 1 documents leaves none"),
    ],
)
def test_invalid_text_is_refused(tiny, tmp_path, text, options, message):
    (tmp_path / "rows.jsonl").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match=message):
        stream(tiny, tmp_path / "rows.jsonl", **options)


def test_exported_model_has_the_logged_perplexity(tmp_path):
    """By transformers, document by document: packing changes nothing."""
    folder = tiny_run(tmp_path, [{"text": " ".join(map(str, range(i)))} for i in range(1, 30)] + [{"text": ""}])
    words = options(data_max_tokens=BUDGET, data_eval_fraction=0.2, optimizer_lr=1e-2, update_batch_size=4)
    words += options(update_micro_batch_size=2, run_steps=4, run_eval_every=2, run_output=folder / "run")
    output = succeed("pretrain", "--config", folder / "config.toml", *words)
    assert "split" in output and "1 dropped for fewer than 2 tokens" in output and "for evaluation" in output
    steps = metrics(folder / "run")
    assert ["eval_perplexity" in step for step in steps] == [True, False, True, False, True]
    assert steps[-1]["eval_perplexity"] == pytest.approx(math.exp(steps[-1]["eval_loss"]))
    assert steps[-1]["eval_loss"] < steps[0]["eval_loss"] and (folder / "run" / "pretrain.png").exists()

    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder / "run" / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "run" / "model")
    evaluated = stream(tokenizer, folder / "rows.jsonl", max_tokens=BUDGET, eval_fraction=0.2).eval_rows
    nats, count = 0.0, 0
    for piece in (piece for row in evaluated for piece in row):
        tokens = torch.tensor(piece.tokens.tolist())[None]
        with torch.no_grad():
            nats += model(input_ids=tokens, labels=tokens, num_items_in_batch=1).loss.item()
        count += len(piece.tokens) - 1
    assert steps[-1]["eval_loss"] == pytest.approx(nats / count, rel=1e-5)
