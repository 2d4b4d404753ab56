"""Continued pretraining: how text becomes rows, the loss against transformers, every layout, and launch/pretrain.py."""

import json
import math
import random
from array import array
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from layouts import ALONE, TWO_RANKS, Layout, assert_close, assert_layouts_agree, whole_states
from scripts import (
    AXES,
    agree,
    agree_in_metrics,
    digests,
    kill_after,
    launch,
    metrics,
    options,
    reports,
    succeed,
    succeed_in_turn,
)
from tiny import VOCAB, tiny_chat_model, tiny_llama, tiny_tokenizer
from trialign.algorithms.config.common import OptimizerConfig
from trialign.algorithms.config.pretrain import PretrainConfig, TextData
from trialign.algorithms.config.supervised import UpdateConfig
from trialign.algorithms.data.documents import (
    PackedRow,
    Passage,
    TextStream,
    cut,
    fill,
    pack_rows,
    pack_tokens,
    passages,
)
from trialign.algorithms.roles.build import build_decoder, build_learner
from trialign.algorithms.sft import eval_loss, sft_step
from trialign.engine.config import load, parse
from trialign.models.families.registry import read_config

BUDGET, STEPS = 32, 4
UPDATE = UpdateConfig(batch_size=4, micro_batch_size=2)


@given(st.lists(st.integers(2, 200), min_size=1, max_size=40), st.integers(2, 64))
@settings(deadline=None)
def test_every_token_but_a_document_s_first_is_predicted_once_and_rows_keep_the_budget(lengths, budget):
    documents = [Passage(array("i", range(n)), str(number)) for number, n in enumerate(lengths)]
    rows = fill(passages(documents, budget), budget)
    assert all(pack_tokens(row) <= budget for row in rows)
    predicted = {str(number): [] for number in range(len(lengths))}
    for piece in (piece for row in rows for piece in row):
        predicted[piece.where] += piece.tokens[1:]
    assert {where: sorted(tokens) for where, tokens in predicted.items()} == {
        str(number): list(range(1, n)) for number, n in enumerate(lengths)
    }
    half_full = [row for row in rows if 2 * pack_tokens(row) <= budget]
    assert len(half_full) <= 1  # two of them would have been one


def test_pieces_of_a_document_by_hand():
    assert [list(piece) for piece in cut(range(8), 4)] == [[0, 1, 2, 3], [3, 4, 5, 6], [6, 7]]
    assert [list(piece) for piece in cut(range(7), 4)] == [[0, 1, 2, 3], [3, 4, 5, 6]]
    assert [list(piece) for piece in cut(range(3), 4)] == [[0, 1, 2]]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def stream(tokenizer, *sources: object, **knobs) -> TextStream:
    return TextStream(TextData(sources=tuple(map(str, sources)), **knobs), tokenizer)


def words(rows: list[PackedRow], tokenizer) -> list[str]:
    return sorted(tokenizer.decode(piece.tokens) for row in rows for piece in row)


def test_text_of_every_kind_of_source(tokenizer, tmp_path):
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


def test_documents_are_held_out_whole(tokenizer, tmp_path):
    for i in range(6):
        (tmp_path / f"{i}.txt").write_text(f"{i}" * 50)
    data = stream(tokenizer, *sorted(tmp_path.glob("*.txt")), max_tokens=16, eval_fraction=1 / 3)
    seen = {piece.where for row in data.rows() for piece in row}
    unseen = {piece.where for row in data.eval_rows for piece in row}
    assert len(seen) == 4 and len(unseen) == 2 and not seen & unseen
    named = stream(tokenizer, tmp_path / "0.txt", max_tokens=16, eval_sources=(str(tmp_path / "1.txt"),))
    assert {piece.where for row in named.eval_rows for piece in row} == {str(tmp_path / "1.txt")}


