"""Prompts from every kind of source: order, mixing, templates, dropping, and going on in place."""

import json
from collections import Counter
from pathlib import Path

import pytest
from samples import tokenizer, write_jsonl
from trialign.algorithms.config.data import PromptData
from trialign.algorithms.config.evaluate import EvaluatedDialogues, EvaluatedText
from trialign.algorithms.config.pretrain import TextData
from trialign.algorithms.config.rlhf import PromptsConfig
from trialign.algorithms.data.dialogues import DialogueDataset
from trialign.algorithms.data.documents import TextDataset, TextStream
from trialign.algorithms.data.prompts import PromptDataset

ROWS = [{"prompt": f"say w{i}", "topic": f"t{i % 3}"} for i in range(10)]


def dataset(*sources: Path | str, seed: int = 0, **knobs) -> PromptDataset:
    return PromptDataset(PromptData(sources=tuple(map(str, sources)), **knobs), tokenizer(), seed)


def test_each_epoch_meets_every_row_once_in_another_order(tmp_path):
    data = dataset(write_jsonl(tmp_path / "a.jsonl", ROWS))
    epochs = [[prompt.text for prompt in data.next(10)] for _ in range(3)]
    assert all(sorted(epoch) == sorted(row["prompt"] for row in ROWS) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_prompts_carry_index_text_fields_and_source(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    prompts = dataset(path).next(25)
    assert [prompt.index for prompt in prompts] == list(range(25))
    for prompt in prompts:
        number = ROWS.index({"prompt": prompt.text, **prompt.fields}) + 1
        assert prompt.source == f"{path}:{number}"


def test_the_seed_alone_decides_the_order(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    first, same, other = (dataset(path, seed=seed).next(30) for seed in (1, 1, 2))
    assert first == same and first != other


@pytest.mark.parametrize("probabilities", [(), (0.7, 0.3)])
def test_a_stream_goes_on_where_its_state_was_taken(tmp_path, probabilities):
    paths = [write_jsonl(tmp_path / name, ROWS[:n]) for name, n in (("a.jsonl", 10), ("b.jsonl", 3))]
    data = dataset(*paths, probabilities=probabilities)
    data.next(17)
    state = json.loads(json.dumps(data.state()))
    expected = data.next(30)
    again = dataset(*paths, probabilities=probabilities)
    again.load_state(state)
    assert again.next(30) == expected


def test_sources_are_mixed_by_their_probabilities(tmp_path):
    paths = [write_jsonl(tmp_path / f"{name}.jsonl", [{"prompt": f"say {name}"}] * 4) for name in "abc"]
    counts = Counter(prompt.text for prompt in dataset(*paths, probabilities=(0.5, 0.4, 0.1)).next(2000))
    shares = [counts[f"say {name}"] / 2000 for name in "abc"]
    assert shares == pytest.approx([0.5, 0.4, 0.1], abs=0.04)


def test_text_is_mixed_by_its_sources_probabilities(tmp_path):
    paths = [
        str(write_jsonl(tmp_path / f"{name}.jsonl", [{"text": f"{name} {name}"}] * rows))
        for name, rows in (("a", 30), ("b", 3), ("c", 7))
    ]
    config = TextData(sources=tuple(paths), max_tokens=3, probabilities=(0.5, 0.4, 0.1))  # a document and its end a row
    data = TextStream(config, tokenizer())
    counts = Counter(Path(row[0].where.rpartition(":")[0]).stem for row in data.next(2000))
    assert [counts[name] / 2000 for name in "abc"] == pytest.approx([0.5, 0.4, 0.1], abs=0.04)
    few = tuple(str(write_jsonl(tmp_path / f"{i}.jsonl", [{"text": f"w{i}"}] * n)) for i, n in ((1, 9), (2, 1)))
    message = r"\.jsonl: data.eval_fraction=0.9 holds out all of its \d documents, but data.probabilities draw from ev"
    with pytest.raises(ValueError, match=message):
        TextStream(TextData(sources=few, eval_fraction=0.9, probabilities=(0.5, 0.5)), tokenizer())
    assert TextStream(TextData(sources=few, eval_fraction=0.9), tokenizer()).documents == 1


def test_without_probabilities_all_rows_count_alike(tmp_path):
    paths = [write_jsonl(tmp_path / f"{n}.jsonl", [{"prompt": f"say {n} w{i}"} for i in range(n)]) for n in (1, 9)]
    assert len({prompt.text for prompt in dataset(*paths).next(10)}) == 10


def test_the_chat_template_wraps_strings_and_messages_alike(tmp_path):
    chat = [{"role": "user", "content": "hello you"}]
    rows = [{"prompt": "hello you"}, {"prompt": chat}, {"prompt": [{"role": "system", "content": "be kind"}, *chat]}]
    data = dataset(write_jsonl(tmp_path / "a.jsonl", rows))
    plain, messages, system = sorted(data.next(3), key=lambda prompt: prompt.source)
    decode = tokenizer().decode
    assert plain.tokens == messages.tokens
    assert decode(plain.tokens) == "<user> hello you <assistant>"
    assert decode(system.tokens) == "<system> be kind <user> hello you <assistant>"
    assert plain.text == messages.text == system.text == "hello you"
    assert plain.messages == messages.messages == tuple(chat) and len(system.messages) == 2


def test_a_system_prompt_goes_before_prompts_that_bring_none(tmp_path):
    own = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hello"}]
    path = write_jsonl(tmp_path / "a.jsonl", [{"prompt": "hello"}, {"prompt": own}])
    first, second = sorted(dataset(path, system_prompt="be brief").next(2), key=lambda prompt: prompt.source)
    assert tokenizer().decode(first.tokens) == "<system> be brief <user> hello <assistant>"
    assert tokenizer().decode(second.tokens) == "<system> be kind <user> hello <assistant>"


def test_without_a_template_the_text_goes_in_bare(tmp_path):
    (prompt,) = dataset(write_jsonl(tmp_path / "a.jsonl", [{"prompt": "hello you"}]), chat_template=False).next(1)
    assert tokenizer().decode(prompt.tokens) == "hello you"


def test_over_long_prompts_are_dropped_and_counted(tmp_path):
    rows = [*ROWS, {"prompt": "say " * 20}]
    data = dataset(write_jsonl(tmp_path / "a.jsonl", rows), max_prompt_tokens=5)
    assert data.dropped == 1 and str(data) == "10 prompts, 1 dropped for more than 5 tokens (22 tokens)"
    assert all(len(prompt.tokens) <= 5 for prompt in data.next(50))


def test_parquet_and_saved_datasets_give_the_same_prompts_as_jsonl(tmp_path):
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list(ROWS)
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict({"train": table, "test": table.select([0])}).save_to_disk(tmp_path / "split")
    expected = [(p.text, p.tokens, p.fields) for p in dataset(write_jsonl(tmp_path / "a.jsonl", ROWS)).next(25)]
    for source in ("a.parquet", "plain", "split:train"):
        data = dataset(tmp_path / source)
        assert [(p.text, p.tokens, p.fields) for p in data.next(25)] == expected, source
    assert len(dataset(tmp_path / "split:test").next(1)) == 1
    with pytest.raises(ValueError, match="has splits, name one: .*split:train"):
        dataset(tmp_path / "split")


def test_blank_lines_are_no_rows(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "hello"}\n\n{"prompt": "you"}\n\n')
    assert {p.source for p in dataset(path).next(2)} == {f"{path}:1", f"{path}:3"}


def test_text_is_packed_with_an_end_after_each_document(tmp_path):
    documents = [f"w{i} w{i} w{i}" for i in range(5)]
    path = write_jsonl(tmp_path / "t.jsonl", [{"text": text} for text in documents])
    tok = tokenizer()
    data = TextDataset(str(path), "text", tok, length=4)
    epoch = data.next(5)
    assert epoch.shape == (5, 4)
    assert sorted(tok.decode(row) for row in epoch) == [f"{text} <eos>" for text in documents]
    uneven = TextDataset(str(path), "text", tok, length=3, seed=1)  # 20 tokens: 6 whole sequences an epoch
    uneven.next(8)
    state = uneven.state()
    expected = uneven.next(9)
    again = TextDataset(str(path), "text", tok, length=3, seed=1)
    again.load_state(state)
    assert again.next(9).equal(expected)


def test_a_section_s_own_knobs_are_named(tmp_path):
    sources = (str(write_jsonl(tmp_path / "a.jsonl", [{"word": "a"}])),)
    with pytest.raises(ValueError, match=r"no column 'text' \(text.text_key\)"):
        TextStream(EvaluatedText(sources=sources), tokenizer())
    with pytest.raises(
        ValueError, match=r"'messages' \(dialogues.messages_key\) nor 'prompt' \(dialogues.prompt_key\)"
    ):
        DialogueDataset(EvaluatedDialogues(sources=sources), tokenizer(), (1,))
    with pytest.raises(ValueError, match=r"no column 'prompt' \(prompts.prompt_key\)"):
        PromptDataset(PromptsConfig(sources=sources), tokenizer())


def test_the_text_of_two_epochs_comes_in_two_orders(tmp_path):
    path = write_jsonl(tmp_path / "t.jsonl", [{"text": f"w{i}"} for i in range(10)])
    data = TextDataset(str(path), "text", tokenizer(), length=20)
    first, second = data.next(1), data.next(1)
    assert not first.equal(second) and first.sort().values.equal(second.sort().values)
