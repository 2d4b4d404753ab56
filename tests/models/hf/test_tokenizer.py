"""Tokenizers that trialign builds: of sentencepiece models, named by LLaMA's class or bare, and of Qwen 1's ranks."""

import base64
import json
import random
import unicodedata
from pathlib import Path
from typing import Any

import pytest
import tiktoken
from families import tiny_family
from safetensors.torch import load_file
from sentencepiece import SentencePieceProcessor
from templates import sentencepiece_model
from tiktoken import _educational as trainer
from tiny import tiny_llama, tiny_tokenizer
from tokenizers import Tokenizer
from transformers import AutoTokenizer
from trialign.algorithms.roles.build import load_tokenizer
from trialign.models.families.registry import read_config
from trialign.models.hf.convert import export_checkpoint, import_checkpoint
from trialign.models.hf.save import copy_assets, export_hf
from trialign.models.hf.tiktoken_file import PATTERN, SPECIALS
from trialign.models.hf.tokenizer import read_tokenizer

_draw = random.Random(1)
TEXTS = [
    "".join(_draw.choices("the cat sat on mat 你好世界 \n\t  0123🙂éï'S", k=_draw.randint(0, 25))) for _ in range(300)
]
REMOTE = {"tokenizer_class": "BaichuanTokenizer", "auto_map": {"AutoTokenizer": ["code.BaichuanTokenizer", None]}}


def write(folder: Path, **files: Any) -> Path:
    """Writes NAME.json for each argument."""
    for name, values in files.items():
        (folder / f"{name}.json").write_text(values if isinstance(values, str) else json.dumps(values))
    return folder


@pytest.mark.parametrize("dummy_prefix", [True, False])
def test_bare_sentencepiece_model_keeps_its_ids(dummy_prefix, tmp_path):
    """In a run that starts at the folder or at its checkpoint, and after an export."""
    folder = tiny_llama(tmp_path / "folder", vocab_size=400)
    write(sentencepiece_model(folder, add_dummy_prefix=dummy_prefix), tokenizer_config=REMOTE)
    import_checkpoint(folder, tmp_path / "checkpoint")
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "out")
    shape = read_config(folder)  # and as a run does, whose checkpoints carry the folder's own files
    export_hf(tmp_path / "run", shape, load_file(folder / "model.safetensors"), folder)
    for place in (tmp_path / "checkpoint" / "assets" / "actor", tmp_path / "out", tmp_path / "run"):
        assert (place / "tokenizer.json").is_file()
        assert "auto_map" not in json.loads((place / "tokenizer_config.json").read_text())
    original = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokenizers: list[Any] = [load_tokenizer(str(tmp_path / place), shape) for place in ("folder", "checkpoint", "out")]
    tokenizers += [AutoTokenizer.from_pretrained(tmp_path / place) for place in ("out", "run")]
    for text in TEXTS:
        expected = [original.bos_id(), *original.encode(text)]
        for tokenizer in tokenizers:
            assert tokenizer.encode(text) == expected, text
            assert tokenizer.decode(expected, skip_special_tokens=True) == text
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()


@pytest.mark.parametrize("legacy", [{"legacy": True}, {"legacy": False}, {}], ids=str)
def test_llama_class_encodes_as_sentencepiece(legacy, tmp_path):
    """A space is put after a special token unless `legacy` is false."""
    folder = sentencepiece_model(tmp_path / "folder")
    original = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    count = original.vocab_size()
    settings = {"tokenizer_class": "LlamaTokenizer", "pad_token": {"content": "<pad>", "__type": "AddedToken"}}
    write(folder, tokenizer_config=settings | legacy, special_tokens_map={"eos_token": "<end>"})
    write(folder, added_tokens={"<pad>": count, "<end>": count + 1})
    (tmp_path / "copy").mkdir()
    copy_assets(folder, tmp_path / "copy")
    assert (tmp_path / "copy" / "tokenizer.json").is_file()
    for tokenizer in (read_tokenizer(folder), read_tokenizer(tmp_path / "copy")):
        assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (count, count + 1)
        assert tokenizer.convert_tokens_to_ids("</s>") == original.eos_id()
        for text in TEXTS:
            assert tokenizer.encode(text) == [original.bos_id(), *original.encode(text)], text
        ids = tokenizer.encode("the cat<end>sat on", add_special_tokens=False)
        before = "<unk>" if legacy.get("legacy") is False else ""  # LlamaTokenizer encodes with it, and removes it
        after = original.encode(before + "sat on")[len(original.encode(before)) :]
        assert ids == [*original.encode("the cat"), count + 1, *after]


