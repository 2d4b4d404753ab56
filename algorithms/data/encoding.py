"""Prompts and responses as tokens: those of a prompt are the same wherever it is answered, learned from or scored.

A prompt is tokenized by itself, as a rollout begins with it, and a response is tokenized behind it: where a tokenizer
would join the end of the one and the beginning of the other, they are cut between them. No tokenizer's own end of
sequence comes behind a prompt.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, NamedTuple

from .chat import end_of_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ANCHORS = ("\n", "a", ".")
"""Texts that a response is tokenized behind, one of which no tokenizer joins with its beginning."""


class Tokens(NamedTuple):
    """A text as tokens."""

    ids: list[int]
    places: list[tuple[int, int]]  # first and last character of each, the last excluded; empty where not asked for

    def behind(self, head: list[int], length: int) -> Tokens | None:
        """Those behind `head`, the tokens of the first `length` characters; None where they do not begin with it."""
        if self.ids[: len(head)] != head:
            return None
        return Tokens(self.ids[len(head) :], [(a - length, b - length) for a, b in self.places[len(head) :]])


def encode(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], places: bool = False) -> list[Tokens]:
    """Texts as tokens, without those that the tokenizer puts around a text."""
    if not texts:
        return []
    encoded = tokenizer(list(texts), add_special_tokens=False, return_offsets_mapping=places, verbose=False)
    offsets = encoded["offset_mapping"] if places else [[]] * len(texts)
    return [Tokens(ids, own) for ids, own in zip(encoded["input_ids"], offsets, strict=True)]


def first_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens that the tokenizer begins a text with, as the beginning of sequence."""
    probe = "a"
    plain, whole = encode(tokenizer, [probe])[0].ids, list(tokenizer(probe)["input_ids"])
    places = (i for i in range(len(whole) - len(plain) + 1) if whole[i : i + len(plain)] == plain)
    return whole[: next(places, 0)]


def encode_bare(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Texts without a chat template: behind what the tokenizer begins a text with, once, and without what it ends one
    with."""
    first = first_tokens(tokenizer)
    return [_begun(tokens.ids, first) for tokens in encode(tokenizer, texts)]


def _begun(ids: list[int], first: list[int]) -> list[int]:
    return ids if ids[: len(first)] == first else first + ids


def encode_documents(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[list[int]]:
    """Documents with one end of sequence behind each. Raises ValueError where the tokenizer has none."""
    end = end_of_text(tokenizer)
    return [ids if ids[-1:] == [end] else [*ids, end] for ids in encode_bare(tokenizer, texts)]


def encode_prompts(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], chat_template: bool) -> list[list[int]]:
    """Prompts as a rollout begins with them.

    Args:
        prompts: as the chat template wrote them, its beginning of sequence included; bare texts without it.
    """
    return [tokens.ids for tokens in encode(tokenizer, prompts)] if chat_template else encode_bare(tokenizer, prompts)


def encode_responses(
    tokenizer: PreTrainedTokenizerBase,
    turns: Sequence[tuple[str, str]],
    chat_template: bool,
    places: bool = False,
) -> list[tuple[list[int], Tokens]]:
    """(prompt, response) as tokens, the prompt's as `encode_prompts` gives them.

    Args:
        places: also find which characters of the response each token is; needs a fast tokenizer.
    """
    texts = list(dict.fromkeys(text for prompt, response in turns for text in (prompt, prompt + response)))
    tokens_of = dict(zip(texts, encode(tokenizer, texts, places), strict=True))
    first = [] if chat_template else first_tokens(tokenizer)
    encoded = []
    for prompt, response in turns:
        head = tokens_of[prompt].ids
        tail = tokens_of[prompt + response].behind(head, len(prompt)) or _encode_apart(tokenizer, response, places)
        encoded.append((_begun(head, first), tail))
    return encoded


def _encode_apart(tokenizer: PreTrainedTokenizerBase, text: str, places: bool) -> Tokens:
    """A text as tokens that go on behind others: sentencepiece's models begin a text that is alone with a space."""
    for anchor in ANCHORS:
        before, both = encode(tokenizer, [anchor, anchor + text], places)
        tail = both.behind(before.ids, len(anchor))
        if tail is not None:
            return tail
    return encode(tokenizer, [text], places)[0]


def turn_end(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], stop_ids: Collection[int]) -> int:
    """How many of a response's tokens are its turn: up to the first end of sequence that only white space and further
    ends follow. 0 where there is none."""
    found = 0
    for place in reversed(range(len(ids))):
        if ids[place] in stop_ids:
            found = place + 1
        elif str(tokenizer.decode([ids[place]])).strip():
            break
    return found
