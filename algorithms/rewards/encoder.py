"""Tokens of prompts and completions by a reward model's own tokenizer and chat template.

For served models, and for models in `reward.models` with another tokenizer than the policy: responses are decoded and
encoded again. If both tokenizers agree, the model reads the sampled tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from ...models.config import ModelConfig
from ...models.families.registry import read_config
from ...models.hf.tokenizer import has_tokenizer, read_tokenizer, stop_ids
from ...models.hf.tokenizer_match import chats_differ, tokens_differ
from ..batch import Rollout
from ..data.chat import Message, parse_tools, render, render_prompt, with_response
from ..data.encoding import encode_responses

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Completion(NamedTuple):
    """A completion to score, with the chat before it."""

    where: str
    messages: list[Message]  # before the completion
    text: str
    finished: bool  # it has an end of turn
    tools: list[Any] | None


def conversation(rollout: Rollout, texts: Sequence[str]) -> list[Message]:
    """Messages of a rollout, from the prompt to its last turn.

    Args:
        texts: of the policy's turns, which become messages of the assistant.

    Raises:
        ValueError: a turn of the environment has no messages; names the prompt's row.
    """
    prompt, written = rollout.prompt, iter(texts)
    chat = list(prompt.messages) or [{"role": "user", "content": prompt.text}]
    for number, turn in enumerate(rollout.turns):
        if turn.logprobs is not None:
            chat, _ = with_response(prompt.where, chat, {"role": "assistant", "content": next(written)})
        elif not turn.messages:
            raise ValueError(f"{prompt.where}: environment turn {number} of its response has no messages")
        chat += turn.messages
    return chat


def completion_of(rollout: Rollout, texts: Sequence[str]) -> Completion:
    """The policy's last turn as a completion of the chat before it.

    Args, raises: as in `conversation`.
    """
    prompt = rollout.prompt
    tools = parse_tools(prompt.where, prompt.fields.get("tools"))
    last = max(i for i, turn in enumerate(rollout.turns) if turn.logprobs is not None)
    messages = conversation(Rollout(prompt, rollout.turns[:last]), texts)
    return Completion(prompt.where, messages, texts[-1], rollout.finish == "stop", tools)


class ChatEncoder:
    """Tokenizer of completions for a reward model; the score is read at the last token.

    Args:
        folder: of the model.
        chat_template: format prompts with the tokenizer's chat template; false: plain text.
        why: reason for encoding again, for messages.

    Raises:
        ValueError: the tokenizer has no chat template, or no end of turn.
    """

    def __init__(
        self, folder: str, shape: ModelConfig, tokenizer: PreTrainedTokenizerBase, chat_template: bool, why: str = ""
    ):
        self.folder, self.shape, self.tokenizer, self.why = folder, shape, tokenizer, why
        self.chat_template = chat_template
        if chat_template and not tokenizer.chat_template:
            raise ValueError(f"chat_template=true, but the tokenizer of {folder} has none: set it to false")
        self.end = self._end_of_turn(stop_ids(folder, shape, tokenizer))

    def __call__(self, completion: Completion) -> list[int]:
        """Tokens of prompt and completion, with the end of turn if it is finished.

        Raises:
            ValueError: the chat template refuses the prompt, or it is not plain text; names the row.
        """
        where, messages, text, finished, tools = completion
        if self.chat_template:
            asked = render_prompt(where, messages, self.tokenizer, tools)
        elif len(messages) == 1:
            asked = messages[0]["content"]
        else:
            raise ValueError(f"{where}: a chat of {len(messages)} messages: needs chat_template=true")
        ((head, (tail, _)),) = encode_responses(self.tokenizer, [(asked, text)], self.chat_template)
        return [*head, *tail, *([self.end] if finished else [])]

    def within_positions(self, completion: Completion) -> list[int]:
        """The same tokens; ValueError if they exceed the model's positions."""
        tokens = self(completion)
        if len(tokens) > self.shape.longest_document:
            raise ValueError(
                f"{completion.where}: {len(tokens)} tokens of {self.folder}, which has positions for"
                f" {self.shape.longest_document}"
            )
        return tokens

    def _end_of_turn(self, ends: Sequence[int]) -> int:
        """The end of a response: the stop token that the chat template writes, or the first stop token."""
        written: list[int] = []
        if self.chat_template:
            chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}]
            text = render("a chat of two turns", chat, self.tokenizer, None)
            written = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        candidates: list[Any] = [
            token for token in (*reversed(written), self.tokenizer.eos_token_id, *ends) if token in ends
        ]
        if not candidates:
            raise ValueError(f"{self.folder}: neither its configs nor its tokenizer name an eos_token_id")
        return candidates[0]


class Policy(NamedTuple):
    """The policy, as far as other models read its tokens."""

    folder: str
    shape: ModelConfig
    tokenizer: PreTrainedTokenizerBase
    chat_template: bool


def reward_encoders(folders: Sequence[str], policy: Policy) -> dict[str, ChatEncoder]:
    """Folder -> encoder of each reward model with another tokenizer or chat template than the policy.

    A folder without a tokenizer is assumed to use the policy's.

    Raises:
        ValueError: such a model has no chat template or no end of turn, or no tokenizer and another vocabulary size.
    """
    found = {}
    for folder in folders:
        shape = read_config(folder)
        if not has_tokenizer(folder):
            check_vocabulary(folder, shape, policy.folder, policy.shape)
            continue
        tokenizer = read_tokenizer(folder)
        why = _difference(tokenizer, shape, policy)
        if why:
            try:
                found[folder] = ChatEncoder(folder, shape, tokenizer, policy.chat_template, why)
            except ValueError as error:
                raise ValueError(
                    f"{folder}: its tokenizer is not that of {policy.folder} ({why}), and {error}"
                ) from None
    return found


def _difference(tokenizer: PreTrainedTokenizerBase, shape: ModelConfig, policy: Policy) -> str:
    """Reason why a model cannot read the policy's tokens, or "". Chat templates are compared if both have one."""
    if why := tokens_differ(policy.tokenizer, tokenizer, specials=not policy.chat_template):
        return why
    if shape.vocab_size < policy.shape.vocab_size:
        return f"vocab_size is {policy.shape.vocab_size} in one and {shape.vocab_size} in the other"
    return chats_differ(policy.tokenizer, tokenizer) if policy.chat_template and tokenizer.chat_template else ""


def check_vocabulary(folder: str, shape: ModelConfig, actor: str, actor_shape: ModelConfig) -> None:
    """Refuse a critic or reference whose vocabulary size, or tokenizer if both folders have one, is not the actor's."""
    if shape.vocab_size != actor_shape.vocab_size:
        raise ValueError(
            f"{folder}: vocab_size={shape.vocab_size}, but the actor's is {actor_shape.vocab_size} ({actor}):"
            " both read the same tokens"
        )
    if folder != actor and has_tokenizer(folder) and has_tokenizer(actor):
        why = tokens_differ(read_tokenizer(actor), read_tokenizer(folder))
        if why:
            raise ValueError(
                f"{folder}: its tokenizer is not that of {actor}, and both must read the same tokens: {why}"
            )
