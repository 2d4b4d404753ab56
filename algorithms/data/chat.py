"""Chats: messages and tools of rows, validated, and rendered by the tokenizer's chat template.

Shared by prompts, dialogues, pairs, labels and steps: roles, tools, tool calls and other keys reach the template.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from ..config.data import DataConfig
from .columns import from_sharegpt
from .text_files import parse_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LEARNED = ("weight", "train")
"""Keys of a message that mark it as learned or not; removed before the template."""
Message = dict[str, Any]
"""role, content (a string), and what else the chat template reads."""


def column(where: str, row: dict[str, Any], key: str, option: str) -> Any:
    """A row's column; ValueError with row, option and existing columns if it is missing."""
    if key not in row:
        raise ValueError(f"{where}: no column {key!r} ({option}); it has: {', '.join(map(repr, row)) or 'none'}")
    return row[key]


def shorten(value: Any) -> str:
    """A value, shortened for messages."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def read_messages(where: str, value: list[Any]) -> list[Message]:
    """Validated messages, without keys that are None (parquet and `datasets` add them).

    Args:
        where: as rows.jsonl:12: 'messages'.

    Raises:
        ValueError: not a message, content not a string, or an empty assistant message; names it.
    """
    return [message for message, _ in _each(where, value)]


def learned_messages(where: str, value: list[Any]) -> list[int]:
    """Numbers of the messages to learn: the assistant's without weight 0. Raises: as `read_messages`."""
    messages = enumerate(_each(where, value))
    return [i for i, (message, learned) in messages if learned and message["role"] == "assistant"]


def _each(where: str, value: list[Any]) -> Iterator[tuple[Message, bool]]:
    """The messages of a list, and whether each may be learned."""
    for number, message in enumerate(value):
        message = from_sharegpt(f"{where}[{number}]", message)
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise ValueError(f"{where}[{number}] must be a message {{role, content}}, not {shorten(message)}")
        message = {key: own for key, own in message.items() if own is not None}
        learned = _is_learned(f"{where}[{number}]", message)
        message = {key: own for key, own in message.items() if key not in LEARNED}
        role, calls = message["role"], message.get("tool_calls")
        content = message.get("content", "" if calls else None)
        if not isinstance(content, str):
            raise ValueError(f"{where}[{number}] ({role}): its content must be a string, not {shorten(content)}")
        if role == "assistant" and not content.strip() and not calls:
            raise ValueError(f"{where}[{number}] (assistant) is empty")
        yield {**message, "content": content}, learned


def _is_learned(where: str, message: Message) -> bool:
    """Whether a message may be learned: not with weight 0 or train false.

    Raises:
        ValueError: the values are invalid, contradict each other, or mark another role's message as learned.
    """
    role, weight, train = message["role"], message.get("weight"), message.get("train")
    if weight is not None and (isinstance(weight, bool) or not isinstance(weight, int | float) or weight not in (0, 1)):
        raise ValueError(f"{where} ({role}): weight={shorten(weight)}: must be 0 (not learned) or 1 (learned)")
    if train is not None and not isinstance(train, bool):
        raise ValueError(f"{where} ({role}): train={shorten(train)}: must be true or false")
    if weight is not None and train is not None and bool(weight) != train:
        raise ValueError(f"{where} ({role}): weight={weight} and train={train}: must agree")
    if role != "assistant" and (weight or train):
        name, value = ("weight", weight) if weight else ("train", train)
        raise ValueError(f"{where} ({role}): {name}={value}: only the assistant's messages are learned")
    return weight != 0 and train is not False


def read_prompt(where: str, row: dict[str, Any], key: str, config: DataConfig) -> list[Message]:
    """The prompt in a row's column `key`, without the config's system prompt.

    Raises:
        ValueError: there is none, or it is neither a string nor a list of messages.
    """
    prompt = column(where, row, key, f"{config.section}.prompt_key")
    if isinstance(prompt, str):
        if not prompt.strip():
            raise ValueError(f"{where}: {key!r} is empty")
        return [{"role": "user", "content": prompt}]
    if not isinstance(prompt, list) or not prompt:
        allowed = "a string or a list of {role, content} messages"
        raise ValueError(f"{where}: {key!r} must be {allowed}, not {shorten(prompt)}")
    if not config.chat_template:
        raise ValueError(f"{where}: {key!r} is a list of messages: needs {config.section}.chat_template=true")
    return read_messages(f"{where}: {key!r}", prompt)


