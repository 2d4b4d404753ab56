"""Tokenizers built by trialign: from sentencepiece models, with LLaMA's class or none, and Qwen 1's tiktoken file."""

import base64
import json
import random
import unicodedata
from pathlib import Path

import pytest
from families import tiny_family
from safetensors.torch import load_file
from templates import sentencepiece_model
from tiny import tiny_llama
from trialign.algorithms.roles.build import load_tokenizer
from trialign.models.families.registry import read_config
from trialign.models.hf.convert import export_checkpoint, import_checkpoint
from trialign.models.hf.save import copy_assets, export_hf
from trialign.models.hf.tiktoken_file import PATTERN, SPECIALS, read_ranks
from trialign.models.hf.tokenizer import read_tokenizer

REMOTE = {"tokenizer_class": "BaichuanTokenizer", "auto_map": {"AutoTokenizer": ["code.BaichuanTokenizer", None]}}


def texts(seed: int, count: int = 200, letters: str = "the cat sat on mat 你好世界 \n\t  0123🙂éï'S") -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices(letters, k=draw.randint(0, 25))) for _ in range(count)]


@pytest.mark.parametrize("dummy_prefix", [True, False])
def test_sentencepiece_ids_are_kept_by_import_run_and_export(dummy_prefix, tmp_path):
    """sentencepiece's own ids, read from the folder, the checkpoint, a run's folder and the export."""
    from sentencepiece import SentencePieceProcessor
    from transformers import AutoTokenizer

    folder = tiny_llama(tmp_path / "folder", vocab_size=400)
    sentencepiece_model(folder, add_dummy_prefix=dummy_prefix)
    (folder / "tokenizer_config.json").write_text(json.dumps(REMOTE))
    import_checkpoint(folder, tmp_path / "checkpoint")
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "out")
    shape = read_config(folder)
    export_hf(tmp_path / "run", shape, load_file(folder / "model.safetensors"), folder)
    for place in (tmp_path / "checkpoint" / "assets" / "actor", tmp_path / "out", tmp_path / "run"):
        assert (place / "tokenizer.json").is_file()
        assert "auto_map" not in json.loads((place / "tokenizer_config.json").read_text())
    original = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokenizers = [load_tokenizer(str(tmp_path / place), shape) for place in ("folder", "checkpoint", "out", "run")]
    tokenizers += [AutoTokenizer.from_pretrained(tmp_path / place) for place in ("out", "run")]
    for text in texts(1):
        expected = [original.bos_id(), *original.encode(text)]
        for tokenizer in tokenizers:
            assert tokenizer.encode(text) == expected, text
            assert tokenizer.decode(expected, skip_special_tokens=True) == text
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()


def test_sentencepiece_settings_are_applied_and_corrupt_files_refused(tmp_path):
    folder = sentencepiece_model(tmp_path / "remote")
    settings = REMOTE | {"add_bos_token": False, "add_eos_token": True, "chat_template": "{{ messages }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = read_tokenizer(folder)
    assert tokenizer.encode("the cat")[-1] == tokenizer.eos_token_id and tokenizer.chat_template == "{{ messages }}"
    assert tokenizer.bos_token_id not in tokenizer.encode("the cat")
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer_config.json: not JSON"):
        read_tokenizer(folder)
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="a unigram model of .* only byte-pair models are read"):
        read_tokenizer(sentencepiece_model(tmp_path / "unigram", "unigram"))
    (folder / "tokenizer.model").write_bytes(b"not a model")
    with pytest.raises(ValueError, match="tokenizer.model: "):
        read_tokenizer(folder)
    (tmp_path / "none").mkdir()
    with pytest.raises(ValueError, match="no tokenizer can be read"):
        read_tokenizer(tmp_path / "none")


