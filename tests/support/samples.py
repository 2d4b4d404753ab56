"""Small inputs of tests: a tokenizer of whole words with a chat template, JSONL files, batches of random samples."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from tiny import VOCAB
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trialign.algorithms.batch import Batch, pack

WORDS = "<unk> <eos> <user> <system> <assistant> say hello you be kind brief a b c".split()
TEMPLATE = (
    "{% for m in messages %}{% if m.role not in ['user', 'system', 'assistant'] %}{{ raise_exception('no such role') }}"
    "{% endif %}<{{ m.role }}> {{ m.content }} {% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer(template: bool = True) -> PreTrainedTokenizerFast:
    """One token a word; w0 to w19 are words too."""
    words = WORDS + [f"w{i}" for i in range(20)]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token="<unk>")
    fast.chat_template = TEMPLATE if template else None
    return fast


def write_jsonl(path: Path, rows: Iterable[object]) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return path


def turn_masks(lengths: Sequence[int], prompt_lengths: Sequence[int]) -> list[list[bool]]:
    """Masks of samples, prompt and response: one turn in even samples; in odd ones, where they are long enough, two
    turns with tokens of an environment between them and at the end."""
    masks = []
    for number, (length, prompt) in enumerate(zip(lengths, prompt_lengths, strict=True)):
        first, second = prompt + max(1, (length - prompt) // 3), length - max(1, (length - prompt) // 4)
        two = number % 2 and second - first >= 2
        gap = {*range(first, first + (second - first) // 2), *range(second, length)} if two else ()
        masks.append([place >= prompt and place not in gap for place in range(length)])
    return masks


def random_batch(seed: int) -> Batch:
    """Eight samples of 3 to 19 tokens, the odd ones of two turns, with random logprobs of a sampler."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 20, (8,), generator=generator).tolist()
    samples = [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]
    batch = pack(samples, turn_masks(lengths, [max(1, n // 3) for n in lengths]))
    return batch.with_(rollout_logprobs=batch.scatter(-4 + torch.randn(len(batch.response), generator=generator) / 10))


def chat(*texts: str) -> list[dict[str, str]]:
    """A dialogue of user and assistant in turns."""
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
