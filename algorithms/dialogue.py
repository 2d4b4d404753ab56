"""What supervised fine-tuning reads: dialogues as tokens, with a mask of those the assistant is to say.

A row is a whole dialogue ({role, content} messages: every assistant turn is a target) or a prompt with its response
(only the response is). Which characters of the rendered dialogue an assistant turn is, the chat template says itself
where it has {% generation %} marks. Where it has none, the turn is what the dialogue up to it adds to the dialogue
before it with the generation prompt, which is what the model is given when it answers; a template that writes a turn
otherwise once more turns follow is refused. A turn ends with its end-of-turn token; white space after it is no target.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .batch import Batch, Prompt, pack
from .messages import (
    Message,
    brief,
    column,
    end_of_text,
    need_template,
    read_messages,
    read_prompt,
    read_tools,
    render,
    users_words,
    with_system_prompt,
)
from .rows import RowStream
from .sft_config import SFTData
from .sources import RowReader

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 1000  # rows tokenised at once
MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Dialogue(NamedTuple):
    """A row before it is tokenised."""

    where: str  # as rows.jsonl:12
    messages: list[Message]
    learned: list[int]  # the messages that are targets
    tools: list[Any] | None


class Sample(NamedTuple):
    """A tokenised row."""

    tokens: array[int]
    mask: bytes  # 1 where a token is a target
    text: str  # the last thing the user said
    where: str

    @property
    def targets(self) -> int:
        return sum(self.mask)

    def to_last_target(self) -> Sample:
        """The sample without the tokens behind its last target."""
        end = self.mask.rindex(1) + 1
        return self._replace(tokens=self.tokens[:end], mask=self.mask[:end])

    def first_turn(self) -> tuple[list[int], list[int]]:
        """The tokens before the first answer, and those of it."""
        begin = self.mask.index(1)
        length = next(len(list(run)) for _, run in groupby(self.mask[begin:]))
        return self.tokens[:begin].tolist(), self.tokens[begin : begin + length].tolist()


def pack_samples(samples: Sequence[Sample]) -> Batch:
    """The batch of these rows."""
    batch = pack([sample.tokens.tolist() for sample in samples], [[bool(m) for m in s.mask] for s in samples])
    return batch.with_(names=tuple(sample.where for sample in samples))


class DialogueDataset(RowStream[Sample]):
    """The rows of supervised fine-tuning as a stream.

    Args:
        stop_ids: tokens that end a turn.

    Raises:
        ValueError: a source is missing, empty or malformed, a row has nothing to learn, the chat template does not fit,
            or no row is short enough; names file, row and key.
    """

    def __init__(self, config: SFTData, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int], seed: int = 0):
        reader = RowReader()

        def load(source: str) -> list[Sample]:
            dialogues = [read_dialogue(where, row, config) for where, row in reader(source, config.keys)]
            return list(tokenise(dialogues, tokenizer, stop_ids, config.chat_template))

        super().__init__(config, load, lambda sample: [len(sample.tokens)], seed, reader=reader)
        self.targets = sum(sample.targets for sample in self.rows())
        ends = set(stop_ids)
        self.endless = not any(ends & set(sample.tokens) for sample in self.rows())

    def amount(self) -> str:
        return f"{super().amount()}, {self.targets:,} of them targets"

    def __str__(self) -> str:
        endless = "; no row holds an end-of-sequence token: the model will not learn to stop"
        return super().__str__() + (endless if self.endless else "")

    def prompts(self, count: int) -> list[tuple[Prompt, list[int]]]:
        """(prompt, wanted answer's tokens) of the first rows, held-out ones if there are, for a look at the model."""
        turns = [(sample, *sample.first_turn()) for sample in (self.held_out or list(self.rows()))[:count]]
        return [(Prompt(i, prompt, s.text, source=s.where), answer) for i, (s, prompt, answer) in enumerate(turns)]


def tokenise(
    dialogues: Sequence[Dialogue], tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int], chat_template: bool
) -> Iterator[Sample]:
    """The dialogues as tokens with masks of what is learned.

    Raises:
        ValueError: there is no chat template, or without one no end of sequence; the template does not fit a dialogue,
            or leaves nothing to learn; names the row.
    """
    if chat_template:
        need_template(tokenizer)
    for start in range(0, len(dialogues), CHUNK):
        part = list(dialogues[start : start + CHUNK])
        if chat_template:
            yield from _with_template(part, tokenizer, set(stop_ids))
        else:
            yield from _without_template(part, tokenizer)


def read_dialogue(where: str, row: dict[str, Any], config: SFTData) -> Dialogue:
    """A row as messages.

    Raises:
        ValueError: a column is missing, malformed or empty, or the assistant says nothing; names the row.
    """
    key, section = config.messages_key, config.section
    if row.get(key) is not None:
        if not config.chat_template:
            raise ValueError(f"{where}: {key!r} holds messages: needs {section}.chat_template=true")
        if not isinstance(row[key], list) or not row[key]:
            raise ValueError(f"{where}: {key!r} must be a list of {{role, content}} messages, not {brief(row[key])}")
        messages = with_system_prompt(read_messages(f"{where}: {key!r}", row[key]), config)
        learned = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        if not learned:
            roles = ", ".join(message["role"] for message in messages)
            raise ValueError(f"{where}: {key!r} has no assistant turn to learn (roles: {roles})")
    else:
        if config.prompt_key not in row:
            raise ValueError(
                f"{where}: neither a column {key!r} ({section}.messages_key) nor {config.prompt_key!r}"
                f" ({section}.prompt_key); it has: {', '.join(map(repr, row)) or 'none'}"
            )
        messages = with_system_prompt(read_prompt(where, row, config.prompt_key, config), config)
        answer = column(where, row, config.response_key, f"{section}.response_key")
        if not isinstance(answer, str):
            raise ValueError(f"{where}: {config.response_key!r} must be a string, not {brief(answer)}")
        if not answer.strip():
            raise ValueError(f"{where}: {config.response_key!r} is empty")
        messages = [*messages, {"role": "assistant", "content": answer}]
        learned = [len(messages) - 1]
    if all(message["role"] == "system" for message in messages[: learned[0]]):
        raise ValueError(f"{where}: the assistant speaks first: a turn to answer must come before its first one")
    return Dialogue(where, messages, learned, read_tools(where, row, config))


