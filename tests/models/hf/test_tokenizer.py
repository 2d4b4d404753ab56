"""Tokenizers that are built here: out of sentencepiece models, named by LLaMA's class or bare, and Qwen 1's ranks."""

import base64
import json
import random
import unicodedata
from pathlib import Path

import pytest
import regex
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

LETTERS = "the cat sat on mat 你好世界 \n\t  0123🙂éï'S"


def texts(seed: int, count: int = 200) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices(LETTERS, k=draw.randint(0, 25))) for _ in range(count)]


@pytest.mark.parametrize("dummy_prefix", [True, False])
def test_a_bare_sentencepiece_model_is_carried_through(dummy_prefix, tmp_path):
    """Ids are sentencepiece's own, in a run that starts at the folder, at the checkpoint, and after an export."""
    from sentencepiece import SentencePieceProcessor
    from transformers import AutoTokenizer

    folder = tiny_llama(tmp_path / "folder", vocab_size=400)
    sentencepiece_model(folder, add_dummy_prefix=dummy_prefix)
    settings = {"tokenizer_class": "BaichuanTokenizer", "auto_map": {"AutoTokenizer": ["code.BaichuanTokenizer", None]}}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    import_checkpoint(folder, tmp_path / "checkpoint")
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "out")
    shape = read_config(folder)  # and as a run does, whose checkpoints carry the folder's own files
    export_hf(tmp_path / "run", shape, load_file(folder / "model.safetensors"), folder)
    for place in (tmp_path / "checkpoint" / "assets" / "actor", tmp_path / "out", tmp_path / "run"):
        assert (place / "tokenizer.json").is_file()
        assert "auto_map" not in json.loads((place / "tokenizer_config.json").read_text())
    original = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokenizers = [load_tokenizer(str(tmp_path / place), shape) for place in ("folder", "checkpoint", "out", "run")]
    tokenizers += [AutoTokenizer.from_pretrained(tmp_path / place) for place in ("out", "run")]
    draw = random.Random(1)
    for _ in range(300):
        text = "".join(draw.choices("the cat sat on mat 你好世界 \n\t  0123🙂éï", k=draw.randint(0, 25)))
        expected = [original.bos_id(), *original.encode(text)]
        for tokenizer in tokenizers:
            assert tokenizer.encode(text) == expected, text
            assert tokenizer.decode(expected, skip_special_tokens=True) == text
    assert (tmp_path / "out" / "tokenizer.model").read_bytes() == (folder / "tokenizer.model").read_bytes()


def test_sentencepiece_settings_and_refusals(tmp_path):
    folder = sentencepiece_model(tmp_path / "remote")
    remote = {"tokenizer_class": "BaichuanTokenizer", "auto_map": {"AutoTokenizer": ["code.BaichuanTokenizer", None]}}
    settings = remote | {"add_bos_token": False, "add_eos_token": True, "chat_template": "{{ messages }}"}
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
def test_a_folder_that_names_llamas_class_is_read_by_its_model(legacy, tmp_path):
    """Plain text as sentencepiece cuts it; behind a special token a space is put only where `legacy` is not false."""
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
        before = "<unk>" if legacy is False else ""  # as LlamaTokenizer had it: cut with it, and it is left out
        behind = original.encode(before + "sat on")[len(original.encode(before)) :]
        assert got == [*original.encode("the cat"), count + 1, *behind]


def test_added_tokens_that_do_not_fit_are_refused(tmp_path):
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
    """A rank file as byte-pair training leaves it: the most frequent pair of bytes, again and again."""
    text = " ".join(random.Random(0).choices("the cat sat on a mat, don't 你好 世界 12 345 café\n".split(" "), k=400))
    words = [[bytes([byte]) for byte in word.encode()] for word in regex.findall(PATTERN, text)]
    ranks = {bytes([byte]): byte for byte in range(256)}
    for _ in range(60):
        counts: dict[tuple[bytes, bytes], int] = {}
        for word in words:
            for pair in zip(word, word[1:], strict=False):
                counts[pair] = counts.get(pair, 0) + 1
        if not counts:
            break
        best = max(counts, key=lambda pair: (counts[pair], pair))
        ranks[b"".join(best)] = len(ranks)
        words = [merged(word, best) for word in words]
    folder.mkdir(parents=True, exist_ok=True)
    lines = [base64.b64encode(token) + b" " + str(rank).encode() for token, rank in ranks.items()]
    (folder / "qwen.tiktoken").write_bytes(b"\n".join(lines) + b"\n")
    return folder