@pytest.mark.parametrize(
    ("text", "knobs", "message"),
    [
        (None, {}, "rows.jsonl: No such file"),
        ("", {}, "rows.jsonl: holds no documents"),
        ('{"body": "a"}\n', {}, r"rows.jsonl:1: no column 'text' \(data.text_key\); it has: 'body'"),
        ('{"text": "ab"}\n{"text": 3}\n', {}, "rows.jsonl:2: 'text' must be a string, not 3"),
        ('{"text": "ab"}\n', {"min_tokens": 9}, "all 1 documents have fewer tokens than data.min_tokens=9"),
        ('{"text": "ab"}\n', {"eval_fraction": 0.5}, "data.eval_fraction=0.5 of 1 documents leaves none"),
    ],
)
def test_bad_text_is_refused_by_name(tokenizer, tmp_path, text, knobs, message):
    if text is not None:
        (tmp_path / "rows.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        stream(tokenizer, tmp_path / "rows.jsonl", **knobs)


def test_a_text_file_that_is_not_utf8_is_refused_by_name(tokenizer, tmp_path):
    (tmp_path / "a.txt").write_bytes(b"ab\xff")
    with pytest.raises(ValueError, match=r"a.txt:1: not UTF-8: invalid start byte"):
        stream(tokenizer, tmp_path / "a.txt")


def test_knobs_that_do_not_fit():
    with pytest.raises(ValueError, match="chat_template=True: must be false"):
        TextData(chat_template=True)
    config = parse(PretrainConfig, options(model_path="m", data_sources="a.txt", update_batch_size=3))
    with pytest.raises(ValueError, match="update.batch_size=3 rows do not divide by dp=2"):
        config.check(2)


def rows(seed: int, count: int = 4) -> list[PackedRow]:
    """Rows of one to six documents of 2 to 15 tokens."""
    chance = random.Random(seed)
    return [
        [
            Passage(array("i", [chance.randrange(3, VOCAB) for _ in range(chance.randrange(2, 16))]), f"{i}")
            for _ in range(chance.randrange(1, 7))
        ]
        for i in range(count)
    ]


def two_steps(rank: int, world: int, layout: Layout, folder: Path, update=UPDATE, backwards=False):
    """Two steps and a look at other rows; metrics, and gradients and weights put together from all ranks."""
    mesh = layout.mesh()
    shape = read_config(folder)
    model = build_decoder(str(folder), shape, mesh, "float32", trained=True)
    settings = OptimizerConfig(lr=1e-3, eps=1e-5, max_grad_norm=0.5, weight_decay=0.1, warmup_ratio=0.0)
    learner = build_learner(model, settings, 4)
    numbers = {}
    for step in range(2):
        own = rows(step)[:: -1 if backwards else 1]
        done = sft_step(learner, pack_rows(own))
        numbers |= {f"{name}/{step}": value for name, value in done.items()}
    numbers["held out"] = eval_loss(learner, pack_rows(rows(9, 3)))
    return numbers, whole_states(actor=learner)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def alone(folder):
    return two_steps(0, 1, ALONE, folder)


def test_the_loss_is_transformers_document_by_document(folder, alone):
    """Each document alone: what is packed beside it changes nothing."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    documents = [piece.tokens.tolist() for row in rows(0) for piece in row]
    targets = sum(len(document) - 1 for document in documents)
    total = torch.tensor(0.0)
    for document in documents:
        tokens = torch.tensor(document)[None]
        loss = model(input_ids=tokens, labels=tokens, num_items_in_batch=targets).loss
        loss.backward()
        total += loss.detach()
    assert alone[0]["loss/0"] == pytest.approx(total.item(), rel=1e-6)
    assert alone[0]["target_tokens/0"] == targets
    norm = torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]).norm().item()
    assert alone[0]["grad_norm/0"] == pytest.approx(norm, rel=1e-5)


@pytest.mark.parametrize("layout", [*TWO_RANKS, Layout(pp=2, dp=2)], ids=str)
def test_layouts_equal_one_process(folder, alone, layout):
    assert_layouts_agree(two_steps, [layout], folder, expected=alone)


@pytest.mark.parametrize("changes", [{"micro_batch_size": 1}, {"micro_batch_tokens": 100}])
def test_cut_and_order_do_not_matter(folder, alone, changes):
    assert_close(two_steps(0, 1, ALONE, folder, replace(UPDATE, **changes), backwards=True), alone)


@pytest.fixture(scope="module")
def setting(tmp_path_factory) -> Path:
    """A folder with a tiny model, text and a config."""
    folder = tmp_path_factory.mktemp("pretrain")
    tiny_chat_model(folder / "model")
    lines = [json.dumps({"text": " ".join(map(str, range(i)))}) for i in range(1, 30)]
    (folder / "text.jsonl").write_text("\n".join([*lines, '{"text": ""}']))
    (folder / "config.toml").write_text(f"""
[model]
path = "{folder}/model"
dtype = "float32"
[data]
sources = ["{folder}/text.jsonl"]
max_tokens = {BUDGET}
eval_fraction = 0.2
[optimizer]
lr = 1e-2
eps = 1e-5
[update]
batch_size = 4
micro_batch_size = 2
[run]
steps = {STEPS}
eval_every = 2
save_every = 1
keep = {STEPS}
log = []
""")
    return folder


@pytest.fixture(scope="module")
def whole(setting) -> Path:
    said = succeed("pretrain", "--config", setting / "config.toml", "--run.output", setting / "whole")
    assert "cut into pieces" in said and "1 dropped for fewer than 2 tokens" in said and "held out" in said
    return setting / "whole"


def test_what_a_run_leaves_and_that_the_exported_model_has_its_perplexity(setting, whole):
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


def test_killed_and_resumed_it_ends_bit_for_bit_the_same(setting, whole):
    folder = setting / "killed"
    kill_after("checkpoints/step_*", folder, "pretrain", "--config", setting / "config.toml", "--run.output", folder)
    assert not (folder / "checkpoints" / f"step_{STEPS}").exists(), "killed too late to show anything"
    succeed("pretrain", "--resume", folder)
    assert digests(folder, STEPS) == digests(whole, STEPS)
    assert metrics(folder) == metrics(whole)


@pytest.fixture(scope="module")
def moved(setting) -> None:
    """The run in every layout, from its beginning."""
    given = ("--config", setting / "config.toml")
    runs = [("pretrain", *given, "--run.output", setting / axis, f"--parallel.{axis}", 2) for axis in AXES]
    succeed_in_turn(runs)


@pytest.mark.parametrize("axis", AXES)
def test_under_torchrun_it_ends_the_same_within_rounding(setting, whole, moved, axis):
    agree(setting / axis, whole, STEPS)
    agree_in_metrics(setting / axis, whole)


def test_what_is_wrong_is_said_once(setting, tmp_path):
    (tmp_path / "bad.jsonl").write_text('{"text": 1}\n')
    given = ("--config", setting / "config.toml", "--run.output", tmp_path / "run")
    done = launch("pretrain", *given, "--data.sources", tmp_path / "bad.jsonl", ranks=2)
    assert done.returncode != 0 and reports(done, "'text' must be a string, not 1") == 1, done.stderr
    assert not (tmp_path / "run").exists()


def test_the_config_that_ships_is_whole():
    config = load(PretrainConfig, Path(__file__).resolve().parents[2] / "launch" / "configs" / "pretrain_smollm2.toml")
    assert config.check(1) == 1
    assert all((Path(__file__).resolve().parents[2] / source).is_file() for source in config.data.sources)