@pytest.mark.parametrize("legacy", [True, False, None])
def test_llama_tokenizers_equal_sentencepiece(legacy, tmp_path):
    """After a special token text gets a space unless `legacy` is false."""
    from sentencepiece import SentencePieceProcessor

    folder = sentencepiece_model(tmp_path / "folder")
    original = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    count = original.vocab_size()
    settings = {"tokenizer_class": "LlamaTokenizer", "pad_token": {"content": "<pad>", "__type": "AddedToken"}}
    (folder / "tokenizer_config.json").write_text(
        json.dumps(settings if legacy is None else settings | {"legacy": legacy})
    )
    (folder / "added_tokens.json").write_text(json.dumps({"<pad>": count, "<end>": count + 1}))
    (folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<end>"}))
    (tmp_path / "copy").mkdir()
    copy_assets(folder, tmp_path / "copy")
    assert (tmp_path / "copy" / "tokenizer.json").is_file()
    for tokenizer in (read_tokenizer(folder), read_tokenizer(tmp_path / "copy")):
        assert (tokenizer.pad_token_id, tokenizer.eos_token_id) == (count, count + 1)
        assert tokenizer.convert_tokens_to_ids("</s>") == original.eos_id()
        for text in texts(1):
            assert tokenizer.encode(text) == [original.bos_id(), *original.encode(text)], text
        got = tokenizer.encode("the cat<end>sat on", add_special_tokens=False)
        before = "<unk>" if legacy is False else ""  # as LlamaTokenizer did: encoded with it, then dropped
        after = original.encode(before + "sat on")[len(original.encode(before)) :]
        assert got == [*original.encode("the cat"), count + 1, *after]


def test_added_tokens_with_other_ids_are_refused(tmp_path):
    folder = sentencepiece_model(tmp_path / "folder")
    (folder / "added_tokens.json").write_text(json.dumps({"<pad>": 5000}))
    with pytest.raises(ValueError, match="added token '<pad>' has id 5000"):
        read_tokenizer(folder)
    (folder / "added_tokens.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<nowhere>"}))
    with pytest.raises(ValueError, match="eos_token='<nowhere>' is not in tokenizer.model"):
        read_tokenizer(folder)


# Qwen 1.


def rank_file(folder: Path) -> Path:
    """A tiktoken file trained by tiktoken's own reference implementation."""
    bpe_train = pytest.importorskip("tiktoken._educational").bpe_train
    text = " ".join(random.Random(0).choices("the cat sat on a mat, don't 你好 世界 12 345 café\n".split(" "), k=400))
    ranks = bpe_train(text, 280, PATTERN, None)
    lines = [base64.b64encode(token) + b" " + str(rank).encode() for token, rank in ranks.items()]
    (folder / "qwen.tiktoken").write_bytes(b"\n".join(lines) + b"\n")
    return folder


def test_qwens_tiktoken_file_is_read_in_runs_and_exports(tmp_path):
    """With the ids of tiktoken itself."""
    import tiktoken
    from transformers import AutoTokenizer

    folder = rank_file(tiny_family(tmp_path / "folder", "qwen"))
    classes = {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]}
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "QWenTokenizer", "auto_map": classes}))
    (folder / "tokenization_qwen.py").write_text("raise SystemExit('code of the folder was run')\n")
    import_checkpoint(folder, tmp_path / "checkpoint")
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "out")
    ranks = read_ranks(folder / "qwen.tiktoken")
    specials = {token: len(ranks) + i for i, token in enumerate(SPECIALS)}
    peer = tiktoken.Encoding("qwen", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=specials)
    tokenizers = [read_tokenizer(place) for place in (folder, tmp_path / "checkpoint", tmp_path / "out")]
    tokenizers.append(AutoTokenizer.from_pretrained(tmp_path / "out"))
    chat = f"{SPECIALS[1]}user\nhi{SPECIALS[2]}\n"
    for tokenizer in tokenizers:
        assert len(tokenizer) == len(ranks) + 208
        assert tokenizer.eos_token_id == tokenizer.pad_token_id == len(ranks)
        for text in (*texts(2), "cafe\u0301 don't DON'T  12345\r\n\r\n x", "", chat):
            normal = unicodedata.normalize("NFC", text)
            ids = peer.encode(normal, allowed_special="all")
            assert tokenizer.encode(text) == ids, text
            assert tokenizer.decode(ids) == normal


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"YQ== 0 1\n", "qwen.tiktoken, line 1: .*expected bytes in base64 and a rank"),
        (b"YQ== 0\nYg==\n", "qwen.tiktoken, line 2: "),
        (b"YQ== 1\n", "the 1 ranks are not 0 to 0, each once"),
        (b"YQ== 0\n", "255 bytes have no rank, first 0"),
    ],
)
def test_corrupt_tiktoken_files_are_refused_by_line(content, message, tmp_path):
    (tmp_path / "qwen.tiktoken").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize("named", ["LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast"])
def test_tokenizer_json_is_read_as_saved_under_any_class(named, tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    saved = Tokenizer(models.BPE())
    saved.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    saved.decoder = decoders.ByteLevel()
    learn = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    saved.train_from_iterator(["the cat sat on the mat"] * 10, learn)
    saved.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": named, "bos_token": "<s>", "eos_token": "</s>", "chat_template": "{{ messages }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    tokenizer, text = read_tokenizer(tmp_path), "the cat sat\non the mat"
    assert tokenizer.encode(text, add_special_tokens=False) == saved.encode(text).ids
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text
    assert tokenizer.eos_token_id == 1 and tokenizer.chat_template == "{{ messages }}"