def merged(word: list[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    out: list[bytes] = []
    for part in word:
        if out and (out[-1], part) == pair:
            out[-1] += part
        else:
            out.append(part)
    return out


def by_ranks(text: str, ranks: dict[bytes, int]) -> list[int]:
    """tiktoken's rule, plainly: of all neighbors the two that make the lowest rank become one, the first of equals."""
    ids = []
    for word in regex.findall(PATTERN, unicodedata.normalize("NFC", text)):
        parts = [bytes([byte]) for byte in word.encode()]
        while True:
            found = [
                (ranks[a + b], i) for i, (a, b) in enumerate(zip(parts, parts[1:], strict=False)) if a + b in ranks
            ]
            if not found:
                break
            _, i = min(found)
            parts[i : i + 2] = [parts[i] + parts[i + 1]]
        ids += [ranks[part] for part in parts]
    return ids


def test_qwens_rank_file_is_a_tokenizer_in_runs_and_exports(tmp_path):
    from transformers import AutoTokenizer

    folder = rank_file(tiny_family(tmp_path / "folder", "qwen"))
    remote = {
        "tokenizer_class": "QWenTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_qwen.QWenTokenizer", None]},
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(remote))
    (folder / "tokenization_qwen.py").write_text("raise SystemExit('code of the folder was run')\n")
    import_checkpoint(folder, tmp_path / "checkpoint")
    export_checkpoint(tmp_path / "checkpoint", tmp_path / "out")
    ranks = read_ranks(folder / "qwen.tiktoken")
    tokenizers = [read_tokenizer(place) for place in (folder, tmp_path / "checkpoint", tmp_path / "out")]
    tokenizers.append(AutoTokenizer.from_pretrained(tmp_path / "out"))
    cases = [(text, by_ranks(text, ranks)) for text in (*texts(2), "cafe\u0301 don't DON'T  12345\r\n\r\n x", "")]
    assert any(max(ids, default=0) >= 256 for _, ids in cases)
    chat = [f"{SPECIALS[1]}user\nhi{SPECIALS[2]}\n", [len(ranks) + 1, *by_ranks("user\nhi", ranks), len(ranks) + 2]]
    for tokenizer in tokenizers:
        assert len(tokenizer) == len(ranks) + 208
        assert tokenizer.eos_token_id == tokenizer.pad_token_id == len(ranks)
        assert tokenizer.encode(chat[0]) == [*chat[1], *by_ranks("\n", ranks)]
        for text, ids in cases:
            assert tokenizer.encode(text) == ids, text
            assert tokenizer.decode(ids) == unicodedata.normalize("NFC", text)


def test_tiktoken_itself_cuts_alike(tmp_path):
    tiktoken = pytest.importorskip("tiktoken")
    folder = rank_file(tmp_path / "folder")
    ranks = read_ranks(folder / "qwen.tiktoken")
    original = tiktoken.Encoding("qwen", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={})
    tokenizer = read_tokenizer(folder)
    for text in texts(3):
        assert tokenizer.encode(text) == original.encode_ordinary(unicodedata.normalize("NFC", text)), text


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"YQ== 0 1\n", "qwen.tiktoken, line 1: .*expected bytes in base64 and a rank"),
        (b"YQ== 0\nYg==\n", "qwen.tiktoken, line 2: "),
        (b"YQ== 1\n", "the 1 ranks are not 0 to 0, each once"),
        (b"YQ== 0\n", "255 bytes have no rank, first 0"),
    ],
)
def test_a_damaged_rank_file_is_refused_by_line(content, message, tmp_path):
    (tmp_path / "qwen.tiktoken").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize("named", ["LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast"])
def test_a_tokenizer_json_is_what_it_says_whatever_class_is_named_beside_it(named, tmp_path):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    whole = Tokenizer(models.BPE())
    whole.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    whole.decoder = decoders.ByteLevel()
    learn = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    whole.train_from_iterator(["the cat sat on the mat"] * 10, learn)
    whole.save(str(tmp_path / "tokenizer.json"))
    settings = {"tokenizer_class": named, "bos_token": "<s>", "eos_token": "</s>", "chat_template": "{{ messages }}"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    tokenizer, text = read_tokenizer(tmp_path), "the cat sat\non the mat"
    assert tokenizer.encode(text, add_special_tokens=False) == whole.encode(text).ids
    assert tokenizer.decode(tokenizer.encode(text), skip_special_tokens=True) == text
    assert tokenizer.eos_token_id == 1 and tokenizer.chat_template == "{{ messages }}"
