"""Rows of preferences: pairs of a chosen and a rejected response, labeled responses, labeled steps.

The two samples of a pair share their prompt; their targets are the tokens of the last response, up to its end of
sequence: text that a template writes after it (ChatML: a new line) is not part of rollouts, where rewards are read.
Formats: prompt, chosen and rejected strings; two dialogues in messages; or two dialogues in strings with turns after
"Human:" and "Assistant:", as in Anthropic's hh-rlhf.
"""

from __future__ import annotations

import re
import sys
from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ..config.preference import LabelData, PairData, StepData
from .chat import (
    Message,
    column,
    learned_messages,
    need_template,
    read_messages,
    read_prompt,
    read_tools,
    render_prompt,
    shorten,
    users_words,
    with_response,
    with_system_prompt,
)
from .dialogues import Dialogue, Encoder, Sample
from .encoding import encode_prompts, encode_responses
from .sources import Read, RowReader, read_rows
from .streams import RowStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from ..config.conditional import RewardedData

TURN = re.compile(r"\n\n(Human|Assistant): ?")


class Pair(NamedTuple):
    """Chosen and rejected response to a prompt."""

    chosen: Sample
    rejected: Sample
    margin: float  # 0 without a column of margins

    @property
    def lengths(self) -> tuple[int, int]:
        """Tokens of both, prompt included."""
        return len(self.chosen.tokens), len(self.rejected.tokens)


class LabeledResponse(NamedTuple):
    """A response labeled desirable or not."""

    sample: Sample
    desirable: bool

    @property
    def lengths(self) -> tuple[int]:
        """Tokens, prompt included."""
        return (len(self.sample.tokens),)


class PairStream(RowStream[Pair]):
    """Stream of pairs. Pairs of equal responses are dropped and counted.

    Raises:
        ValueError: as RowStream and `read_pairs`; all pairs of a source have equal responses.
    """

    def __init__(self, config: PairData, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int], seed: int = 0):
        self.encoder, self.equal, reader = Encoder(config, tokenizer, stop_ids), 0, RowReader(config.reader)

        def load(source: str) -> list[Pair]:
            pairs = read_pairs(source, config, self.encoder, reader)
            kept = [pair for pair in pairs if pair.chosen.tokens != pair.rejected.tokens]
            if pairs and not kept:
                raise ValueError(
                    f"data source {source}: in all {len(pairs)} pairs the chosen response equals the rejected one"
                )
            self.equal += len(pairs) - len(kept)
            return kept

        super().__init__(config, load, lambda pair: pair.lengths, seed, "pairs", reader)

    def __str__(self) -> str:
        equal = f"; {self.equal} dropped for equal responses" if self.equal else ""
        return f"{super().__str__()}{equal}{self.encoder}"


def read_pairs(source: str, config: PairData, encoder: Encoder, read: Read = read_rows) -> list[Pair]:
    """The pairs of a source, including long ones and those of equal responses.

    Raises:
        ValueError: a column is missing or malformed; names the row.
    """
    chosen, rejected, margins = [], [], []
    for where, row in read(source, config.keys):
        for side, response in zip((chosen, rejected), read_pair(where, row, config), strict=True):
            side.append(response)
        margins.append(_margin(where, row, config.margin_key))
    samples = [encoder.responses(side) for side in (chosen, rejected)]
    return [Pair(*pair) for pair in zip(*samples, margins, strict=True)]


def _margin(where: str, row: dict[str, Any], key: str) -> float:
    margin = column(where, row, key, "data.margin_key") if key else 0.0
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not 0 <= margin <= sys.float_info.max:
        raise ValueError(f"{where}: {key!r} must be a number of at least 0, not {shorten(margin)}")
    return float(margin)


def read_pair(where: str, row: dict[str, Any], config: PairData) -> tuple[Dialogue, Dialogue]:
    """A row as two dialogues. Raises ValueError that names the row."""
    chosen = read_response(where, row, config.chosen_key, "chosen_key", config)
    rejected = read_response(where, row, config.rejected_key, "rejected_key", config)
    if (chosen.messages[:-1], chosen.prefill) != (rejected.messages[:-1], rejected.prefill):
        raise ValueError(
            f"{where}: {config.chosen_key!r} and {config.rejected_key!r} are responses to different dialogues"
        )
    return chosen, rejected


