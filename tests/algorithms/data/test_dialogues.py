"""Rows of supervised fine-tuning: which tokens are targets, what is dropped and held out, and what is refused."""

import gzip
from itertools import groupby
from pathlib import Path

import pytest
from samples import chat, write_jsonl
from templates import TEMPLATES
from trialign.algorithms.config.sft import SFTData
from trialign.algorithms.data.dialogues import DialogueDataset, Sample, joined, pack_samples
from trialign.models.hf.tokenizer import read_tokenizer

STOP = (2,)  # </s> of the tiny tokenizer
TWO_TURNS = chat("hi", "yo", "ok", "bye")
MARKED = (
    "{% for m in messages %}<s>{{ m.role }}: {% if m.role == 'assistant' %}{% generation %}{{ m.content }}</s>"
    "{% endgeneration %}{% else %}{{ m.content }}</s>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)
UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")


@pytest.fixture
def with_template(tiny, monkeypatch):
    """The tiny tokenizer under another chat template, for one test."""

    def change(template: str):
        monkeypatch.setattr(tiny, "chat_template", template)
        return tiny

    return change


def dataset(tokenizer, *sources: Path | str, stop=STOP, seed: int = 0, **options) -> DialogueDataset:
    return DialogueDataset(SFTData(sources=tuple(map(str, sources)), **options), tokenizer, stop, seed)


def drawn(data: DialogueDataset, count: int) -> list[Sample]:
    """The samples of the next rows."""
    return joined(data.next(count))


def read(tokenizer, folder: Path, *rows: dict, **options) -> list[Sample]:
    """The samples of these rows, in their order."""
    data = dataset(tokenizer, write_jsonl(folder / "rows.jsonl", rows), **options)
    return sorted(drawn(data, len(rows)), key=lambda sample: int(sample.where.rpartition(":")[2]))


def learned(tokenizer, sample: Sample) -> list[str]:
    """The text of every run of targets."""
    runs = groupby(zip(sample.tokens, sample.mask, strict=True), key=lambda pair: pair[1])
    return [tokenizer.decode([token for token, _ in run]) for target, run in runs if target]


def test_mask_of_a_prompt_and_its_response(tiny, tmp_path):
    rows = {"prompt": "hi", "response": "yo"}, {"prompt": TWO_TURNS[:3], "response": "bye"}
    plain, messages = read(tiny, tmp_path, *rows)
    assert learned(tiny, plain) == ["yo</s>"] and plain.text == "hi"
    assert learned(tiny, messages) == ["bye</s>"] and messages.text == "ok"
    names = {"prompt_key": "question", "response_key": "answer", "messages_key": "chat"}
    one, two = read(tiny, tmp_path, {"question": "hi", "answer": "yo</s> </s>"}, {"chat": TWO_TURNS}, **names)
    assert learned(tiny, one) == ["yo</s>"] and learned(tiny, two) == ["yo</s>", "bye</s>"]
    assert pack_samples([one, two]).mask.int().tolist() == [*one.mask, *two.mask]


def test_generation_marks_equal_transformers(with_template, tmp_path):
    tokenizer = with_template(MARKED)
    (sample,) = read(tokenizer, tmp_path, {"messages": TWO_TURNS})
    expected = tokenizer.apply_chat_template(TWO_TURNS, return_dict=True, return_assistant_tokens_mask=True)
    assert list(sample.tokens) == expected["input_ids"] and list(sample.mask) == expected["assistant_masks"]
    (response,) = read(tokenizer, tmp_path, {"prompt": TWO_TURNS[:3], "response": "bye"})
    assert list(response.tokens) == expected["input_ids"] and learned(tokenizer, response) == ["bye</s>"]
    (unmarked,) = read(with_template(UNMARKED), tmp_path, {"messages": TWO_TURNS})
    assert (unmarked.tokens, unmarked.mask) == (sample.tokens, sample.mask)


def test_tokenizers_without_offsets_give_the_same_mask(tmp_path):
    from transformers import ByT5Tokenizer

    ByT5Tokenizer(extra_ids=0, additional_special_tokens=["<s>"]).save_pretrained(tmp_path)
    slow = read_tokenizer(tmp_path)
    assert not slow.is_fast
    for template in (MARKED, UNMARKED):
        slow.chat_template = template
        rows = {"messages": TWO_TURNS}, {"prompt": "hi", "response": "né"}
        dialogue, response = read(slow, tmp_path, *rows, stop=(slow.eos_token_id,))
        assert learned(slow, dialogue) == ["yo</s>", "bye</s>"] and learned(slow, response) == ["né</s>"]


ENDLESS = UNMARKED.replace("</s>", "")
SHORT = MARKED.replace("{{ m.content }}</s>{% endgeneration %}", "{{ m.content }}{% endgeneration %}</s>")


@pytest.mark.parametrize("template", [ENDLESS, SHORT], ids=["none is written", "marks stop before it"])
def test_turns_without_eos_are_refused_or_completed(template, with_template, tmp_path):
    tokenizer = with_template(template)
    rows = [{"messages": TWO_TURNS}, {"prompt": "hi", "response": "yo \n"}]
    for row in rows:
        with pytest.raises(ValueError, match=r"rows.jsonl:1: the chat template .*message \d .*data.append_eos=true"):
            read(tokenizer, tmp_path, row)
    data = dataset(tokenizer, write_jsonl(tmp_path / "rows.jsonl", rows), append_eos=True)
    samples = joined(data.rows())
    turns = [turn for sample in samples for turn in learned(tokenizer, sample)]
    assert turns == ["yo</s>", "bye</s>", "yo</s>" if template == ENDLESS else "yo \n</s>"]
    assert all(sample.tokens.tolist().count(2) <= 4 for sample in samples)  # none is doubled
    assert "data.append_eos: the end of 3 turns is learned" in str(data)
    # ENDLESS does not continue a response with its end, so each turn is a sample.
    assert len(samples) == (3 if template == ENDLESS else 2)


def test_weight_0_messages_are_not_learned(tiny, tmp_path):
    no = [{"weight": 0}, {"weight": 0, "train": False}]
    yes = [{"train": True}, {"weight": None, "train": None}]
    user, last = TWO_TURNS[0] | {"weight": 0}, TWO_TURNS[3]
    rows = [{"messages": [user, TWO_TURNS[1] | a, TWO_TURNS[2], last | b]} for a in no for b in yes]
    for sample in read(tiny, tmp_path, *rows):
        assert learned(tiny, sample) == ["bye</s>"]
        assert tiny.decode(sample.tokens) == "<s>user: hi</s><s>assistant: yo</s><s>user: ok</s><s>assistant: bye</s>"
    rows = [{"messages": [*TWO_TURNS[:3], last | own]} for own in no]
    for sample in read(tiny, tmp_path, *rows, system_prompt="be kind"):
        assert learned(tiny, sample) == ["yo</s>"] and str(tiny.decode(sample.tokens)).endswith("yo</s>")
    none = {"messages": [TWO_TURNS[0], TWO_TURNS[1] | no[0]]}
    path = write_jsonl(tmp_path / "none.jsonl", [none, *rows])
    assert "; 1 dropped with weight 0 only" in str(dataset(tiny, path))
    with pytest.raises(ValueError, match=r"none.jsonl: all messages of all 2 rows have weight 0"):
        dataset(tiny, write_jsonl(tmp_path / "none.jsonl", [none, none]))


QWEN3 = TEMPLATES["Qwen 3"].text.replace("<|im_start|>", "<s>").replace("<|im_end|>", "</s>")
THOUGHT = "<think>\nadd\n</think>\n\n"
THOUGHTS = chat("2+2?", f"{THOUGHT}4", "3+3?", f"{THOUGHT}6")


def test_rewritten_history_splits_turns_into_samples(with_template, tmp_path):
    tokenizer = with_template(QWEN3)
    rows = [{"messages": THOUGHTS}, {"messages": TWO_TURNS}]
    data = dataset(tokenizer, write_jsonl(tmp_path / "a.jsonl", rows))
    first, second = sorted(data.rows(), key=len, reverse=True)
    assert [tokenizer.decode(sample.tokens) for sample in first] == [
        f"<s>user\n2+2?</s>\n<s>assistant\n{THOUGHT}4</s>",
        f"<s>user\n2+2?</s>\n<s>assistant\n4</s>\n<s>user\n3+3?</s>\n<s>assistant\n{THOUGHT}6</s>",
    ]
    assert [learned(tokenizer, sample) for sample in first] == [[f"{THOUGHT}4</s>"], [f"{THOUGHT}6</s>"]]
    assert [sample.where.rpartition(":")[2] for sample in first] == ["1, message 1", "1, message 3"]
    assert [sample.text for sample in first] == ["2+2?", "3+3?"]
    # Without reasoning in the data a response is given empty thoughts, which later turns leave out as well.
    assert [learned(tokenizer, s) for s in second] == [[f"<think>\n\n</think>\n\n{end}</s>"] for end in ("yo", "bye")]
    assert len(data) == 2 and data.tokens == sum(len(sample.tokens) for sample in joined(data.rows()))
    held = dataset(tokenizer, tmp_path / "a.jsonl", eval_fraction=0.5)  # a dialogue is held out whole
    assert len(held) == len(held.eval_rows) == 1 and len(held.eval_rows[0]) == 2


def test_eval_split_is_disjoint_and_seeded(tiny, tmp_path):
    rows = {name: [{"prompt": f"{name} {i}", "response": "x"} for i in range(10)] for name in "ab"}
    paths = [write_jsonl(tmp_path / f"{name}.jsonl", own) for name, own in rows.items()]
    data = dataset(tiny, *paths, eval_fraction=0.25)
    held, seen = {s.text for s in joined(data.eval_rows)}, {s.text for s in drawn(data, 60)}
    assert len(data) == 15 and len(held) == 5 and len(seen) == 15 and not held & seen
    again, other = (dataset(tiny, *paths, eval_fraction=0.25, seed=seed).eval_rows for seed in (0, 1))
    assert {s.text for s in joined(again)} == held != {s.text for s in joined(other)}
    apart = dataset(tiny, paths[0], eval_sources=(str(paths[1]),))
    assert len(apart) == 10 and {s.text[0] for s in joined(apart.eval_rows)} == {"b"}


def marked(**given: object) -> dict:
    """A dialogue whose answer has these marks."""
    return {"messages": [TWO_TURNS[0], TWO_TURNS[1] | given]}


ANSWERED, SYSTEM = {"prompt": "a", "response": "b"}, {"role": "system", "content": "s"}
REFUSED = {
    "no columns": ({"text": "a", "id": 1}, "neither a column 'messages' (data.messages_key) nor 'prompt' (data.prompt"),
    "empty response": ({"prompt": "a", "response": " \n"}, "'response' is empty"),
    "no assistant turn": ({"messages": [SYSTEM, TWO_TURNS[0]]}, "'messages' has no assistant turn to learn (roles: sy"),
    "a number for a prompt": (ANSWERED | {"prompt": 4}, "'prompt' must be a string or a list of {role, content}"),
    "a number for a response": (ANSWERED | {"response": 4}, "'response' must be a string, not 4"),
    "no messages": ({"messages": []}, "'messages' must be a list of {role, content} messages, not []"),
    "an empty turn": (marked(content=""), "'messages'[1] (assistant) is empty"),
    "a weight against train": (marked(weight=1, train=False), "[1] (assistant): weight=1 and train=False: must agree"),
    "a weight of a half": (marked(weight=0.5), "'messages'[1] (assistant): weight=0.5: must be 0 (not learned) or 1"),
    "train in words": (marked(train="no"), "'messages'[1] (assistant): train='no': must be true or false"),
    "tools in words": (ANSWERED | {"tools": "clock"}, "tools='clock': must be a list of function descriptions"),
    "tools that are none": (ANSWERED | {"tools": {"a": 1}}, "tools={'a': 1}: must be a list of function descriptions"),
    "calls without results": (
        ANSWERED | {"prompt": [TWO_TURNS[0], {"role": "assistant", "tool_calls": [{}]}]},
        "the prompt ends with tool calls of the assistant, whose results must follow",
    ),
    "a user's message to learn": ({"messages": [TWO_TURNS[0] | {"train": True}, TWO_TURNS[1]]}, "'messages'[0] (user)"),
    "the assistant first": ({"messages": [SYSTEM, *TWO_TURNS[1:]]}, "the first turn is the assistant's"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_invalid_dialogue_rows_are_refused(case, tiny, tmp_path):
    row, message = REFUSED[case]
    path = write_jsonl(tmp_path / "a.jsonl", [ANSWERED, row])
    with pytest.raises(ValueError) as error:
        dataset(tiny, path)
    assert str(error.value).startswith(f"{path}:2: ") and message in str(error.value)


def test_broken_gzip_files_are_refused(tiny, tmp_path):
    path = tmp_path / "a.jsonl.gz"
    for content in (b'{"prompt": "a"}\n', gzip.compress(b'{"prompt": "a", "response": "b"}\n' * 99)[:-20]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a.jsonl.gz: not a whole gzip file"):
            dataset(tiny, path)


def test_inconsistent_chat_templates_are_refused(with_template, tmp_path):
    otherwise = UNMARKED.replace("<s>assistant: {% endif %}", "<s>assistant: hm{% endif %}")
    path = write_jsonl(tmp_path / "a.jsonl", [{"messages": TWO_TURNS}])
    with pytest.raises(ValueError, match=r"a.jsonl:1: the chat template writes message 1 \(assistant\) otherwise"):
        dataset(with_template(otherwise), path)
    blind = MARKED.replace("m.role == 'assistant'", "loop.first")
    row = {"prompt": TWO_TURNS[:3], "response": "bye"}
    with pytest.raises(ValueError, match=r"a.jsonl:1: the chat template leaves message 3 no token to learn"):
        dataset(with_template(blind), write_jsonl(path, [row]))


def test_templates_that_drop_tools_are_refused(with_template, tmp_path):
    """A call that is left out would be learned as an empty turn."""
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Rome"}}}
    calls = marked(content="", tool_calls=[call])
    for row, part in (calls, "tool calls of message 1"), ({"messages": TWO_TURNS, "tools": [call]}, "'tools'"):
        with pytest.raises(ValueError, match=f"a.jsonl:1: .* {part}"):
            dataset(with_template(UNMARKED), write_jsonl(tmp_path / "a.jsonl", [row]))
