"""Prompts from every kind of source: order, mixing, templates, dropping, and going on in place."""

import json
from collections import Counter
from pathlib import Path

import pytest
from samples import tokenizer, write_jsonl
from trialign.algorithms.config.data import PromptData
from trialign.algorithms.config.evaluate import EvaluatedDialogues
from trialign.algorithms.config.pretrain import TextData
from trialign.algorithms.config.sft import SFTData
from trialign.algorithms.data.dialogues import DialogueDataset
from trialign.algorithms.data.documents import TextDataset, TextStream
from trialign.algorithms.data.prompts import PromptDataset

ROWS = [{"prompt": f"say w{i}", "topic": f"t{i % 3}"} for i in range(10)]


def dataset(*sources: Path | str, seed: int = 0, **options) -> PromptDataset:
    return PromptDataset(PromptData(sources=tuple(map(str, sources)), **options), tokenizer(), seed)


def test_prompts_of_an_epoch_have_index_text_fields_and_source(tmp_path):
    """Blank lines are no rows; the seed alone decides the order, another one in each epoch."""
    path = tmp_path / "a.jsonl"
    path.write_text("\n\n".join(map(json.dumps, ROWS)))
    prompts = dataset(path, seed=1).next(30)
    assert [prompt.index for prompt in prompts] == list(range(30))
    for prompt in prompts:
        number = ROWS.index({"prompt": prompt.text, **prompt.fields})
        assert prompt.source == f"{path}:{2 * number + 1}"
    epochs = [[prompt.text for prompt in prompts[i : i + 10]] for i in (0, 10, 20)]
    assert all(sorted(epoch) == sorted(row["prompt"] for row in ROWS) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert dataset(path, seed=1).next(30) == prompts != dataset(path, seed=2).next(30)


@pytest.mark.parametrize("probabilities", [(), (0.7, 0.3)])
def test_prompts_resume_from_state(tmp_path, probabilities):
    paths = [write_jsonl(tmp_path / name, ROWS[:n]) for name, n in (("a.jsonl", 10), ("b.jsonl", 3))]
    data = dataset(*paths, probabilities=probabilities)
    data.next(17)
    state = json.loads(json.dumps(data.state()))
    expected = data.next(30)
    again = dataset(*paths, probabilities=probabilities)
    again.load_state(state)
    assert again.next(30) == expected


@pytest.mark.parametrize("probabilities", [(), (0.7, 0.3)])
def test_long_prompts_are_dropped_unless_a_source_has_no_others(tmp_path, probabilities):
    long, short = (write_jsonl(tmp_path / f"{n}.jsonl", [{"prompt": "say " * n}] * 2) for n in (9, 2))
    write_jsonl(both := tmp_path / "both.jsonl", [{"prompt": "say " * n} for n in (9, 2)])
    given = {"probabilities": probabilities, "max_prompt_tokens": 5}
    data = dataset(both, short, **given)
    assert str(data) == "3 prompts, 1 dropped for more than 5 tokens (11 tokens)"
    assert {len(prompt.tokens) for prompt in data.next(30)} == {4}
    with pytest.raises(ValueError, match=r"9.jsonl: all 2 .* data.max_prompt_tokens=5; the shortest has 11 tokens"):
        dataset(long, *([short] if probabilities else []), **given | {"probabilities": probabilities})


def test_prompts_are_mixed_by_probabilities(tmp_path):
    paths = [write_jsonl(tmp_path / f"{name}.jsonl", [{"prompt": f"say {name}"}] * 4) for name in "abc"]
    counts = Counter(prompt.text for prompt in dataset(*paths, probabilities=(0.5, 0.4, 0.1)).next(2000))
    assert [counts[f"say {name}"] / 2000 for name in "abc"] == pytest.approx([0.5, 0.4, 0.1], abs=0.04)
    few = tuple(str(write_jsonl(tmp_path / f"{i}.jsonl", [{"text": f"w{i}"}] * n)) for i, n in ((1, 9), (2, 1)))
    with pytest.raises(ValueError, match="data.eval_fraction=0.9 takes all of its . documents, but data.probabilities"):
        TextStream(TextData(sources=few, eval_fraction=0.9, probabilities=(0.5, 0.5)), tokenizer())


def test_strings_and_messages_use_the_chat_template(tmp_path):
    chat = [{"role": "user", "content": "hello you"}]
    rows = [{"prompt": "hello you"}, {"prompt": chat}, {"prompt": [{"role": "system", "content": "be kind"}, *chat]}]
    path, decode = write_jsonl(tmp_path / "a.jsonl", rows), tokenizer().decode
    briefly = sorted(dataset(path, system_prompt="be brief").next(3), key=lambda prompt: prompt.source)
    assert [decode(prompt.tokens[:3])[-5:] for prompt in briefly] == ["brief", "brief", " kind"]
    plain, messages, system = sorted(dataset(path).next(3), key=lambda prompt: prompt.source)
    assert plain.tokens == messages.tokens
    assert decode(plain.tokens) == "<user> hello you <assistant>"
    assert decode(system.tokens) == "<system> be kind <user> hello you <assistant>"
    assert plain.text == messages.text == system.text == "hello you"
    assert plain.messages == messages.messages == tuple(chat) and len(system.messages) == 2


def test_pretraining_mix_is_packed_with_eos(tmp_path):
    documents = [f"w{i} w{i} w{i}" for i in range(5)]
    path = write_jsonl(tmp_path / "t.jsonl", [{"text": text} for text in documents])
    tok = tokenizer()
    data = TextDataset(str(path), "text", tok, length=4)
    epoch = data.next(5)
    assert epoch.shape == (5, 4)
    assert sorted(tok.decode(row) for row in epoch) == [f"{text} <eos>" for text in documents]
    assert not data.next(5).equal(epoch)
    with pytest.raises(ValueError, match=r"t.jsonl: 20 tokens are less than one sequence of 21"):
        TextDataset(str(path), "text", tok, length=21)
    uneven = TextDataset(str(path), "text", tok, length=3, seed=1)  # 20 tokens: 6 whole sequences an epoch
    uneven.next(8)
    state = uneven.state()
    expected = uneven.next(9)
    again = TextDataset(str(path), "text", tok, length=3, seed=1)
    again.load_state(state)
    assert again.next(9).equal(expected)


def test_invalid_pretraining_mixes_are_refused(tmp_path):
    path, endless = str(write_jsonl(tmp_path / "a.jsonl", [{"text": "a b"}, {"text": 7}])), tokenizer()
    with pytest.raises(ValueError, match=r"a.jsonl:2: 'text' must be a string, not 7"):
        TextDataset(path, "text", tokenizer(), length=4)
    with pytest.raises(ValueError, match=r"a.jsonl:1: no column 'body' \(data.ptx_key\); it has: 'text'"):
        TextDataset(path, "body", tokenizer(), length=4)
    endless.eos_token = None
    path = str(write_jsonl(tmp_path / "b.jsonl", [{"text": "a b", "prompt": "a", "response": "b"}]))
    sft = SFTData(sources=(path,), chat_template=False)
    for read in (
        lambda: TextDataset(path, "text", endless, length=1),
        lambda: TextStream(TextData(sources=(path,)), endless),
        lambda: DialogueDataset(sft, endless, (1,)),
    ):
        with pytest.raises(ValueError, match="tokenizer has no end of sequence"):
            read()


def test_errors_name_the_options_of_their_section(tmp_path):
    sources = (str(write_jsonl(tmp_path / "a.jsonl", [{"word": "a"}])),)
    with pytest.raises(ValueError, match=r"'messages' \(dialogues.messages_key\) nor 'prompt' \(dialogues.prompt"):
        DialogueDataset(EvaluatedDialogues(sources=sources), tokenizer(), (1,))