def read_response(
    where: str, row: dict[str, Any], key: str, option: str, config: PairData | LabelData | RewardedData
) -> Dialogue:
    """A response after the row's prompt, or at the end of a dialogue. Only the response is learned.

    A dialogue beside a prompt must begin with it.

    Args:
        option: of the column `key`.

    Raises:
        ValueError: a column is missing or malformed, or holds no response; names the row.
    """
    response, prompt, prefill = column(where, row, key, f"{config.section}.{option}"), [], ""
    if row.get(config.prompt_key) is not None:
        prompt = read_prompt(where, row, config.prompt_key, config)
    if isinstance(response, str):
        alone = prompt and not TURN.match(response)
        messages = [{"role": "assistant", "content": response}] if alone else split_turns(where, key, response)
    elif isinstance(response, list) and response:
        messages = read_messages(f"{where}: {key!r}", response)
        if messages[-1]["role"] == "assistant" and len(response) - 1 not in learned_messages(
            f"{where}: {key!r}", response
        ):
            raise ValueError(f"{where}: {key!r}: the response has weight 0: nothing to learn")
    else:
        allowed = "a string or a list of {role, content} messages"
        raise ValueError(f"{where}: {key!r} must be {allowed}, not {shorten(response)}")
    if len(messages) > 1 and prompt and not begins(messages, prompt):
        raise ValueError(
            f"{where}: {key!r} holds {len(messages)} messages that do not begin with {config.prompt_key!r}: give the"
            " response alone, or the dialogue with its prompt"
        )
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"{where}: {key!r} must end with the assistant, not with {messages[-1]['role']}")
    if not messages[-1]["content"].strip() and not messages[-1].get("tool_calls"):
        raise ValueError(f"{where}: {key!r} is empty")
    if prompt:
        whole = len(messages) > 1
        own_system = whole and messages[0]["role"] == "system" != prompt[0]["role"]
        if len(messages) == whole * len(prompt) + own_system + 1:  # only the response follows the prompt
            messages, prefill = with_response(where, messages[:-1] if whole else prompt, messages[-1])
    messages = with_system_prompt(messages, config)
    if len(messages) < 2 or messages[-2]["role"] == "system":
        raise ValueError(f"{where}: {key!r} has no user turn; give the prompt in {config.prompt_key!r}")
    if len(messages) > 2 and not config.chat_template:
        raise ValueError(
            f"{where}: {key!r} is a dialogue of {len(messages)} turns: needs {config.section}.chat_template=true"
        )
    return Dialogue(where, messages, [len(messages) - 1], read_tools(where, row, config), prefill)


def begins(messages: list[Message], prompt: list[Message]) -> bool:
    """Whether a dialogue begins with a prompt's messages, except for outer white space and an added system message."""
    own, wanted = ([{**m, "content": m["content"].strip()} for m in chat] for chat in (messages, prompt))
    if wanted[0]["role"] != "system" == own[0]["role"]:
        own = own[1:]
    return own[: len(wanted)] == wanted


def split_turns(where: str, key: str, text: str) -> list[Message]:
    """A dialogue in one string as messages; ValueError without turns."""
    parts = TURN.split(text)
    if len(parts) < 3 or parts[0].strip():
        raise ValueError(
            f"{where}: {key!r} is neither a response to a prompt column nor a dialogue that begins with"
            f" '\\n\\nHuman:'; it is {shorten(text)}"
        )
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[speaker], "content": words.strip()}
        for speaker, words in zip(parts[1::2], parts[2::2], strict=True)
    ]


def read_labeled_responses(
    source: str, config: LabelData, encoder: Encoder, read: Read = read_rows
) -> list[LabeledResponse]:
    """Labeled responses. ValueError with the row if a column is missing or malformed."""
    dialogues, labels = [], []
    for where, row in read(source, config.keys):
        dialogues.append(read_response(where, row, config.response_key, "response_key", config))
        label = column(where, row, config.label_key, "data.label_key")
        if not is_label(label):
            raise ValueError(f"{where}: {config.label_key!r} must be true or false, not {shorten(label)}")
        labels.append(bool(label))
    return [LabeledResponse(*row) for row in zip(encoder.responses(dialogues), labels, strict=True)]


def is_label(value: Any) -> bool:
    """Whether a value is true, false, 1 or 0."""
    return isinstance(value, bool | int) and value in (0, 1)


