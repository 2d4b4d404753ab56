"""Padding token of an exported score model.

transformers' classes for sequences take a row's score at its last token that is not `pad_token_id`, wherever padding
is. Chat models often pad with the token that ends a turn, and would have their score taken one token before the one it
was trained at. So an exported model pads with a special token that no text ends with.
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
_END = re.compile("end|eo[dmst]|/", re.IGNORECASE)  # in the names of tokens that end a text, a turn or a part of it
_RARE = "\U0010fffd"  # a code point without a character: a tokenizer that knows unknown text makes its unk_token of it


def score_padding(config: ModelConfig, folder: Path) -> tuple[ModelConfig, str | None]:
    """(the config with the padding token of a score model, the token itself), for the tokenizer in `folder`.

    Where there is none, the config has no pad_token_id: transformers then refuses batches of several rows, and reads
    the last token of one.
    """
    if not has_tokenizer(folder):
        return replace(config, pad_id=None if config.pad_id in config.eos_ids else config.pad_id), None
    tokenizer = read_tokenizer(folder)
    number = padding_id(tokenizer, stop_ids(folder, config, tokenizer), config.vocab_size)
    return replace(config, pad_id=number), None if number is None else str(tokenizer.convert_ids_to_tokens(number))


def padding_id(tokenizer: PreTrainedTokenizerBase, stop_ids: tuple[int, ...], vocab_size: int) -> int | None:
    """A special token that no text ends with: the tokenizer's own padding, one that is called so, any that its chat
    template does not write, at last those for unknown text and for a text's beginning. None where there is none."""
    written = _written(tokenizer)
    rare: list[int] = tokenizer.encode(_RARE, add_special_tokens=False)
    ends = (*stop_ids, tokenizer.eos_token_id, *written[-1:], *rare[-1:])
    last: list[Any] = [tokenizer.unk_token_id, tokenizer.bos_token_id]
    spare = {
        i: str(token)
        for i, token in sorted(tokenizer.added_tokens_decoder.items())
        if token.special and i not in (*written, *last) and not _END.search(str(token))
    }
    named = [i for i, token in spare.items() if "pad" in token.lower()]
    candidates: list[Any] = [tokenizer.pad_token_id, *named, *spare, *last]
    return next((i for i in candidates if i is not None and i not in ends and i < vocab_size), None)


def _written(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens of a short chat; none without a chat template, or with one that refuses it."""
    try:
        text = str(tokenizer.apply_chat_template(_CHAT, tokenize=False)).rstrip()
    except Exception:
        return []
    return tokenizer.encode(text, add_special_tokens=False)


def write_padding(folder: Path, token: str) -> None:
    """Makes it the padding token of the tokenizer in `folder`."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = folder / name
        values = read_json(path) if path.is_file() else {}
        if "pad_token" in values or name == "tokenizer_config.json":
            path.write_text(json.dumps(values | {"pad_token": token}, indent=2, ensure_ascii=False), encoding="utf-8")
