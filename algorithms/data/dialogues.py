"""Dialogues of SFT: reading, tokenization with a mask of the targets, and streaming.

A turn to learn follows the same tokens as in a rollout: the earlier messages with the generation prompt, tokenized by
themselves. It ends with its end of sequence. If the chat template has {% generation %} marks, only marked text is
learned.

A dialogue is one sample as long as each turn's tokens are a prefix of the next turn's prompt. Otherwise, as in
templates that drop the reasoning of earlier turns, the next turn begins another sample.
"""

from __future__ import annotations

import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, groupby
from typing import TYPE_CHECKING, Any, NamedTuple

from ..batch import Batch, Prompt, pack
from ..config.data import ResponseData
from ..config.sft import SFTData
from .chat import (
    Message,
    column,
    end_of_text,
    learned_messages,
    need_template,
    read_messages,
    read_prompt,
    read_tools,
    render,
    shorten,
    users_words,
    with_response,
    with_system_prompt,
)
from .encoding import Tokens, encode_responses, turn_end
from .sources import RowReader
from .streams import RowStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHUNK = 1000  # rows tokenized at once
MARKS = re.compile(r"\{%-?\s*generation\s*-?%\}")
Span = tuple[int, int]
"""[begin, end) in characters."""


class Dialogue(NamedTuple):
    """A row before it is tokenized."""

    where: str  # as rows.jsonl:12
    messages: list[Message]
    learned: list[int]  # the messages that are targets
    tools: list[Any] | None
    prefill: str = ""  # beginning of the last message that is part of the prompt

    def prompt_messages(self, number: int) -> list[Message]:
        """The messages before message `number`, and its prefill."""
        before = self.messages[:number]
        return [*before, {"role": "assistant", "content": self.prefill}] if self._opens(number) else before

    def _opens(self, number: int) -> bool:
        return bool(self.prefill) and number == len(self.messages) - 1

    def prompt(self, number: int, tokenizer: PreTrainedTokenizerBase) -> str:
        """Their text by the chat template. ValueError if it refuses them."""
        opened = self._opens(number)
        messages = self.prompt_messages(number)
        return render(self.where, messages, tokenizer, self.tools, generation_prompt=not opened, opened=opened)


class Sample(NamedTuple):
    """A tokenized row, or turns of one; the last token is a target."""

    tokens: array[int]
    mask: bytes  # 1 where a token is a target
    text: str  # of the last message of the user
    where: str

    @property
    def targets(self) -> int:
        return sum(self.mask)

    def first_turn(self) -> tuple[list[int], list[int]]:
        """Tokens before the first response, and of it."""
        begin = self.mask.index(1)
        length = next(len(list(run)) for _, run in groupby(self.mask[begin:]))
        return self.tokens[:begin].tolist(), self.tokens[begin : begin + length].tolist()


class DialogueTurn(NamedTuple):
    """A message to learn, as text."""

    where: str
    number: int  # of the message
    prompt: str
    text: str  # the message, and what the template writes after it
    marked: list[Span] | None  # marked parts of it; None without marks in the template


class Learned(NamedTuple):
    """A message to learn, as tokens."""

    prompt: list[int]
    tokens: list[int]
    mask: bytes


def pack_samples(samples: Sequence[Sample]) -> Batch:
    """Batch of these samples."""
    batch = pack([sample.tokens.tolist() for sample in samples], [[bool(m) for m in s.mask] for s in samples])
    return batch.with_(names=tuple(sample.where for sample in samples))


