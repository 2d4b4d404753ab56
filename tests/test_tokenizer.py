"""Tokenizers that are built here: sentencepiece folders that name LLaMA's class, and Qwen 1's rank file."""

import base64
import json
import random
import unicodedata
from pathlib import Path

import pytest
import regex
from families import tiny_family
from test_convert import sentencepiece_model
from trialign.models.export import copy_assets, export_checkpoint
from trialign.models.importing import import_checkpoint
from trialign.models.rank_file import PATTERN, SPECIALS, read_ranks
from trialign.models.tokenizer import read_tokenizer

LETTERS = "the cat sat on mat 你好世界 \n\t  0123🙂éï'S"


def texts(seed: int, count: int = 200) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices(LETTERS, k=draw.randint(0, 25))) for _ in range(count)]


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
    with pytest.raises(ValueError, match="the added token '<pad>' should have id 5000, it gets"):
        read_tokenizer(folder)
    (folder / "added_tokens.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<nowhere>"}))
    with pytest.raises(ValueError, match="eos_token='<nowhere>' is no token of tokenizer.model"):
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
    """tiktoken's rule, plainly: of all neighbours the two that make the lowest rank become one, the first of equals."""
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
