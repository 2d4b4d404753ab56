"""Comparison of two tokenizers: whether one model may read another's token ids.

The vocabulary's size does not decide it: Llama 2 and Mistral both have 32,000 tokens, and few ids in common.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .tokenizer import PROBES

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_TEXTS = (
    *PROBES,
    "3.14159 and 1,000,000; 2024-05-01; 0x1F; x^2 + y^2 = z^2",
    "\\boxed{\\frac{1}{2}} $\\sqrt{3}$ <think>\n\n</think> ```python\nimport os\n```\n",
    "I'LL we've DON'T it’s “quoted” – dashes… ½ ² ™",
    "日本語のテキスト 한국어 텍스트 العربية עברית हिन्दी ไทย ελληνικά",
    "\r\n\t\t    eight        spaces\u00a0and\u200bothers 👩\u200d👩\u200d👧 e\u0301",
)
_USER, _RESPONSE = {"role": "user", "content": " What is 2+2?\n"}, {"role": "assistant", "content": " It is 4.\n"}
_TOOL = {"type": "function", "function": {"name": "look", "description": "Looks.", "parameters": {"type": "object"}}}
_CHATS: tuple[tuple[list[dict[str, Any]], list[Any] | None], ...] = (
    ([_USER], None),
    ([_USER, _RESPONSE], None),
    ([{"role": "system", "content": "Be brief."}, _USER, _RESPONSE, _USER, _RESPONSE], None),
    ([_USER], [_TOOL]),
)


def tokens_differ(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase, *, specials: bool = False) -> str:
    """First difference in vocabulary or in the ids of a text; "" where there is none.

    `second` may have more tokens than `first`.

    Args:
        specials: compare texts with the special tokens around them, too.
    """
    vocab, wanted = second.get_vocab(), first.get_vocab()
    if different := wanted.items() - vocab.items():
        token, number = min(different, key=lambda item: item[1])
        return f"{token!r} is token {number} in one and {vocab.get(token, 'none')} in the other"
    for text in (*_TEXTS, *(f"a{token}b {token} c" for token in first.all_special_tokens)):
        for around in (False, True) if specials else (False,):
            one, other = (tokenizer.encode(text, add_special_tokens=around) for tokenizer in (first, second))
            if one != other:
                return f"{text!r} becomes {_shortened(one)} in one and {_shortened(other)} in the other"
    return ""


def chats_differ(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> str:
    """First difference in bos_token, eos_token or the text of a chat; "" where there is none."""
    for name in ("bos_token", "eos_token"):
        one, other = getattr(first, name), getattr(second, name)
        if one != other:
            return f"{name} is {one!r} in one and {other!r} in the other"
    if first.chat_template != second.chat_template:
        for chat, tools in _CHATS:
            for prompt in (True, False):
                if _chat_text(first, chat, tools, prompt) != _chat_text(second, chat, tools, prompt):
                    roles = ", ".join(message["role"] for message in chat) + (" with tools" if tools else "")
                    return f"the chat templates differ on a chat ({roles})"
    return ""


def _chat_text(tokenizer: PreTrainedTokenizerBase, chat: list[dict[str, Any]], tools: Any, prompt: bool) -> str:
    try:
        return str(tokenizer.apply_chat_template(chat, tools=tools, add_generation_prompt=prompt, tokenize=False))
    except Exception as error:  # a template may refuse a role, or raise anything else
        return f"refused: {type(error).__name__}"


def _shortened(ids: list[int]) -> str:
    return str(ids if len(ids) <= 8 else [*ids[:7], "..."]).replace("'", "")