class Encoder:
    """Tokenizer of dialogues.

    Args:
        stop_ids: tokens that end a turn.

    Attributes:
        appended: turns so far whose end of sequence was appended, or made a target, by `append_eos`.

    Raises:
        ValueError: there is no chat template, or without one no end of sequence.
    """

    def __init__(self, config: ResponseData, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]):
        self.config, self.tokenizer, self.appended = config, tokenizer, 0
        if config.chat_template:
            need_template(tokenizer)
        needed = config.append_eos or not config.chat_template
        self.end = end_of_text(tokenizer) if needed else None
        self.stop_ids = {*stop_ids, self.end} if needed else set(stop_ids)

    def __str__(self) -> str:
        count = f"{self.appended:,} turn" + "s" * (self.appended != 1)
        return f"; {self.config.section}.append_eos: the end of {count} is learned" if self.appended else ""

    def samples(self, dialogues: Sequence[Dialogue]) -> Iterator[list[Sample]]:
        """Samples of each dialogue: one, or several if the template rewrites earlier turns.

        Raises:
            ValueError: the template does not fit a dialogue, leaves nothing to learn or writes no end; names the row.
        """
        for start in range(0, len(dialogues), CHUNK):
            part = dialogues[start : start + CHUNK]
            turns = [[self._turn(dialogue, number) for number in dialogue.learned] for dialogue in part]
            learned = iter(self._encode([turn for own in turns for turn in own]))
            for dialogue in part:
                yield self._join(dialogue, [next(learned) for _ in dialogue.learned])

    def responses(self, dialogues: Sequence[Dialogue]) -> Iterator[Sample]:
        """Samples of dialogues with one turn to learn each. Raises: as `samples`."""
        for samples in self.samples(dialogues):
            (sample,) = samples
            yield sample

    def _turn(self, dialogue: Dialogue, number: int) -> DialogueTurn:
        where, messages, tools = dialogue.where, dialogue.messages, dialogue.tools
        if not self.config.chat_template:
            return DialogueTurn(where, number, messages[number - 1]["content"], messages[number]["content"], None)
        prompt = dialogue.prompt(number, self.tokenizer)
        template = self.tokenizer.get_chat_template(tools=tools)
        if MARKS.search(template):
            text, spans = _render_with_marks(where, messages[: number + 1], self.tokenizer, tools, template)
        else:
            text, spans = render(where, messages[: number + 1], self.tokenizer, tools), None
        if not text.startswith(prompt):
            raise ValueError(
                f"{where}: the chat template writes message {number} (assistant) otherwise than its prompt: the"
                f" prompt ends with {prompt[-40:]!r}, the dialogue with {text[-80:]!r}"
            )
        begin = len(prompt)
        if spans is not None:
            spans = [(max(0, a - begin), b - begin) for a, b in spans if a < b and b > begin]
        return DialogueTurn(where, number, prompt, text[begin:], spans)

    def _encode(self, turns: Sequence[DialogueTurn]) -> list[Learned]:
        """Tokens of turns. ValueError with the row if one has nothing to learn or no end."""
        fast = any(turn.marked is not None for turn in turns) and bool(self.tokenizer.is_fast)
        pairs = [(turn.prompt, turn.text) for turn in turns]
        encoded = encode_responses(self.tokenizer, pairs, self.config.chat_template, fast)
        results = []
        for turn, (prompt, tokens) in zip(turns, encoded, strict=True):
            end = turn_end(self.tokenizer, tokens.ids, self.stop_ids)
            mask = self._mask(turn, prompt, tokens, end)
            if not prompt or not any(mask):
                raise ValueError(f"{turn.where}: the chat template leaves message {turn.number} no token to learn")
            if end and mask[end - 1]:
                results.append(Learned(prompt, tokens.ids[:end], bytes(mask[:end])))
            elif self.end is None:
                raise ValueError(self._endless(turn, tokens, end))
            else:
                self.appended += self.config.chat_template
                results.append(self._ended(turn, prompt, tokens, mask, end))
        return results

    def _mask(self, turn: DialogueTurn, prompt: list[int], tokens: Tokens, end: int) -> bytearray:
        """1 at the tokens of a turn that are learned."""
        if turn.marked is None:
            return bytearray(b"\1" * (end or len(tokens.ids)))
        mask = bytearray(len(tokens.ids))
        for span in turn.marked:
            if tokens.places:
                mine = [i for i, (a, b) in enumerate(tokens.places) if a < span[1] and b > span[0]]
                begin, after = (mine[0], mine[-1] + 1) if mine else (0, 0)
            else:
                begin, after = (self._tokens_before(turn, tokens, place) for place in span)
            mask[begin:after] = b"\1" * (after - begin)
        return mask[:end] if end else mask

    def _tokens_before(self, turn: DialogueTurn, tokens: Tokens, place: int) -> int:
        """Number of tokens of the turn's first `place` characters, for a tokenizer without offsets."""
        ((_, part),) = encode_responses(self.tokenizer, [(turn.prompt, turn.text[:place])], True)
        if tokens.ids[: len(part.ids)] != part.ids:
            raise ValueError(
                f"{turn.where}: the tokenizer merges the end of a turn with the text after it, and has no offsets"
            )
        return len(part.ids)

    def _ended(self, turn: DialogueTurn, prompt: list[int], tokens: Tokens, mask: bytearray, end: int) -> Learned:
        """The turn with its end as a target: the end of the text, or an appended one."""
        assert self.end is not None
        if end:  # the marks stop before it
            after = mask.rindex(1) + 1
            return Learned(prompt, tokens.ids[:end], bytes(mask[:after]) + b"\1" * (end - after))
        if self.config.chat_template:  # white space after the last word is the template's
            length = max(b for _, b in turn.marked) if turn.marked else len(turn.text)
            turn = turn._replace(text=turn.text[:length].rstrip())
            ((_, tokens),) = encode_responses(self.tokenizer, [(turn.prompt, turn.text)], True, bool(tokens.places))
            mask = self._mask(turn, prompt, tokens, 0)
        return Learned(prompt, [*tokens.ids, self.end], bytes(mask) + b"\1")

    def _endless(self, turn: DialogueTurn, tokens: Tokens, end: int) -> str:
        if end:
            written = self.tokenizer.decode([tokens.ids[end - 1]])
            reason = f"its {{% generation %}} marks stop before {written!r}"
        else:
            ends = " or ".join(repr(self.tokenizer.decode([token])) for token in sorted(self.stop_ids))
            reason = f"it writes {turn.text[-40:]!r}, without an end of sequence ({ends or 'the model has none'})"
        return (
            f"{turn.where}: the chat template has no end of message {turn.number} (assistant) to learn: {reason};"
            f" {self.config.section}.append_eos=true appends one"
        )

    def _join(self, dialogue: Dialogue, turns: Sequence[Learned]) -> list[Sample]:
        """Turns as samples: a turn extends the sample that its prompt begins with, or starts another."""
        joined_turns: list[tuple[list[int], bytes, int]] = []  # tokens, mask, number of the last message
        for number, turn in zip(dialogue.learned, turns, strict=True):
            before, mask = joined_turns[-1][:2] if joined_turns else ([], b"")
            if joined_turns and turn.prompt[: len(before)] == before:
                joined_turns.pop()
            else:
                mask = b""
            mask += bytes(len(turn.prompt) - len(mask)) + turn.mask
            joined_turns.append((turn.prompt + turn.tokens, mask, number))
        words = users_words(dialogue.messages)
        if len(joined_turns) == 1:
            return [Sample(array("i", joined_turns[0][0]), joined_turns[0][1], words, dialogue.where)]
        samples = []
        for tokens, mask, number in joined_turns:
            words = users_words(dialogue.messages[:number])
            samples.append(Sample(array("i", tokens), mask, words, f"{dialogue.where}, message {number}"))
        return samples


