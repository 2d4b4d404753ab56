"""Rows of preferences: pairs, labelled answers and labelled steps as tokens, with exactly the answer as targets."""

import pytest
from samples import write_jsonl
from tiny import tiny_tokenizer
from trialign.algorithms.pair_config import LabelData, PairData, StepData
from trialign.algorithms.pairs import mismatched, read_labelled, read_pairs, read_steps
from trialign.algorithms.reward_model import pack_pairs, pack_steps
from trialign.algorithms.rows import RowStream

STOP = (2,)  # </s> of the tiny tokenizer


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def read(tokenizer, folder, *rows, **knobs):
    return read_pairs(str(write_jsonl(folder / "rows.jsonl", rows)), PairData(**knobs), tokenizer, STOP)


def shown(tokenizer, sample) -> tuple[str, str]:
    """(what is not learned, what is); targets are one stretch at the end."""
    begin = sample.mask.index(1)
    assert sample.mask == bytes(begin) + b"\1" * (len(sample.mask) - begin)
    return str(tokenizer.decode(sample.tokens[:begin])), str(tokenizer.decode(sample.tokens[begin:]))


HELLO = "<s>user: hi</s><s>assistant: "
TWO_TURNS = "<s>user: hi</s><s>assistant: yo</s><s>user: ok</s><s>assistant: "
USER = [{"role": "user", "content": "hi"}]


