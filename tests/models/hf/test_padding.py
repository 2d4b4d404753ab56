"""The padding token of exported score models: one that no text ends with, or none."""

import json

import pytest
from samples import tokenizer as words
from tiny import tiny_llama, tiny_tokenizer
from trialign.models.families.registry import read_config
from trialign.models.hf.padding import padding_id, score_padding, write_padding
from trialign.models.hf.tokenizer import read_tokenizer


@pytest.fixture
def spare(tmp_path):
    """A tokenizer whose padding is its end of sequence, with special tokens that it has no use for."""
    tokenizer = read_tokenizer(tiny_tokenizer(tmp_path))
    specials: list = ["<|im_end|>", "<|endoftext|>", "</tool>", "<|file_sep|>", "<|fim_pad|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": specials})
    return tokenizer


def test_it_is_the_one_called_so_else_one_that_ends_nothing(spare):
    ids = {token: spare.convert_tokens_to_ids(token) for token in ("<|fim_pad|>", "<|file_sep|>", "<unk>", "<s>")}
    assert padding_id(spare, (2,), 1000) == ids["<|fim_pad|>"]
    assert padding_id(spare, (2,), ids["<|fim_pad|>"]) == ids["<|file_sep|>"]  # the model has no row for the other
    assert padding_id(spare, (2, ids["<|fim_pad|>"]), 1000) == ids["<|file_sep|>"]
    assert padding_id(spare, (2,), ids["<|file_sep|>"]) == ids["<unk>"]  # which bytes never become
    spare.pad_token = "<s>"
    assert padding_id(spare, (2,), 1000) == ids["<s>"]  # its own, where it will do
    spare.chat_template = "{% for m in messages %}{{ m.content }}<|file_sep|>\n{% endfor %}"
    spare.pad_token = "<|file_sep|>"
    assert padding_id(spare, (2,), 1000) == ids["<|fim_pad|>"]


def test_of_smollm2_it_is_no_end(smollm2):
    tokenizer = read_tokenizer(smollm2)
    shape, token = score_padding(read_config(smollm2), smollm2)
    assert token == "<repo_name>" and shape.pad_id == tokenizer.convert_tokens_to_ids(token)
    assert shape.pad_id not in (tokenizer.eos_token_id, tokenizer.unk_token_id, *tokenizer.encode("a\nb"))


def test_there_may_be_none(tmp_path):
    """Words alone, of which any may be unknown: config.json then has none, and transformers takes single rows."""
    assert padding_id(words(), (1,), 34) is None
    tiny_llama(tmp_path, vocab_size=260)
    words().save_pretrained(tmp_path)
    shape, token = score_padding(read_config(tmp_path), tmp_path)
    assert shape.pad_id is None and token is None


def test_it_is_written_to_the_tokenizers_files(tmp_path):
    tiny_tokenizer(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>", "pad_token": "</s>"}))
    write_padding(tmp_path, "<s>")
    assert read_tokenizer(tmp_path).pad_token == "<s>" and read_tokenizer(tmp_path).eos_token == "</s>"