def parse_tools(where: str, tools: Any) -> list[Any] | None:
    """Function descriptions of a column: a list, or a list as JSON. ValueError with the row for anything else."""
    if isinstance(tools, str):
        with suppress(ValueError):
            tools = parse_json(tools)
    if tools and not isinstance(tools, list):
        raise ValueError(f"{where}: tools={tools!r:.60}: must be a list of function descriptions, or a list as JSON")
    return tools or None


def read_tools(where: str, row: dict[str, Any], config: DataConfig) -> list[Any] | None:
    """The row's column `tools`. ValueError for one that is not valid, or without a chat template."""
    tools = parse_tools(where, row.get("tools"))
    if tools and not config.chat_template:
        raise ValueError(f"{where}: 'tools' is not empty: needs {config.section}.chat_template=true")
    return tools


def with_system_prompt(chat: list[Message], config: DataConfig) -> list[Message]:
    """The messages after the configured system prompt, unless they have a system message."""
    if config.system_prompt and config.chat_template and chat[0]["role"] != "system":
        return [{"role": "system", "content": config.system_prompt}, *chat]
    return chat


def users_words(chat: Sequence[Message]) -> str:
    """Text of the user's last message."""
    return next((message["content"] for message in reversed(chat) if message["role"] == "user"), chat[-1]["content"])


def need_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer without a chat template."""
    if not tokenizer.chat_template:
        raise ValueError("chat_template=true, but the model's tokenizer has none: set it to false")


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokenizer's end of sequence; ValueError if it has none."""
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise ValueError("the model's tokenizer has no end of sequence (eos_token)")
    return end


def render(
    where: str,
    chat: Sequence[Message],
    tokenizer: PreTrainedTokenizerBase,
    tools: list[Any] | None,
    *,
    generation_prompt: bool = False,
    opened: bool = False,
) -> str:
    """Text of messages by the tokenizer's chat template.

    Args:
        generation_prompt: followed by the header of the response.
        opened: the last message is continued, without its end of turn.

    Raises:
        ValueError: the template refuses them, or leaves out tools or calls of them; names the row.
    """
    from jinja2 import TemplateError  # installed with transformers, and slow to import

    def write(chat: Sequence[Message], tools: list[Any] | None) -> str:
        text = tokenizer.apply_chat_template(
            list(chat),
            tools=tools,
            tokenize=False,
            add_generation_prompt=generation_prompt,
            continue_final_message=opened,
        )
        assert isinstance(text, str)
        return text

    try:
        text = write(chat, tools)
    except (TemplateError, ValueError) as error:
        raise ValueError(f"{where}: the tokenizer's chat template refuses it: {error}") from None

    def is_the_same(chat: Sequence[Message], tools: list[Any] | None) -> bool:
        try:
            return text == write(chat, tools)
        except (TemplateError, ValueError):
            return False

    if tools and is_the_same(chat, None):
        raise ValueError(f"{where}: the tokenizer's chat template does not write the row's 'tools'")
    called = [number for number, message in enumerate(chat) if message.get("tool_calls")]
    if called and is_the_same([{k: v for k, v in message.items() if k != "tool_calls"} for message in chat], tools):
        raise ValueError(f"{where}: the tokenizer's chat template does not write the tool calls of message {called[0]}")
    return text


def render_prompt(
    where: str, chat: Sequence[Message], tokenizer: PreTrainedTokenizerBase, tools: list[Any] | None
) -> str:
    """Text of a prompt: with the generation prompt, or an assistant's last message to continue (prefill).

    Raises:
        ValueError: the template refuses the messages, or the prefill; names the row.
    """
    opened = chat[-1]["role"] == "assistant"
    if opened:
        check_prefill(where, chat[-1])
    return render(where, chat, tokenizer, tools, generation_prompt=not opened, opened=opened)


def check_prefill(where: str, message: Message) -> None:
    """Refuse a prefill with tool calls."""
    if message.get("tool_calls"):
        raise ValueError(f"{where}: the prompt ends with tool calls of the assistant, whose results must follow")


def with_response(where: str, prompt: Sequence[Message], response: Message) -> tuple[list[Message], str]:
    """(messages of prompt and response, prefill: the beginning of the response that is part of the prompt).

    Raises: as `check_prefill`.
    """
    *before, last = prompt
    if last["role"] != "assistant":
        return [*prompt, response], ""
    check_prefill(where, last)
    return [*before, {**last, **response, "content": last["content"] + response["content"]}], last["content"]