def chat(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


PAIRS = {
    "strings": ({"prompt": "hi", "chosen": "yes", "rejected": "no"}, HELLO),
    "a prompt of messages": ({"prompt": chat("hi", "yo", "ok"), "chosen": "yes", "rejected": "no"}, TWO_TURNS),
    "answers as messages": (
        {"prompt": USER, "chosen": chat("", "yes")[1:], "rejected": chat("", "no")[1:]},
        HELLO,
    ),
    "dialogues in messages": (
        {"chosen": chat("hi", "yo", "ok", "yes"), "rejected": chat("hi", "yo", "ok", "no")},
        TWO_TURNS,
    ),
    "dialogues in strings": (
        {
            "chosen": "\n\nHuman: hi\n\nAssistant: yo\n\nHuman: ok\n\nAssistant: yes",
            "rejected": "\n\nHuman: hi\n\nAssistant: yo\n\nHuman: ok\n\nAssistant: no ",
        },
        TWO_TURNS,
    ),
    "a prompt that is null": ({"prompt": None, "chosen": chat("hi", "yes"), "rejected": chat("hi", "no")}, HELLO),
}


@pytest.mark.parametrize("case", PAIRS)
def test_of_a_pair_the_two_last_answers_are_the_targets(case, tiny, tmp_path):
    row, before = PAIRS[case]
    (pair,) = read(tiny, tmp_path, row)
    assert shown(tiny, pair.chosen) == (before, "yes</s>") and shown(tiny, pair.rejected) == (before, "no</s>")
    assert pair.lengths == (len(pair.chosen.tokens), len(pair.rejected.tokens)) and pair.margin == 0.0


def test_margins_and_other_names_of_the_columns(tiny, tmp_path):
    rows = [{"q": "hi", "good": "a", "bad": "b", "by": by} for by in (0.5, 2)]
    names = {"prompt_key": "q", "chosen_key": "good", "rejected_key": "bad", "margin_key": "by"}
    drawn = read(tiny, tmp_path, *rows, **names)
    assert [pair.margin for pair in drawn] == [0.5, 2.0]
    batch = pack_pairs(drawn)
    assert batch.rewards is not None and batch.lengths == (*drawn[0].lengths, *drawn[1].lengths)
    assert batch.rewards[batch.last].tolist() == [0.5, 0.0, 2.0, 0.0] and batch.rewards.sum() == 2.5


def test_a_system_prompt_and_bare_text(tiny, tmp_path):
    row = {"prompt": "hi", "chosen": "yes", "rejected": "no"}
    (pair,) = read(tiny, tmp_path, row, system_prompt="be kind")
    assert shown(tiny, pair.chosen) == (f"<s>system: be kind</s>{HELLO}", "yes</s>")
    (pair,) = read(tiny, tmp_path, row, chat_template=False)
    assert shown(tiny, pair.rejected) == ("hi", "no</s>")


def test_pairs_of_equal_answers_are_left_out_where_there_are_others(tiny, tmp_path):
    rows = [{"prompt": "hi", "chosen": "yes", "rejected": "yes"}, {"prompt": "hi", "chosen": "yes", "rejected": "no"}]
    assert len(read(tiny, tmp_path, *rows)) == 1


def test_labels_are_true_and_false_or_1_and_0_and_a_response_may_be_a_dialogue(tiny, tmp_path):
    rows = [
        {"prompt": "hi", "response": "yes", "label": True},
        {"prompt": "hi", "response": "no", "label": 0},
        {"response": "\n\nHuman: hi\n\nAssistant: so", "label": 1},
    ]
    labelled = read_labelled(str(write_jsonl(tmp_path / "a.jsonl", rows)), LabelData(), tiny, STOP)
    assert [row.desirable for row in labelled] == [True, False, True]
    assert [shown(tiny, row.sample) for row in labelled] == [(HELLO, f"{text}</s>") for text in ("yes", "no", "so")]


def test_a_mismatched_answer_is_the_other_s_after_the_own_prompt_cut_at_the_limit(tiny, tmp_path):
    rows = [{"prompt": "one", "response": "yes", "label": True}, {"prompt": "hi", "response": "nono", "label": False}]
    one, two = read_labelled(str(write_jsonl(tmp_path / "a.jsonl", rows)), LabelData(), tiny, STOP)
    both = mismatched(one.sample, two.sample, 100)
    assert shown(tiny, both) == ("<s>user: one</s><s>assistant: ", "nono</s>")
    short = mismatched(one.sample, two.sample, len(both.tokens) - 2)
    assert shown(tiny, short)[1] == "non"
    assert both.where.endswith("a.jsonl:1 with the answer of " + two.sample.where)


def test_steps_end_where_the_data_says_and_carry_their_labels(tiny, tmp_path):
    row = {"prompt": "1+1+1?", "steps": ["1+1=2", "2+1=4"], "labels": [True, False]}
    (steps,) = read_steps(str(write_jsonl(tmp_path / "a.jsonl", [row])), StepData(), tiny)
    text = "<s>user: 1+1+1?</s><s>assistant: 1+1=2\n\n2+1=4\n\n"
    assert tiny.decode(steps.sample.tokens) == text and steps.labels == (True, False)
    ends = [place for place, end in enumerate(steps.sample.mask) if end]
    assert [tiny.decode(steps.sample.tokens[: end + 1]) for end in ends] == [text[: text.index("=2") + 4], text]
    batch = pack_steps([steps, steps])
    assert batch.rewards is not None and batch.rewards[batch.response].tolist() == [1.0, 0.0, 1.0, 0.0]


def test_the_longer_answer_is_what_the_limit_is_for_and_the_stream_knows_what_is_to_come(tiny, tmp_path):
    rows = [{"prompt": f"{i}", "chosen": "yes", "rejected": "n" * (1 + 10 * (i == 3))} for i in range(7)]
    path = str(write_jsonl(tmp_path / "a.jsonl", rows))
    config = PairData(sources=(path,), max_tokens=32)
    pairs = lambda source: read_pairs(source, config, tiny, STOP)  # noqa: E731
    data = RowStream(config, pairs, lambda pair: pair.lengths, 0, "pairs")
    assert len(data) == 6 and "1 dropped for more than 32 tokens" in str(data) and str(data).startswith("6 pairs of")
    coming, state = data.coming(4), data.state()
    assert len(coming) == 4 and sorted(data.places(4)) == coming and data.coming(4) == coming
    data.load_state(state)
    assert sorted(data.places(4)) == coming
    assert data.coming(20) == [(0, row) for row in range(6)]
