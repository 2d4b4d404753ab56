"""Tokens of prompts and responses: a prompt has the same tokens in sampling, training and scoring.

A prompt is tokenized by itself, as for a rollout, and a response after it: tokens never span their boundary. Prompts
get no end of sequence from the tokenizer.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, NamedTuple

from .chat import end_of_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANCHORS = ("\n", "a", ".")
"""Texts before a response, at least one of which no tokenizer merges with it."""


class Tokens(NamedTuple):
    """A text as tokens."""

    ids: list[int]
    places: list[tuple[int, int]]  # [begin, end) in characters of each; empty if not asked for

    def after(self, head: list[int], length: int) -> Tokens | None:
        """Tokens after the prefix `head`, a text of `length` characters; None if they do not begin with it."""
        if self.ids[: len(head)] != head:
            return None
        return Tokens(self.ids[len(head) :], [(a - length, b - length) for a, b in self.places[len(head) :]])


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], places: bool = False) -> list[Tokens]:
    """Tokens of texts, without the tokenizer's special tokens around them."""
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=places, verbose=False)
    offsets = encoded["offset_mapping"] if places else [[]] * len(texts)
    return [Tokens(ids, own) for ids, own in zip(encoded["input_ids"], offsets, strict=True)]


def first_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Tokens that the tokenizer puts before a text, such as the beginning of sequence."""
    probe = "a"
    plain, whole = encode(tokenizer, [probe])[0].ids, list(tokenizer(probe)["input_ids"])
    places = (i for i in range(len(whole) - len(plain) + 1) if whole[i : i + len(plain)] == plain)
    return whole[: next(places, 0)]


def encode_bare(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Tokens of plain texts, with the tokenizer's beginning of sequence once and without its end."""
    first = first_tokens(tokenizer)
    return [_with_first(tokens.ids, first) for tokens in encode(tokenizer, texts)]


def _with_first(ids: list[int], first: list[int]) -> list[int]:
    return ids if ids[: len(first)] == first else first + ids


def encode_documents(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Tokens of documents, with one end of sequence each. ValueError if the tokenizer has none."""
    end = end_of_text(tokenizer)
    return [ids if ids[-1:] == [end] else [*ids, end] for ids in encode_bare(tokenizer, texts)]


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], chat_template: bool) -> list[list[int]]:
    """Tokens of prompts as in rollouts: text of the chat template, beginning of sequence included, or plain text."""
    return [tokens.ids for tokens in encode(tokenizer, prompts)] if chat_template else encode_bare(tokenizer, prompts)


def encode_responses(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[tuple[str, str]], chat_template: bool, places: bool = False
) -> list[tuple[list[int], Tokens]]:
    """Tokens of (prompt, response), prompts as by `encode_prompts`.

    Args:
        places: with the characters of each response token; needs a fast tokenizer.
    """
    texts = list(dict.fromkeys(text for prompt, response in turns for text in (prompt, prompt + response)))
    tokens_of = dict(zip(texts, encode(tokenizer, texts, places), strict=True))
    first = [] if chat_template else first_tokens(tokenizer)
    encoded = []
    for prompt, response in turns:
        head = tokens_of[prompt].ids
        tail = tokens_of[prompt + response].after(head, len(prompt)) or _encode_apart(tokenizer, response, places)
        encoded.append((_with_first(head, first), tail))
    return encoded


def _encode_apart(tokenizer: PreTrainedTokenizerBase, text: str, places: bool) -> Tokens:
    """Tokens of a text that continues another, without the space that sentencepiece puts before a text of its own."""
    for anchor in ANCHORS:
        before, both = encode(tokenizer, [anchor, anchor + text], places)
        tail = both.after(before.ids, len(anchor))
        if tail is not None:
            return tail
    return encode(tokenizer, [text], places)[0]


def turn_end(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stop_ids: Collection[int]) -> int:
    """Length of a response's turn: up to the first end of sequence followed only by white space and further ends; 0
    without one."""
    found = 0
    for place in reversed(range(len(ids))):
        if ids[place] in stop_ids:
            found = place + 1
        elif str(tokenizer.decode([ids[place]])).strip():
            break
    return found
