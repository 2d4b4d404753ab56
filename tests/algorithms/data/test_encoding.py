"""Tokens of prompts and responses: training sees exactly those of sampling, whatever the template and the tokenizer."""

import json
from itertools import pairwise
from typing import Any

import pytest
from samples import write_jsonl
from templates import TEMPLATES, sentencepiece_model
from tiny import tiny_tokenizer
from trialign.algorithms.config.conditional import ConditionConfig, RewardedData
from trialign.algorithms.config.data import PromptData
from trialign.algorithms.config.preference import LabelData, PairData, StepData
from trialign.algorithms.config.pretrain import TextData
from trialign.algorithms.config.sft import SFTData
from trialign.algorithms.data.conditional import ConditionedRows, read_rewarded
from trialign.algorithms.data.dialogues import DialogueDataset, Encoder, Sample, joined
from trialign.algorithms.data.documents import TextDataset, TextStream
from trialign.algorithms.data.encoding import first_tokens
from trialign.algorithms.data.preferences import (
    LabeledStream,
    mismatched,
    read_labeled_responses,
    read_pairs,
    read_steps,
)
from trialign.algorithms.data.prompts import PromptDataset
from trialign.algorithms.rewards.encoder import ChatEncoder, Completion
from trialign.models.hf.tokenizer import read_tokenizer

TEXTS = ("hi there", " hello", "the cat\nsat", "\n\nnaïve café", "  12 dogs ", "<b>", "'s mat", "a", "你好 世界")


@pytest.fixture(scope="module")
def tokenizers(smollm2, tmp_path_factory):
    """A maker of tokenizers under a template."""
    from transformers import AutoTokenizer

    sentencepiece = sentencepiece_model(tmp_path_factory.mktemp("sentencepiece"))

    def made(template):
        if template.tokenizer == "bytes":
            tokenizer = AutoTokenizer.from_pretrained(smollm2)
        else:
            settings = {"tokenizer_class": "LlamaTokenizer", "legacy": "off" not in template.tokenizer}
            (sentencepiece / "tokenizer_config.json").write_text(json.dumps(settings))
            tokenizer = read_tokenizer(sentencepiece)
        tokenizer.add_special_tokens({"additional_special_tokens": list(template.special)})
        tokenizer.chat_template = template.text
        if template.special:
            tokenizer.eos_token = template.end
        return tokenizer

    return made


def chats() -> list[list[dict[str, str]]]:
    """Dialogues of two and of three answers, with and without a system message."""
    made = []
    for i, text in enumerate(TEXTS):
        words = [text, TEXTS[i - 1], TEXTS[i - 2], text, TEXTS[i - 3], TEXTS[i - 1]][: 4 + 2 * (i % 2)]
        chat = [{"role": ("user", "assistant")[place % 2], "content": word} for place, word in enumerate(words)]
        made.append([*([{"role": "system", "content": "be kind"}] if i % 3 == 0 else []), *chat])
    return made


def prompts(tokenizer, folder, rows, **options) -> list[list[int]]:
    """Tokens that rollouts of these prompts begin with."""
    path = write_jsonl(folder / "prompts.jsonl", [{"prompt": row} for row in rows])
    data = PromptDataset(PromptData(sources=(str(path),), max_prompt_tokens=10_000, **options), tokenizer)
    drawn = sorted(data.next(len(rows)), key=lambda prompt: int(prompt.source.rpartition(":")[2]))
    return [prompt.tokens for prompt in drawn]


def split(sample: Sample) -> list[tuple[list[int], list[int]]]:
    """(all tokens before a run of targets, the run)."""
    edges = [i for i, (a, b) in enumerate(pairwise(b"\0" + sample.mask + b"\0")) if a != b]
    tokens = sample.tokens.tolist()
    return [(tokens[:begin], tokens[begin:end]) for begin, end in zip(edges[::2], edges[1::2], strict=True)]


@pytest.mark.parametrize("name", TEMPLATES)
def test_training_prompts_equal_rollout_prompts(name, tokenizers, tmp_path):
    """All answers of dialogues, and the one of a pair, a label, a reward, of steps and of a request to the server."""
    tokenizer, stop = tokenizers(TEMPLATES[name]), TEMPLATES[name].end
    ends = (tokenizer.eos_token_id,)
    assert tokenizer.convert_ids_to_tokens(ends[0]) == stop
    dialogues = chats()
    places = [(chat, i) for chat in dialogues for i, message in enumerate(chat) if message["role"] == "assistant"]
    asked = prompts(tokenizer, tmp_path, [chat[:i] for chat, i in places])
    path = write_jsonl(tmp_path / "rows.jsonl", [{"messages": chat} for chat in dialogues])
    config = SFTData(sources=(str(path),), max_tokens=10_000)
    rows = DialogueDataset(config, tokenizer, ends)
    learned = [turn for sample in joined(rows.rows()) for turn in split(sample)]
    assert [before for before, _ in learned] == asked
    for (before, turn), (chat, i) in zip(learned, places, strict=True):
        whole = tokenizer.apply_chat_template(chat[: i + 1], tokenize=False)
        assert turn[-1] == ends[0] and turn.count(ends[0]) == 1
        assert (
            tokenizer.decode(before + turn)
            == tokenizer.decode(tokenizer(whole, add_special_tokens=False).input_ids).rstrip()
        )

    last = [i for i, (chat, place) in enumerate(places) if place == len(chat) - 1]
    answers = [{"prompt": chat[:-1], "response": chat[-1]["content"]} for chat in dialogues]
    more = [{"chosen": r["response"], "rejected": f"{r['response']} no", "label": 1, "reward": 0.5} for r in answers]
    steps = [{"steps": [r["response"], "end"], "labels": [1, 0]} for r in answers]
    path = str(write_jsonl(tmp_path / "rows.jsonl", [a | b | c for a, b, c in zip(answers, more, steps, strict=True)]))
    expected = [learned[i] for i in last]
    pairs = read_pairs(path, PairData(), Encoder(PairData(), tokenizer, ends))
    labeled = read_labeled_responses(path, LabelData(), Encoder(LabelData(), tokenizer, ends))
    rewarded = [row.dialogue for row in read_rewarded(path, RewardedData(), True)]
    conditional = Encoder(RewardedData(), tokenizer, ends).responses(rewarded)
    for samples in ([p.chosen for p in pairs], [row.sample for row in labeled], conditional):
        assert [split(sample) for sample in samples] == [[turn] for turn in expected]
    assert [split(pair.rejected)[0][0] for pair in pairs] == [before for before, _ in expected]
    for i, row in enumerate(read_steps(path, StepData(), tokenizer)):
        assert row.sample.tokens[: len(expected[i][0])].tolist() == expected[i][0]
    for row, other in pairwise(row.sample for row in labeled):
        assert split(mismatched(row, other, 10_000)) == [(split(row)[0][0], split(other)[0][1])]


