"""Rows of supervised fine-tuning: a whole dialogue, of which every assistant turn is learned that does not say no, or
a prompt with its response, of which only the response is.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any

from ..batch import Prompt
from ..config.sft import SFTData
from .chat import (
    answered,
    brief,
    column,
    learned_messages,
    read_messages,
    read_prompt,
    read_tools,
    with_system_prompt,
)
from .dialogues import Dialogue, Encoder, Sample
from .sources import RowReader
from .streams import RowStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Turns = list[Sample]
"""A row's samples: one, or where its turns are learned apart, several."""


def joined(rows: Iterable[Turns]) -> list[Sample]:
    """The rows' samples, end to end."""
    return list(chain.from_iterable(rows))


class DialogueDataset(RowStream[Turns]):
    """The rows of supervised fine-tuning as a stream.

    Args:
        stop_ids: tokens that end a turn.

    Raises:
        ValueError: a source is missing, empty or malformed, a row has nothing to learn, the chat template does not fit,
            or no row is short enough; names file, row and key.
    """

    def __init__(self, config: SFTData, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int], seed: int = 0):
        self.encoder, self.unlearned, reader = Encoder(config, tokenizer, stop_ids), 0, RowReader()

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
            text += f"; {self.unlearned} dropped whose messages all have weight 0"
        if self.apart:
            count = sum(len(row) for row in self.rows() if len(row) > 1)
            text += f"; {self.apart} in {count} samples, turn by turn, for the template rewrites earlier turns"
        return text + str(self.encoder)

    def prompts(self, count: int) -> list[tuple[Prompt, list[int]]]:
        """(prompt, wanted answer's tokens) of the first rows, held-out ones if there are, for a look at the model."""
        turns = [(row[0], *row[0].first_turn()) for row in (self.held_out or list(self.rows()))[:count]]
        return [(Prompt(i, prompt, s.text, source=s.where), answer) for i, (s, prompt, answer) in enumerate(turns)]


def read_dialogue(where: str, row: dict[str, Any], config: SFTData) -> Dialogue:
    """A row as messages; none is learned where all say no.

    Raises:
        ValueError: a column is missing, malformed or empty, or the assistant says nothing; names the row.
    """
    key, section, prefill = config.messages_key, config.section, ""
    if row.get(key) is not None:
        if not config.chat_template:
            raise ValueError(f"{where}: {key!r} holds messages: needs {section}.chat_template=true")
        if not isinstance(row[key], list) or not row[key]:
            raise ValueError(f"{where}: {key!r} must be a list of {{role, content}} messages, not {brief(row[key])}")
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
        answer = column(where, row, config.response_key, f"{section}.response_key")
        if not isinstance(answer, str):
            raise ValueError(f"{where}: {config.response_key!r} must be a string, not {brief(answer)}")
        if not answer.strip():
            raise ValueError(f"{where}: {config.response_key!r} is empty")
        messages, prefill = answered(where, prompt, {"role": "assistant", "content": answer})
        learned = [len(messages) - 1]
    if learned and all(message["role"] == "system" for message in messages[: learned[0]]):
        raise ValueError(f"{where}: the assistant speaks first: a turn to answer must come before its first one")
    return Dialogue(where, messages, learned, read_tools(where, row, config), prefill)
