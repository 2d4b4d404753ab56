"""Rows of preferences: pairs, labeled responses and labeled steps as tokens, with exactly the response as targets."""

import json

import pytest
from samples import chat, write_jsonl
from trialign.algorithms.config.data import PromptData
from trialign.algorithms.config.preference import LabelData, PairData, StepData
from trialign.algorithms.config.sft import SFTData
from trialign.algorithms.data.dialogues import DialogueDataset, Encoder
from trialign.algorithms.data.preferences import PairStream, read_labeled_responses, read_pairs, read_steps
from trialign.algorithms.data.prompts import PromptDataset
from trialign.algorithms.reward_model import pack_pairs, pack_steps

STOP = (2,)  # </s> of the tiny tokenizer


def read(tokenizer, folder, *rows, **options):
    config = PairData(**options)
    return read_pairs(str(write_jsonl(folder / "rows.jsonl", rows)), config, Encoder(config, tokenizer, STOP))


def shown(tokenizer, sample) -> tuple[str, str]:
    """(text before the targets, text of the targets); targets are one stretch at the end."""
    begin = sample.mask.index(1)
    assert sample.mask == bytes(begin) + b"\1" * (len(sample.mask) - begin)
    return str(tokenizer.decode(sample.tokens[:begin])), str(tokenizer.decode(sample.tokens[begin:]))


HELLO = "<s>user: hi</s><s>assistant: "
TWO_TURNS = "<s>user: hi</s><s>assistant: yo</s><s>user: ok</s><s>assistant: "


TURNS, IN_WORDS = ("hi", "yo", "ok"), "\n\nHuman: hi\n\nAssistant: yo\n\nHuman: ok\n\nAssistant: "
PAIRS = {
    "strings": ("hi", "yes", "no", HELLO),
    "dialogues in messages": (None, chat(*TURNS, "yes"), chat(*TURNS, "no"), TWO_TURNS),
    "dialogues in strings": (None, f"{IN_WORDS}yes", f"{IN_WORDS}no ", TWO_TURNS),
    "a prompt of messages beside dialogues": (chat(*TURNS), chat(*TURNS, "yes"), "no", TWO_TURNS),
    "a prompt beside dialogues in strings": ("hi", "\n\nHuman: hi\n\nAssistant: yes", "\n\nAssistant: no", HELLO),
}


@pytest.mark.parametrize("case", PAIRS)
def test_targets_of_pairs_are_the_last_responses(case, tiny, tmp_path):
    prompt, chosen, rejected, before = PAIRS[case]
    (pair,) = read(tiny, tmp_path, {"prompt": prompt, "chosen": chosen, "rejected": rejected})
    assert shown(tiny, pair.chosen) == (before, "yes</s>") and shown(tiny, pair.rejected) == (before, "no</s>")
    assert pair.lengths == (len(pair.chosen.tokens), len(pair.rejected.tokens)) and pair.margin == 0.0


def test_margins_and_renamed_columns(tiny, tmp_path):
    rows = [{"q": "hi", "good": "a", "bad": "b", "by": by} for by in (0.5, 2)]
    names = {"prompt_key": "q", "chosen_key": "good", "rejected_key": "bad", "margin_key": "by"}
    drawn = read(tiny, tmp_path, *rows, **names)
    assert [pair.margin for pair in drawn] == [0.5, 2.0]
    batch = pack_pairs(drawn)
    assert batch.rewards is not None and batch.lengths == (*drawn[0].lengths, *drawn[1].lengths)
    assert batch.rewards[batch.last].tolist() == [0.5, 0.0, 2.0, 0.0] and batch.rewards.sum() == 2.5


TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {}}}]
CALL = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "clock"}}]}
ASKED = [{"role": "user", "content": "when?"}, CALL, {"role": "tool", "content": "noon", "name": "clock"}]
WITH_TOOLS = (
    "{% for t in tools or [] %}<s>tool {{ t.function.name }}</s>{% endfor %}{% for m in messages %}"
    "<s>{{ m.role }}{% if m.name %} {{ m.name }}{% endif %}: {{ m.content }}"
    "{% for c in m.tool_calls or [] %}[{{ c.function.name }}]{% endfor %}</s>"
    "{% endfor %}{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
BEFORE = "<s>tool clock</s><s>user: when?</s><s>assistant: [clock]</s><s>tool clock: noon</s><s>assistant: "


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)], ids=["a list", "JSON"])
def test_tools_reach_the_template_in_every_format(tools, tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(tiny, "chat_template", WITH_TOOLS)
    end, row = {"role": "assistant", "content": "at noon"}, {"prompt": ASKED, "tools": tools}
    sides = {"chosen": [*ASKED, end], "rejected": [*ASKED, end | {"content": "no"}], "tools": tools}
    for given in (row | {"chosen": "at noon", "rejected": "no"}, row | sides, sides):
        (pair,) = read(tiny, tmp_path, given)
        assert [shown(tiny, side) for side in pair[:2]] == [(BEFORE, "at noon</s>"), (BEFORE, "no</s>")]
    rows = write_jsonl(tmp_path / "a.jsonl", [row | {"response": "no", "label": 1, "steps": ["x"], "labels": [1]}])
    (labeled,) = read_labeled_responses(str(rows), LabelData(), Encoder(LabelData(), tiny, STOP))
    (steps,) = read_steps(str(rows), StepData(), tiny)
    (prompt,) = PromptDataset(PromptData(sources=(str(rows),)), tiny).next(1)
    ((sft,),) = DialogueDataset(SFTData(sources=(str(rows),)), tiny, STOP).next(1)
    assert shown(tiny, labeled.sample) == shown(tiny, sft) == (BEFORE, "no</s>")
    assert tiny.decode(steps.sample.tokens) == BEFORE + "x\n\n"
    assert tiny.decode(prompt.tokens) == BEFORE
    assert [message["role"] for message in prompt.messages] == ["user", "assistant", "tool"]


def test_labels_and_responses_of_kto_rows(tiny, tmp_path):
    rows = [{"prompt": "hi", "response": "yes", "label": True}, {"prompt": "hi", "response": "no", "label": 0}]
    path = write_jsonl(tmp_path / "a.jsonl", [*rows, {"response": "\n\nHuman: hi\n\nAssistant: so", "label": 1}])
    labeled = read_labeled_responses(str(path), LabelData(), Encoder(LabelData(), tiny, STOP))
    assert [row.desirable for row in labeled] == [True, False, True]
    assert [shown(tiny, row.sample) for row in labeled] == [(HELLO, f"{text}</s>") for text in ("yes", "no", "so")]


def test_steps_have_labels_at_their_ends(tiny, tmp_path):
    row = {"prompt": "1+1+1?", "steps": ["1+1=2", "2+1=4"], "labels": [True, False]}
    (steps,) = read_steps(str(write_jsonl(tmp_path / "a.jsonl", [row])), StepData(), tiny)
    text = "<s>user: 1+1+1?</s><s>assistant: 1+1=2\n\n2+1=4\n\n"
    assert tiny.decode(steps.sample.tokens) == text and steps.labels == (True, False)
    ends = [place for place, end in enumerate(steps.sample.mask) if end]
    assert [tiny.decode(steps.sample.tokens[: end + 1]) for end in ends] == [text[: text.index("=2") + 4], text]
    batch = pack_steps([steps, steps])
    assert batch.rewards is not None and batch.rewards[batch.response].tolist() == [1.0, 0.0, 1.0, 0.0]


def test_pair_limit_and_coming_rows(tiny, tmp_path):
    rows = [{"prompt": f"{i}", "chosen": "yes", "rejected": "n" * (1 + 10 * (i == 3))} for i in range(7)]
    rows.append({"prompt": "7", "chosen": "yes", "rejected": "yes"})
    path = str(write_jsonl(tmp_path / "a.jsonl", rows))
    config = PairData(sources=(path,), max_tokens=32)
    data = PairStream(config, tiny, STOP)
    assert len(data) == 6 and "1 dropped for more than 32 tokens" in str(data)
    assert str(data).endswith("; 1 dropped for equal responses")
    coming, state = data.coming(4), data.state()
    assert len(coming) == 4 and sorted(data.places(4)) == coming and data.coming(4) == coming
    data.load_state(state)
    assert sorted(data.places(4)) == coming
    assert data.coming(20) == [(0, row) for row in range(6)]
