"""Qwen 1's tokenizer from qwen.tiktoken, a file of byte sequences and their ranks, without running the folder's code.

Split pattern, NFC normalization and the special tokens, whose ids follow the ranks, are from the published
tokenization_qwen.py.
"""

from __future__ import annotations

import base64
import binascii
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

NAME = "qwen.tiktoken"
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
END = "<|endoftext|>"
SPECIALS = (END, "<|im_start|>", "<|im_end|>", *(f"<|extra_{i}|>" for i in range(205)))


def read_ranks(path: Path) -> dict[bytes, int]:
    """Byte sequence -> rank (its token id), from lines of base64 and rank.

    Raises:
        ValueError: any other line, ranks that are not 0, 1, 2, ..., or a byte without a rank.
    """
    ranks: dict[bytes, int] = {}
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            token, rank = line.split()
            ranks[base64.b64decode(token, validate=True)] = int(rank)
        except (ValueError, binascii.Error):
            raise ValueError(f"{path}, line {number}: {line[:80]!r}: expected bytes in base64 and a rank") from None
    if sorted(ranks.values()) != list(range(len(ranks))):
        raise ValueError(f"{path}: the {len(ranks)} ranks are not 0 to {len(ranks) - 1}, each once")
    missing = [i for i in range(256) if bytes([i]) not in ranks]
    if missing:
        raise ValueError(f"{path}: {len(missing)} bytes have no rank, first {missing[0]}")
    return ranks


def rank_tokenizer(path: Path) -> Tokenizer:
    """Tokenizer of a tiktoken file: the pair with the lowest merged rank is merged first."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode  # takes seconds

    ranks, letter = read_ranks(path), bytes_to_unicode()

    def text(token: bytes) -> str:
        return "".join(letter[byte] for byte in token)

    merges: list[tuple[str, str]] = []
    for token in sorted(ranks, key=ranks.__getitem__):
        pairs = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in ranks and token[i:] in ranks]
        merges += [(text(a), text(b)) for a, b in sorted(pairs, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))]
    ids = {text(token): rank for token, rank in ranks.items()}
    built = Tokenizer(models.BPE(ids, merges, ignore_merges=True))
    built.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    built.pre_tokenizer = pre_tokenizers.Sequence([words, pre_tokenizers.ByteLevel(False, use_regex=False)])
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIALS])
    return built