def _render_with_marks(
    where: str, messages: list[Message], tokenizer: PreTrainedTokenizerBase, tools: list[Any] | None, template: str
) -> tuple[str, list[Span]]:
    """Text of messages by the chat template, and the spans between its marks."""
    from jinja2 import TemplateError  # slow to import
    from transformers.utils.chat_template_utils import render_jinja_template

    options = {"chat_template": template, "return_assistant_tokens_mask": True, **tokenizer.special_tokens_map}
    try:
        texts, marks = render_jinja_template(conversations=[messages], tools=tools, **options)
    except TemplateError as error:
        raise ValueError(f"{where}: the tokenizer's chat template refuses it: {error}") from None
    return texts[0], [(int(begin), int(end)) for begin, end in marks[0]]


Turns = list[Sample]
"""A row's samples."""


def joined(rows: Iterable[Turns]) -> list[Sample]:
    """The samples of all rows."""
    return list(chain.from_iterable(rows))


class DialogueDataset(RowStream[Turns]):
    """Stream of supervised fine-tuning.

    Args:
        stop_ids: tokens that end a turn.

    Raises:
        ValueError: a source is missing, empty or malformed, a row has nothing to learn, the chat template does not fit,
            or no row is short enough; names file, row and key.
    """

    def __init__(self, config: SFTData, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int], seed: int = 0):
        self.encoder, self.unlearned, reader = Encoder(config, tokenizer, stop_ids), 0, RowReader(config.reader)

        def load(source: str) -> list[Turns]:
            dialogues = [read_dialogue(where, row, config) for where, row in reader(source, config.keys)]
            learned = [dialogue for dialogue in dialogues if dialogue.learned]
            if dialogues and not learned:
                raise ValueError(f"data source {source}: all messages of all {len(dialogues)} rows have weight 0")
            self.unlearned += len(dialogues) - len(learned)
            return list(self.encoder.samples(learned))

        super().__init__(config, load, lambda row: [len(sample.tokens) for sample in row], seed, reader=reader)
        self.targets = sum(sample.targets for sample in joined(self.rows()))
        self.apart = sum(len(row) > 1 for row in self.rows())

    def amount(self) -> str:
        return f"{super().amount()}, {self.targets:,} of them targets"

    def __str__(self) -> str:
        text = super().__str__()
        if self.unlearned:
            text += f"; {self.unlearned} dropped with weight 0 only"
        if self.apart:
            count = sum(len(row) for row in self.rows() if len(row) > 1)
            text += f"; {self.apart} in {count} samples, turn by turn: the template rewrites earlier turns"
        return text + str(self.encoder)

    def prompts(self, count: int) -> list[tuple[Prompt, list[int]]]:
        """(prompt, response tokens of the data) of the first rows, of the eval split if there is one."""
        turns = [(row[0], *row[0].first_turn()) for row in (self.eval_rows or list(self.rows()))[:count]]
        return [(Prompt(i, prompt, s.text, source=s.where), response) for i, (s, prompt, response) in enumerate(turns)]


