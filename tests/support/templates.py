"""Chat templates of the families whose models the project runs, and odd ones, each with a tokenizer it is used with."""

import io
import random
from pathlib import Path
from typing import NamedTuple


class Template(NamedTuple):
    text: str
    special: tuple[str, ...]  # tokens that it writes
    end: str  # of a turn
    tokenizer: str = "bytes"  # byte-level BPE, or sentencepiece with or without a space behind special tokens


CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0].role == 'system' %}{% set loop_messages = messages[1:] %}{% set system = '<<SYS>>\n' +"
    " messages[0].content + '\n<</SYS>>\n\n' %}{% else %}{% set loop_messages = messages %}{% set system = '' %}"
    "{% endif %}{% for m in loop_messages %}{% set content = system + m.content if loop.first else m.content %}"
    "{% if m.role == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% else %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA3 = (
    "{% for m in messages %}{% set content = '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' +"
    " m.content | trim + '<|eot_id|>' %}{{ '<|begin_of_text|>' + content if loop.first else content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MIXTRAL = (
    "{{ bos_token }}{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL3 = (  # the system message stands in the last message of the user
    "{{ '<s>' }}{% set users = messages | selectattr('role', 'equalto', 'user') | list %}"
    "{% for m in messages if m.role != 'system' %}{% if m.role == 'user' %}{{ '[INST] ' }}"
    "{% if m == users[-1] and messages[0].role == 'system' %}{{ messages[0].content + '\n\n' }}{% endif %}"
    "{{ m.content + '[/INST]' }}{% else %}{{ ' ' + m.content + '</s>' }}{% endif %}{% endfor %}"
)
QWEN3 = (  # the reasoning of turns before the user's last message is left out
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{% if m.role != 'assistant' %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% else %}{% set content = m.content %}"
    "{% set thought = '' %}{% if '</think>' in content %}"
    "{% set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{% set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}"
    "{% if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{ '<|im_start|>assistant\n<think>\n' + thought.strip('\n') + '\n</think>\n\n' + content.lstrip('\n') }}"
    "{% else %}{{ '<|im_start|>assistant\n' + content }}{% endif %}"
    "{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
BAICHUAN = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<reserved_106>' + m.content }}{% elif m.role == 'assistant' %}"
    "{{ '<reserved_107>' + m.content + '</s>' }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<reserved_107>' }}{% endif %}"
)


def plain(header: str, prompt: str, end: str = "<|end|>") -> str:
    """Turns with a header that is written in words, and a generation prompt."""
    return (
        f"{{% for m in messages %}}{{{{ m.role + {header!r} + m.content + {end!r} }}}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ {prompt!r} }}}}{{% endif %}}"
    )


IM = ("<|im_start|>", "<|im_end|>")
INST = ("<s>", "</s>")
EOT = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
RESERVED = ("<reserved_106>", "<reserved_107>", "</s>")
TEMPLATES = {
    "SmolLM2, Qwen 1 and 2": Template(CHATML, IM, "<|im_end|>"),
    "Qwen 3": Template(QWEN3, IM, "<|im_end|>"),
    "Llama 3": Template(LLAMA3, EOT, "<|eot_id|>"),
    "Llama 2": Template(LLAMA2, INST, "</s>", "sentencepiece"),
    "Mistral, Mixtral": Template(MIXTRAL, INST, "</s>", "sentencepiece"),
    "Mistral 3": Template(MISTRAL3, INST, "</s>"),
    "Baichuan": Template(BAICHUAN, RESERVED, "</s>", "sentencepiece"),
    "ChatML on sentencepiece": Template(CHATML, IM, "<|im_end|>", "sentencepiece"),
    "a prompt that ends in a space": Template(plain(": ", "assistant: "), ("<|end|>",), "<|end|>"),
    "a prompt that ends within a word": Template(plain("says", "assistantsays"), ("<|end|>",), "<|end|>"),
    "an end in words": Template(plain(": ", "assistant: ", "</s>\n"), (), "</s>", "sentencepiece"),
    "no generation prompt": Template(plain(": ", ""), ("<|end|>",), "<|end|>"),
}


def sentencepiece_model(folder: Path, kind: str = "bpe", **options) -> Path:
    """A sentencepiece model of LLaMA's kind over a few words, 400 pieces."""
    from sentencepiece import SentencePieceTrainer

    words = (
        "the cat sat on a mat dog runs fast hello world naïve café 12 345 你好 世界 align model human prefer".split()
    )
    draw = random.Random(0)
    written = io.BytesIO()
    settings = {
        "vocab_size": 400,
        "byte_fallback": True,
        "character_coverage": 1.0,
        "split_digits": True,
        "hard_vocab_limit": False,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "minloglevel": 2,
    }
    lines = (" ".join(draw.choices(words, k=8)) for _ in range(300))
    SentencePieceTrainer.train(  # pyright: ignore[reportAttributeAccessIssue]
        sentence_iterator=lines, model_writer=written, model_type=kind, **(settings | options)
    )
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.model").write_bytes(written.getvalue())
    return folder