@pytest.mark.parametrize("name", ["SmolLM2, Qwen 1 and 2", "a prompt that ends in a space", "Mistral, Mixtral"])
def test_reward_server_tokens_equal_training_tokens(name, tokenizers, tmp_path):
    tokenizer = tokenizers(TEMPLATES[name])
    encoder = object.__new__(ChatEncoder)
    encoder.tokenizer, encoder.chat_template, encoder.end = tokenizer, True, tokenizer.eos_token_id
    rows = [{"prompt": chat[:-1], "response": chat[-1]["content"], "label": 1} for chat in chats()]
    for prefill in ("Hello! The", "a"):
        prompt = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": prefill}]
        rows.append({"prompt": prompt, "response": " weather", "label": 1})
    path, config = str(write_jsonl(tmp_path / "a.jsonl", rows)), LabelData()
    trained = read_labeled_responses(path, config, Encoder(config, tokenizer, (encoder.end,)))
    for row, own in zip(rows, trained, strict=True):
        completion = Completion("row", row["prompt"], row["response"], True, None)
        assert encoder(completion) == own.sample.tokens.tolist()


@pytest.fixture
def ending(tmp_path):
    """The tiny tokenizer, which begins a text with <s> and ends it with </s>."""
    from tokenizers.processors import TemplateProcessing

    tokenizer: Any = read_tokenizer(tiny_tokenizer(tmp_path / "ending"))
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


def test_eos_follows_responses_but_not_prompts(ending, tmp_path):
    """Of a tokenizer that puts its own around every text; one that is in the text already is not put there again."""
    assert first_tokens(ending) == [1] and ending("hi")["input_ids"][-1] == 2
    rows = [
        {"prompt": "hi", "response": "yo"},
        {"prompt": "<s>hi", "response": "yo</s>"},
        {"prompt": "hi", "response": "yo</s></s> "},
    ]
    more = {"chosen": "yo", "rejected": "no</s>", "label": 1, "steps": ["yo"], "labels": [1], "reward": 1.0}
    path = str(write_jsonl(tmp_path / "rows.jsonl", [row | more for row in rows]))
    decode = ending.decode
    assert [decode(p) for p in prompts(ending, tmp_path, ["hi", "<s>hi"], chat_template=False)] == ["<s>hi"] * 2
    sft = DialogueDataset(SFTData(sources=(path,), chat_template=False), ending, (2,))
    for sample in joined(sft.rows()):
        assert [(decode(a), decode(b)) for a, b in split(sample)] == [("<s>hi", "yo</s>")]
    pair_data, label_data, steps = PairData(chat_template=False), LabelData(chat_template=False), StepData
    for pair in read_pairs(path, pair_data, Encoder(pair_data, ending, (2,))):
        assert (decode(pair.chosen.tokens), decode(pair.rejected.tokens)) == ("<s>hiyo</s>", "<s>hino</s>")
    for row in read_labeled_responses(path, label_data, Encoder(label_data, ending, (2,))):
        assert decode(row.sample.tokens) == "<s>hiyo</s>"
    for row in read_steps(path, steps(chat_template=False), ending):
        assert decode(row.sample.tokens) == "<s>hiyo\n\n"
    data, condition = RewardedData(sources=(path,), chat_template=False), ConditionConfig(normalize=False)
    found = ConditionedRows(data, condition, {path: read_rewarded(path, data, True)}, ending, (2,))
    assert {decode(sample.tokens)[-5:] for sample in found.rows()} == {"yo</s>"[-5:]}


def test_documents_have_one_bos_and_one_eos(ending, tmp_path):
    texts = ["one", "<s>one", "one</s>"]
    path = str(write_jsonl(tmp_path / "text.jsonl", [{"text": text} for text in texts]))
    for row in TextStream(TextData(sources=(path,), max_tokens=6), ending).rows():
        assert [ending.decode(piece.tokens) for piece in row] == ["<s>one</s>"]
    assert TextDataset(path, "text", ending, 5).tokens == 3 * 5


def test_kto_compares_prompts_by_tokens(tokenizers, tmp_path):
    """In a template under which the first token of an answer would otherwise be joined with the prompt's last."""
    tokenizer = tokenizers(TEMPLATES["a prompt that ends in a space"])
    rows = [{"prompt": "same", "response": text, "label": i} for i, text in enumerate(("hi", " hi"))]
    path = str(write_jsonl(tmp_path / "a.jsonl", rows))
    with pytest.raises(ValueError, match="all 2 responses have one prompt"):
        LabeledStream(LabelData(sources=(path,)), tokenizer, (tokenizer.eos_token_id,))