def mismatched(sample: Sample, other: Sample, limit: int) -> Sample:
    """The other row's response after this row's prompt, for KTO's reference point; truncated at `limit` tokens."""
    prompt, begin = sample.tokens[: sample.mask.index(1)], other.mask.index(1)
    response = slice(begin, begin + max(1, limit - len(prompt)))
    mask = bytes(len(prompt)) + other.mask[response]
    return Sample(
        prompt + other.tokens[response], mask, sample.text, f"{sample.where} with the response of {other.where}"
    )


def partners(pool: Sequence[Sample]) -> list[int]:
    """For each row the index of the next one (cyclic) with another prompt, whose response is its mismatched one (KTO).

    Raises:
        ValueError: all prompts are equal; names the sources.
    """
    prompts = [sample.tokens[: sample.mask.index(1)].tobytes() for sample in pool]
    if len(set(prompts)) < 2:
        sources = ", ".join(dict.fromkeys(sample.where.rpartition(":")[0] for sample in pool))
        raise ValueError(
            f"data source {sources}: all {len(pool)} responses have one prompt: KTO's reference point needs"
            " responses to other prompts"
        )
    found, other = [], next(i for i, prompt in enumerate(prompts) if prompt != prompts[-1])
    for i in reversed(range(len(pool))):
        following = (i + 1) % len(pool)
        other = following if prompts[following] != prompts[i] else other
        found.append(other)
    return found[::-1]


class LabeledStream(RowStream[LabeledResponse]):
    """Stream of labeled responses.

    Attributes:
        partners: of each pool, what `partners` gives.

    Raises:
        ValueError: as RowStream; all labels are the same, over all sources, or all prompts of a pool.
    """

    def __init__(self, config: LabelData, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int], seed: int = 0):
        self.encoder, reader = Encoder(config, tokenizer, stop_ids), RowReader(config.reader)
        load = lambda source: read_labeled_responses(source, config, self.encoder, reader)  # noqa: E731
        super().__init__(config, load, lambda row: row.lengths, seed, "labeled responses", reader)
        labels = [row.desirable for row in self.rows()]
        if len(set(labels)) == 1:
            raise ValueError(
                f"data source {', '.join(config.sources)}: all {len(labels)} responses have the label {labels[0]}"
            )
        self.desirable = sum(labels)
        self.partners = [partners([row.sample for row in pool]) for pool in self.pools]

    def amount(self) -> str:
        return f"{super().amount()}, {self.desirable} of them desirable"

    def __str__(self) -> str:
        return f"{super().__str__()}{self.encoder}"


class Steps(NamedTuple):
    """A response in steps; `sample.mask` is 1 at the last token of each, `labels` are true for correct ones."""

    sample: Sample
    labels: tuple[bool, ...]

    @property
    def lengths(self) -> tuple[int]:
        """Tokens, prompt included."""
        return (len(self.sample.tokens),)


def read_steps(
    source: str, config: StepData, tokenizer: PreTrainedTokenizerBase, read: Read = read_rows
) -> list[Steps]:
    """Responses with labeled steps, including long ones. ValueError with the row."""
    if config.chat_template:
        need_template(tokenizer)
    rows = []
    for where, row in read(source, config.keys):
        prompt = with_system_prompt(read_prompt(where, row, config.prompt_key, config), config)
        tools = read_tools(where, row, config)
        steps = column(where, row, config.steps_key, f"{config.section}.steps_key")
        labels = column(where, row, config.labels_key, f"{config.section}.labels_key")
        if not isinstance(steps, list) or not steps or not all(isinstance(s, str) and s.strip() for s in steps):
            raise ValueError(f"{where}: {config.steps_key!r} must be a list of strings, not {shorten(steps)}")
        if not isinstance(labels, list) or not all(map(is_label, labels)):
            raise ValueError(f"{where}: {config.labels_key!r} must be a list of true and false, not {shorten(labels)}")
        if len(labels) != len(steps):
            raise ValueError(f"{where}: {len(steps)} steps but {len(labels)} labels")
        text = render_prompt(where, prompt, tokenizer, tools) if config.chat_template else prompt[-1]["content"]
        (head,) = encode_prompts(tokenizer, [text], config.chat_template)
        tokens, mask = array("i", head), bytearray(len(head))
        for step in steps:  # each with its separator, so that its last token is its own
            ((_, (ids, _)),) = encode_responses(tokenizer, [(text, step + config.separator)], config.chat_template)
            text += step + config.separator
            tokens.extend(ids)
            mask += bytes(len(ids) - 1) + b"\1"
        sample = Sample(tokens, bytes(mask), users_words(prompt), where)
        rows.append(Steps(sample, tuple(bool(label) for label in labels)))
    return rows
