"""Qwen 1's tokenizer out of qwen.tiktoken, a file of byte sequences and their ranks; no code of the folder is run.

The rest is from its published code (tokenization_qwen.py): the pattern that splits text, NFC, and the special tokens
behind the ranks.
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
    """Byte sequence -> rank, which is its id: a line has the bytes in base64 and the rank.

    Raises:
        ValueError: a line that is something else, ranks that are not 0, 1, 2, ..., or a byte without a rank.
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
    """The tokenizer of a rank file: the pair that makes the lowest rank is merged first."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode  # takes seconds

    ranks, letter = read_ranks(path), bytes_to_unicode()

    def text(token: bytes) -> str:
        return "".join(letter[byte] for byte in token)

    merges: list[tuple[str, str]] = []
    for token in sorted(ranks, key=ranks.__getitem__):
        pairs = [(token[:cut], token[cut:]) for cut in range(1, len(token))]
        whole = [pair for pair in pairs if pair[0] in ranks and pair[1] in ranks]
        merges += [(text(a), text(b)) for a, b in sorted(whole, key=lambda pair: (ranks[pair[0]], ranks[pair[1]]))]
    ids = {text(token): rank for token, rank in ranks.items()}
    built = Tokenizer(models.BPE(ids, merges, ignore_merges=True))
    built.normalizer = normalizers.NFC()
    cut = pre_tokenizers.Split(Regex(PATTERN), "isolated")
    built.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(False, use_regex=False)])
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in SPECIALS])
    return built