def test_sentencepiece_settings_are_applied_and_bad_files_refused(tmp_path):
    settings = {"add_bos_token": False, "add_eos_token": True, "chat_template": "{{ messages }}"}
    folder = write(sentencepiece_model(tmp_path / "remote"), tokenizer_config=REMOTE | settings)
    tokenizer = read_tokenizer(folder)
    ids = tokenizer.encode("the cat")
    assert ids[-1] == tokenizer.eos_token_id and tokenizer.bos_token_id not in ids
    assert tokenizer.chat_template == "{{ messages }}"

    def refused(folder: Path, message: str) -> None:
        with pytest.raises(ValueError, match=message):
            read_tokenizer(folder)

    refused(write(folder, tokenizer_config="{"), "tokenizer_config.json: not JSON")
    refused(write(folder, tokenizer_config={"eos_token": "<none>"}), "eos_token='<none>' is not in tokenizer.model")
    (folder / "tokenizer_config.json").unlink()
    refused(write(folder, added_tokens={"<pad>": 5000}), "added token '<pad>' has id 5000")
    refused(sentencepiece_model(tmp_path / "unigram", "unigram"), "a unigram model of .* only byte-pair models")
    (folder / "tokenizer.model").write_bytes(b"not a model")
    refused(folder, "tokenizer.model: ")
    (tmp_path / "none").mkdir()
    refused(tmp_path / "none", "no tokenizer can be read")


def test_qwen_rank_file_encodes_as_tiktoken(tmp_path):
    """In runs and exports; code in the folder is not run."""
    words = " ".join(random.Random(0).choices("the cat sat on a mat, don't 你好 世界 12 345 café\n".split(" "), k=400))
    ranks = trainer.bpe_train(words, 256 + 24, PATTERN, None)
    original = tiktoken.Encoding("qwen", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    folder = tiny_family(tmp_path / "folder", "qwen")
    lines = [base64.b64encode(token) + b" %d\n" % rank for token, rank in ranks.items()]
    (folder / "qwen.tiktoken").write_bytes(b"".join(lines))
    auto_map = {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]}
    write(folder, tokenizer_config={"tokenizer_class": "QWenTokenizer", "auto_map": auto_map})
    (folder / "tokenization_qwen.py").write_text("raise SystemExit('code of the folder was run')\n")
    import_checkpoint(folder, tmp_path / "checkpoint")
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "out")
    tokenizers: list[Any] = [read_tokenizer(place) for place in (folder, tmp_path / "checkpoint", tmp_path / "out")]
    texts = (*TEXTS, "cafe\u0301 don't DON'T  12345\r\n\r\n x", "")
    cases = [(text, original.encode_ordinary(unicodedata.normalize("NFC", text))) for text in texts]
    assert any(max(ids, default=0) >= 256 for _, ids in cases)
    chat, newline = original.encode_ordinary("user\nhi"), original.encode_ordinary("\n")
    for tokenizer in (*tokenizers, AutoTokenizer.from_pretrained(tmp_path / "out")):
        assert len(tokenizer) == len(ranks) + 208
        assert tokenizer.eos_token_id == tokenizer.pad_token_id == len(ranks)
        ids = tokenizer.encode(f"{SPECIALS[1]}user\nhi{SPECIALS[2]}\n")
        assert ids == [len(ranks) + 1, *chat, len(ranks) + 2, *newline]
        for text, ids in cases:
            assert tokenizer.encode(text) == ids, text
            assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"YQ== 0 1\n", "qwen.tiktoken, line 1: .*expected bytes in base64 and a rank"),
        (b"YQ== 0\nYg==\n", "qwen.tiktoken, line 2: "),
        (b"YQ== 1\n", "the 1 ranks are not 0 to 0, each once"),
        (b"YQ== 0\n", "255 bytes have no rank, first 0"),
    ],
)
def test_corrupt_rank_file_is_refused_by_line(content, message, tmp_path):
    (tmp_path / "qwen.tiktoken").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize("named", ["LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast"])
def test_tokenizer_json_decides_whatever_class_is_named(named, tmp_path):
    whole = Tokenizer.from_file(str(tiny_tokenizer(tmp_path) / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").unlink()
    settings = {"tokenizer_class": named, "bos_token": "<s>", "eos_token": "</s>", "chat_template": "{{ messages }}"}
    write(tmp_path, tokenizer_config=settings, config={"model_type": "llama"})
    tokenizer, text = read_tokenizer(tmp_path), "the cat sat\non the mat"
    assert tokenizer.encode(text, add_special_tokens=False) == whole.encode(text).ids
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text
    assert tokenizer.eos_token_id == 2 and tokenizer.chat_template == "{{ messages }}"
