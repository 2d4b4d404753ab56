"""Columns of ShareGPT and Alpaca converted to the configured ones.

ShareGPT: `conversations`, a list of {from, value} messages, `system`, and for preferences `chosen` and `rejected`, a
message each. Alpaca: `instruction`, `input`, `output`, `system`, `history` (earlier pairs of turns). A row with the
configured columns is not changed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .text_files import parse_json

ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
}
"""ShareGPT's `from` -> role."""

Message = dict[str, Any]


def own_columns(where: str, row: dict[str, Any], keys: Mapping[str, str]) -> dict[str, Any]:
    """The row with the configured columns added to ShareGPT's or Alpaca's.

    Args:
        keys: option -> column, as {"prompt_key": "prompt", "response_key": "response"}.

    Raises:
        ValueError: ShareGPT's or Alpaca's columns are malformed; names the row.
    """
    if "messages_key" in keys and isinstance(row.get(keys["messages_key"]), str):
        key = keys["messages_key"]
        row = row | {key: _listed(where, key, row[key])}
    if any(row.get(column) is not None for option, column in keys.items() if option in ("messages_key", "prompt_key")):
        return row
    if row.get("conversations") is not None:
        chat = _listed(where, "conversations", row["conversations"])
        return row | _of_dialogue(where, row, [*_system(where, row, chat), *chat], keys)
    if row.get("instruction") is not None:
        return row | _of_instruction(where, row, keys)
    return row


def from_sharegpt(where: str, message: Any) -> Any:
    """A {from, value} message as {role, content}; anything else as it is.

    Args:
        where: as rows.jsonl:12: 'conversations'[0].

    Raises:
        ValueError: `from` is not in ROLES, or a function call is not JSON.
    """
    if not isinstance(message, dict) or "from" not in message or "role" in message:
        return message
    value, rest = message.get("value"), {k: v for k, v in message.items() if k not in ("from", "value")}
    if not isinstance(message["from"], str) or message["from"] not in ROLES:
        raise ValueError(f"{where}: from={message['from']!r}: must be one of {', '.join(ROLES)}")
    if message["from"] != "function_call":
        return {"role": ROLES[message["from"]], "content": value, **rest}
    try:
        calls = parse_json(value) if isinstance(value, str) else value
    except ValueError as error:
        raise ValueError(f"{where}: a function_call that is {error}") from None
    calls = calls if isinstance(calls, list) else [calls]
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"type": "function", "function": call} for call in calls],
        **rest,
    }


def _listed(where: str, key: str, value: Any) -> Any:
    """A list of messages, which may be JSON text (in CSV files)."""
    if not isinstance(value, str) or not value.lstrip().startswith("["):
        return value
    try:
        return parse_json(value)
    except ValueError as error:
        raise ValueError(f"{where}: {key!r} must be a list of messages, or one as JSON; it is {error}") from None


def _system(where: str, row: dict[str, Any], chat: Any) -> list[Message]:
    """The row's system prompt, if its dialogue has none."""
    if not isinstance(chat, list) or not chat or not all(isinstance(message, dict) for message in chat):
        raise ValueError(f"{where}: 'conversations' must be a list of {{from, value}} messages, not {chat!r:.60}")
    own = "system" in (chat[0].get("from"), chat[0].get("role"))
    return [{"role": "system", "content": row["system"]}] if row.get("system") and not own else []


def _of_dialogue(where: str, row: dict[str, Any], chat: list[Message], keys: Mapping[str, str]) -> dict[str, Any]:
    """The columns of a dialogue: whole, ending with its response, or up to the last turn of the assistant."""
    chat = [from_sharegpt(f"{where}: 'conversations'[{i}]", message) for i, message in enumerate(chat)]
    if "messages_key" in keys:
        return {keys["messages_key"]: chat}
    if "response_key" in keys and row.get(keys["response_key"]) is None:
        return {keys["response_key"]: chat}
    if "chosen_key" in keys:
        sides = {keys[side]: row.get(keys[side]) for side in ("chosen_key", "rejected_key")}
        return {keys["prompt_key"]: chat} | {k: [v] if isinstance(v, dict) else v for k, v in sides.items()}
    while chat and chat[-1].get("role") == "assistant":
        chat = chat[:-1]
    return {keys["prompt_key"]: chat} if chat and "prompt_key" in keys else {}


def _of_instruction(where: str, row: dict[str, Any], keys: Mapping[str, str]) -> dict[str, Any]:
    """The columns of an instruction with its input, earlier turns, and its output."""
    instruction = [row["instruction"], row["input"]] if row.get("input") else [row["instruction"]]
    history = row.get("history") or []
    pairs = isinstance(history, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in history)
    texts = [text for pair in history for text in pair] if pairs else []
    if not pairs or not all(isinstance(text, str) for text in (*instruction, *texts)):
        raise ValueError(
            f"{where}: 'instruction' and 'input' must be strings, 'history' a list of [instruction, output] pairs"
        )
    prompt = "\n".join(instruction)
    before = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    system = [{"role": "system", "content": row["system"]}] if row.get("system") else []
    chat = [*system, *before, {"role": "user", "content": prompt}]
    if "messages_key" in keys and before:  # every output is learned
        return {keys["messages_key"]: [*chat, {"role": "assistant", "content": row.get("output")}]}
    columns = {keys["prompt_key"]: chat if len(chat) > 1 else prompt} if "prompt_key" in keys else {}
    if "response_key" in keys and row.get(keys["response_key"]) is None and "output" in row:
        columns[keys["response_key"]] = row["output"]
    return columns
