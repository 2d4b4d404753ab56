"""Padding token of an exported score model.

transformers' sequence classifiers read a row's score at its last token other than `pad_token_id`. Where that is the end
of a turn, as in many chat models, they would read it one token before the trained position. So an exported score model
pads with a special token that no text ends with.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import ModelConfig
from ..folder import read_json
from .tokenizer import has_tokenizer, read_tokenizer, stop_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_CHAT = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
_END = re.compile("end|eo[dmst]|/", re.IGNORECASE)  # in names of tokens that end a text, a turn or a part of it
_RARE = "\U0010fffd"  # an unassigned code point: the unk_token of a tokenizer without byte fallback


def score_padding(config: ModelConfig, folder: Path) -> tuple[ModelConfig, str | None]:
    """Config with the padding token of a score model for the tokenizer in `folder`, and that token.

    Without such a token the config has no pad_token_id: transformers then refuses batches of several rows.
    """
    if not has_tokenizer(folder):
        return replace(config, pad_id=None if config.pad_id in config.eos_ids else config.pad_id), None
    tokenizer = read_tokenizer(folder)
    number = padding_id(tokenizer, stop_ids(folder, config, tokenizer), config.vocab_size)
    return replace(config, pad_id=number), None if number is None else str(tokenizer.convert_ids_to_tokens(number))


def padding_id(tokenizer: PreTrainedTokenizerBase, stop_ids: tuple[int, ...], vocab_size: int) -> int | None:
    """A special token that no text ends with, or None: the tokenizer's padding, else one with "pad" in its name, else
    one that its chat template does not use, else unk_token or bos_token."""
    chat = _chat_ids(tokenizer)
    rare: list[int] = tokenizer.encode(_RARE, add_special_tokens=False)
    ends = (*stop_ids, tokenizer.eos_token_id, *chat[-1:], *rare[-1:])
    last: list[Any] = [tokenizer.unk_token_id, tokenizer.bos_token_id]
    unused = {
        i: str(token)
        for i, token in sorted(tokenizer.added_tokens_decoder.items())
        if token.special and i not in (*chat, *last) and not _END.search(str(token))
    }
    named = [i for i, token in unused.items() if "pad" in token.lower()]
    candidates: list[Any] = [tokenizer.pad_token_id, *named, *unused, *last]
    return next((i for i in candidates if i is not None and i not in ends and i < vocab_size), None)


def _chat_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a short chat; none without a chat template, or if the template refuses it."""
    try:
        text = str(tokenizer.apply_chat_template(_CHAT, tokenize=False)).rstrip()
    except Exception:
        return []
    return tokenizer.encode(text, add_special_tokens=False)


def write_padding(folder: Path, token: str) -> None:
    """Sets the padding token of the tokenizer in `folder`."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        values = read_json(path) if path.is_file() else {}
        if "pad_token" in values or name == "tokenizer_config.json":
            path.write_text(json.dumps(values | {"pad_token": token}, indent=2, ensure_ascii=False), encoding="utf-8")
