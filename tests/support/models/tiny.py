"""Small real models for tests: folders made by transformers, and whole tensors put together from many ranks."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from trialign.engine.mesh import Axis
from trialign.engine.parallel.collectives import gather_objects
from trialign.engine.parallel.shard import Entry, Piece, shard_of, sinks
from trialign.models.decoder import Decoder
from trialign.models.hf.table import hf_slices

VOCAB = 96


def tiny_llama(folder: Path, *, tied: bool = True, seed: int = 0, score: bool = False, **changes) -> Path:
    """A random LLaMA with 4 layers, 4 heads and 2 key/value heads as a Hugging Face folder."""
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    sizes: dict[str, Any] = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    sizes |= {"initializer_range": 0.1, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    sizes |= {"num_labels": 1} if score else {"tie_word_embeddings": tied}
    torch.manual_seed(seed)
    kind = LlamaForSequenceClassification if score else LlamaForCausalLM
    kind(LlamaConfig(**(sizes | changes))).save_pretrained(folder)
    return folder


def tiny_tokenizer(folder: Path) -> Path:
    """A tokenizer of single bytes with a chat template, 259 tokens; end of sequence is 2."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    bytes_only = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, [], unk_token="<unk>"))
    bytes_only.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_only.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bytes_only, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}<s>{{ m.role }}: {{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<s>assistant: {% endif %}"
    )
    tokenizer.save_pretrained(folder)
    return folder


def tiny_chat_model(folder: Path, vocab_size: int = 260, **changes) -> Path:
    """`tiny_llama` with `tiny_tokenizer`: all that launch/ppo.py asks of a folder."""
    return tiny_tokenizer(tiny_llama(folder, vocab_size=vocab_size, **changes))


def assemble(entries: Iterable[Entry], world: Axis) -> dict[str, torch.Tensor]:
    """Whole tensors from every rank's owned rectangles; each element must come from exactly one rank."""
    mine = [(e.name, e.global_shape, e.offset, e.tensor.detach().clone()) for e in entries if e.owned]
    wholes: dict[str, torch.Tensor] = {}
    for name, shape, offset, tensor in (entry for rank in gather_objects(mine, world) for entry in rank):
        whole = wholes.setdefault(name, torch.full(shape, float("nan")))
        place = tuple(slice(o, o + n) for o, n in zip(offset, tensor.shape, strict=True))
        assert whole[place].isnan().all(), f"{name}: two ranks own the same numbers"
        whole[place] = tensor
    for name, whole in wholes.items():
        assert not whole.isnan().any(), f"{name}: numbers that no rank owns"
    return wholes


def weight_pieces(model: Decoder) -> Iterator[tuple[str, Piece, Any]]:
    """Every piece of every weight of this stage, adapters left out: (Hugging Face's name, rectangle, numbers).

    The numbers are a view of the parameter, or a `Sink` that quantizes what is copied into it. A tied head that is a
    copy (pp > 1) comes under the embedding's name too.
    """
    slices = hf_slices(model.config, model.kind)
    for name, parameter in model.named_parameters():
        if not shard_of(parameter).adapter:
            yield from ((slices[name, piece.part].name, piece, sink) for piece, sink in sinks(parameter))