def read_dialogue(where: str, row: dict[str, Any], config: SFTData) -> Dialogue:
    """A row as messages.

    Raises:
        ValueError: a column is missing, malformed or empty, or the assistant's content is empty; names the row.
    """
    key, section, prefill = config.messages_key, config.section, ""
    if row.get(key) is not None:
        if not config.chat_template:
            raise ValueError(f"{where}: {key!r} holds messages: needs {section}.chat_template=true")
        if not isinstance(row[key], list) or not row[key]:
            raise ValueError(f"{where}: {key!r} must be a list of {{role, content}} messages, not {shorten(row[key])}")
        given = read_messages(f"{where}: {key!r}", row[key])
        if not any(message["role"] == "assistant" for message in given):
            roles = ", ".join(message["role"] for message in given)
            raise ValueError(f"{where}: {key!r} has no assistant turn to learn (roles: {roles})")
        messages = with_system_prompt(given, config)
        learned = [i + len(messages) - len(given) for i in learned_messages(f"{where}: {key!r}", row[key])]
    else:
        if config.prompt_key not in row:
            raise ValueError(
                f"{where}: neither a column {key!r} ({section}.messages_key) nor {config.prompt_key!r}"
                f" ({section}.prompt_key); it has: {', '.join(map(repr, row)) or 'none'}"
            )
        prompt = with_system_prompt(read_prompt(where, row, config.prompt_key, config), config)
        response = column(where, row, config.response_key, f"{section}.response_key")
        if not isinstance(response, str):
            raise ValueError(f"{where}: {config.response_key!r} must be a string, not {shorten(response)}")
        if not response.strip():
            raise ValueError(f"{where}: {config.response_key!r} is empty")
        messages, prefill = with_response(where, prompt, {"role": "assistant", "content": response})
        learned = [len(messages) - 1]
    if learned and all(message["role"] == "system" for message in messages[: learned[0]]):
        raise ValueError(f"{where}: the first turn is the assistant's: a user turn must come before")
    return Dialogue(where, messages, learned, read_tools(where, row, config), prefill)