def _with_template(
    dialogues: list[Dialogue], tokenizer: PreTrainedTokenizerBase, stop_ids: set[int]
) -> Iterator[Sample]:
    rendered = [render_marked(dialogue, tokenizer) for dialogue in dialogues]
    texts = [text for text, _ in rendered]
    encoded = tokenizer(texts, add_special_tokens=False, return_offsets_mapping=bool(tokenizer.is_fast))
    for i, (dialogue, (text, spans)) in enumerate(zip(dialogues, rendered, strict=True)):
        ids: list[int] = encoded["input_ids"][i]
        if tokenizer.is_fast:
            begins, ends = np.array(encoded["offset_mapping"][i]).reshape(-1, 2).T
            ranges = [(int(np.searchsorted(ends, b, "right")), int(np.searchsorted(begins, e))) for b, e in spans]
        else:
            cuts = [[_tokens_of(text[:place], ids, tokenizer, dialogue.where) for place in span] for span in spans]
            ranges = [(begin, end) for begin, end in cuts]
        mask = bytearray(len(ids))
        for begin, end in ranges:
            end = _turn_end(ids, begin, end, stop_ids, tokenizer)
            mask[begin:end] = b"\1" * (end - begin)
        if not any(mask) or mask[0]:
            raise ValueError(f"{dialogue.where}: the chat template leaves the assistant's turns no token to learn")
        yield Sample(array("i", ids), bytes(mask), users_words(dialogue.messages), dialogue.where)


def _tokens_of(prefix: str, ids: list[int], tokenizer: PreTrainedTokenizerBase, where: str) -> int:
    """How many of `ids` are the text's beginning, for a tokenizer that does not say which characters a token is."""
    own: list[int] = tokenizer(prefix, add_special_tokens=False)["input_ids"]
    if ids[: len(own)] != own:
        raise ValueError(f"{where}: the tokenizer joins the end of a turn with what follows, and knows no offsets")
    return len(own)


def _turn_end(ids: list[int], begin: int, end: int, stop_ids: set[int], tokenizer: PreTrainedTokenizerBase) -> int:
    """`end`, or where the turn's last stop token is if only white space follows it."""
    last = next((place for place in reversed(range(begin, end)) if ids[place] in stop_ids), end - 1)
    return end if str(tokenizer.decode(ids[last + 1 : end])).strip() else last + 1


def render_marked(dialogue: Dialogue, tokenizer: PreTrainedTokenizerBase) -> tuple[str, list[tuple[int, int]]]:
    """The dialogue as the chat template writes it, and which of its characters are to be learned.

    Raises:
        ValueError: the template refuses the messages, or does not let its turns be told apart; names the row.
    """
    where, messages, learned, tools = dialogue
    template = tokenizer.get_chat_template(tools=tools)
    if MARKS.search(template):
        return _render_with_marks(dialogue, tokenizer, template)
    text = render(where, messages, tokenizer, tools, generation_prompt=False)
    spans = []
    for turn in learned:
        before = render(where, messages[:turn], tokenizer, tools)
        after = render(where, messages[: turn + 1], tokenizer, tools, generation_prompt=False)
        if not (text.startswith(after) and after.startswith(before)):
            raise ValueError(
                f"{where}: the chat template writes message {turn} (assistant) otherwise in the whole dialogue than"
                " when it is answered; needed: a template with {% generation %} marks, or one that only appends"
            )
        spans.append((len(before), len(after)))
    return text, spans


def _render_with_marks(
    dialogue: Dialogue, tokenizer: PreTrainedTokenizerBase, template: str
) -> tuple[str, list[tuple[int, int]]]:
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    where, messages, learned, tools = dialogue
    options = {"chat_template": template, "return_assistant_tokens_mask": True, **tokenizer.special_tokens_map}
    try:
        texts, marks = render_jinja_template(conversations=[messages], tools=tools, **options)
    except TemplateError as error:
        raise ValueError(f"{where}: the tokenizer's chat template refuses it: {error}") from None
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    spans = [(int(begin), int(end)) for begin, end in marks[0] if begin < end]
    if turns != learned:
        if len(spans) != len(turns):
            raise ValueError(
                f"{where}: the chat template's {{% generation %}} marks {len(spans)} places for {len(turns)} assistant"
                " turns: which of them is the response?"
            )
        spans = [span for turn, span in zip(turns, spans, strict=True) if turn in learned]
    return texts[0], spans


def _without_template(dialogues: list[Dialogue], tokenizer: PreTrainedTokenizerBase) -> Iterator[Sample]:
    """Bare text: the prompt as the tokenizer begins a text, the response, an end of sequence."""
    end = end_of_text(tokenizer)
    prompts = tokenizer([d.messages[-2]["content"] for d in dialogues])["input_ids"]
    answers = tokenizer([d.messages[-1]["content"] for d in dialogues], add_special_tokens=False)["input_ids"]
    for dialogue, prompt, answer in zip(dialogues, prompts, answers, strict=True):
        answer = [*answer, end]
        mask = bytes(len(prompt)) + b"\1" * len(answer)
        yield Sample(array("i", [*prompt, *answer]), mask, dialogue.messages[-2]["content"], dialogue.where)
