"""Chat templates of model families, and templates with other boundaries of turns, each with a kind of tokenizer."""

import io
import json
import random
from pathlib import Path
from typing import NamedTuple


class Template(NamedTuple):
    text: str
    special: tuple[str, ...]  # tokens that it writes
    end: str  # of a turn
    tokenizer: str  # "bytes", byte-level BPE, or "sentencepiece"


ROWS = json.loads(Path(__file__).with_suffix(".json").read_text(encoding="utf-8"))
TEMPLATES = {
    name: Template(row["template"], tuple(row["special_tokens"]), row["end_of_turn"], row["tokenizer"])
    for name, row in ROWS.items()
}


def sentencepiece_model(folder: Path, kind: str = "bpe", **options) -> Path:
    """A sentencepiece model of LLaMA's kind over a few words, 400 pieces."""
    from sentencepiece import SentencePieceTrainer

    words = (
        "the cat sat on a mat dog runs fast hello world naïve café 12 345 你好 世界 align model human prefer".split()
    )
    draw, written = random.Random(0), io.BytesIO()
    settings = {"vocab_size": 400, "byte_fallback": True, "character_coverage": 1.0, "split_digits": True}
    settings |= {"hard_vocab_limit": False, "remove_extra_whitespaces": False, "minloglevel": 2}
    settings |= {"normalization_rule_name": "identity", "model_type": kind, **options}
    lines = (" ".join(draw.choices(words, k=8)) for _ in range(300))
    SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
        sentence_iterator=lines, model_writer=written, **settings
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(written.getvalue())
    return folder
