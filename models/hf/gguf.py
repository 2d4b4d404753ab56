"""GGUF files of llama.cpp as a source of weights, config and tokenizer.

Tensors are as in Hugging Face folders, except q and k in files of architecture "llama": there the rows of the two
halves of each head, as rotate_half pairs them, are interleaved.
"""

from __future__ import annotations

import mmap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence
from torch import Tensor

from ..families.registry import from_hf_dict
from .table import TensorSlice, check_layer_count, check_tensors, hf_shapes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# general.architecture -> Hugging Face's architecture, and whether q and k are interleaved.
_ARCHITECTURES = {
    "llama": ("LlamaForCausalLM", True),
    "qwen2": ("Qwen2ForCausalLM", False),
    "qwen3": ("Qwen3ForCausalLM", False),
}
# Keys after the architecture's name -> config.json's.
_KEYS = {
    "block_count": "num_hidden_layers",
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "rope.freq_base": "rope_theta",
}
_NEUTRAL: dict[str, tuple[Any, ...]] = {  # keys without a counterpart in config.json -> values without effect
    "rope.scaling.type": ("none",),
    "attention.causal": (True,),
    **{f"attention.{key}": (0,) for key in ("sliding_window", "sliding_window_pattern", "scale", "clamp_kqv")},
    **dict.fromkeys(("expert_count", "attention.max_alibi_bias"), (0,)),
    **dict.fromkeys(("rope.scaling.factor", "rope.scale_linear"), (0, 1)),
    **dict.fromkeys(("embedding_scale", "residual_scale", "logit_scale"), (0, 1)),
}
_TOKENS = {"bos": "bos", "padding": "pad"}
_ROWS = 1024  # dequantized at once


def _reader(gguf: Any, path: Path) -> Any:
    """gguf's GGUFReader with an attribute `unknown`, tensor -> number of its type where gguf lacks the type.

    GGUFReader itself refuses such a file without naming the tensor.
    """
    named = {int(kind) for kind in gguf.GGMLQuantizationType}

    class Reader(gguf.GGUFReader):
        unknown: dict[str, int] = {}

        def _build_tensors(self, start_offs: int, fields: list[Any]) -> None:
            kinds = {field.name: int(field.parts[4][0]) for field in fields}
            self.unknown = {name: kind for name, kind in kinds.items() if kind not in named}
            super()._build_tensors(start_offs, [field for field in fields if field.name not in self.unknown])

    return Reader(path)


class GGUFFile:
    """Source: one GGUF file of a dense LLaMA, Mistral, Qwen2 or Qwen3.

    Raises:
        ValueError: the package gguf is not installed, the file is corrupt or of another architecture, or a tensor is
            missing, unknown, of another shape or of a type that gguf cannot dequantize.
    """

    def __init__(self, path: Path):
        try:
            import gguf  # optional dependency
        except ImportError:
            raise ValueError(f"{path}: GGUF files need the package gguf: pip install gguf") from None
        if not path.is_file():
            raise ValueError(f"{path}: no such file")
        try:
            self.reader: Any = _reader(gguf, path)
        except (ValueError, IndexError) as error:
            raise ValueError(f"{path}: corrupt, or not a GGUF file: {error}") from None
        self.path, self.gguf = path, gguf
        self._check_types()
        self.architecture = self._value("general.architecture")
        if self.architecture not in _ARCHITECTURES:
            raise ValueError(
                f"{path}: general.architecture={self.architecture}: allowed: {', '.join(_ARCHITECTURES)}; import the"
                " folder in Hugging Face format instead"
            )
        family, self.interleaved = _ARCHITECTURES[self.architecture]
        self.tensors = {tensor.name: tensor for tensor in self.reader.tensors}
        try:
            self.config = from_hf_dict(self._values() | {"architectures": [family]})
            dims = self._value(f"{self.architecture}.rope.dimension_count")
            if dims not in (None, self.config.head_dim):
                raise ValueError(
                    f"{self.architecture}.rope.dimension_count={dims} is not supported; allowed: the head_dim,"
                    f" {self.config.head_dim}"
                )
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        arch = next(key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == self.architecture)
        check_layer_count(self.config, self.tensors, path)
        names = gguf.get_tensor_name_map(arch, self.config.num_layers)
        self.names = {n: names.get_name(n, try_suffixes=(".weight", ".bias")) or n for n in hf_shapes(self.config)}
        self._check()

    def _check_types(self) -> None:
        readable = [kind for kind in self.gguf.GGMLQuantizationType if self._readable(kind)]
        kinds = {tensor.name: tensor.tensor_type for tensor in self.reader.tensors}
        for name, kind in (self.reader.unknown | kinds).items():
            if kind not in readable:
                allowed = ", ".join(kind.name for kind in readable)
                raise ValueError(
                    f"{self.path}: {name} is {getattr(kind, 'name', f'of type {kind}')}, which gguf cannot dequantize;"
                    f" allowed: {allowed}"
                )

    def _readable(self, kind: Any) -> bool:
        """Whether gguf dequantizes this type: tried on one block, as there is no public list."""
        _, size = self.gguf.GGML_QUANT_SIZES[kind]
        try:
            self.gguf.quants.dequantize(np.zeros((1, size), dtype=np.uint8), kind)
        except NotImplementedError:
            return False
        return True

    def _value(self, key: str) -> Any:
        """Value of a key; None where absent."""
        field = self.reader.fields.get(key)
        return None if field is None else field.contents()

    def _values(self) -> dict[str, Any]:
        """Content of a config.json."""
        value_of = self._value
        for key, neutral in _NEUTRAL.items():
            value = value_of(f"{self.architecture}.{key}")
            if value not in (None, *neutral):
                raise ValueError(
                    f"{self.architecture}.{key}={value} is not supported; import the model's folder instead"
                )
        values = {hf_key: value_of(f"{self.architecture}.{key}") for key, hf_key in _KEYS.items()}
        values |= {f"{name}_token_id": value_of(f"tokenizer.ggml.{key}_token_id") for key, name in _TOKENS.items()}
        # A chat model's response ends with the end of the turn or of the text.
        ends = [value_of(f"tokenizer.ggml.{key}_token_id") for key in ("eos", "eot")]
        values["eos_token_id"] = list(dict.fromkeys(i for i in ends if i is not None)) or None
        if "token_embd.weight" not in self.tensors:
            raise ValueError("lacks token_embd.weight")
        values["vocab_size"] = int(self.tensors["token_embd.weight"].shape[-1])
        values["tie_word_embeddings"] = "output.weight" not in self.tensors
        return {key: value for key, value in values.items() if value is not None}

    def _check(self) -> None:
        if "rope_freqs.weight" in self.tensors:
            raise ValueError(
                f"{self.path}: rope_freqs.weight: the rope scaling (Llama 3.1 and later) is not recorded in the file;"
                " import the folder in Hugging Face format instead"
            )
        expected = {self.names[name]: shape for name, shape in hf_shapes(self.config).items()}
        found = {name: tuple(int(n) for n in reversed(tensor.shape)) for name, tensor in self.tensors.items()}
        check_tensors(self.path, expected, found)

    def dtype(self, part: TensorSlice) -> torch.dtype:
        kinds = self.gguf.GGMLQuantizationType
        own = {kinds.F16: torch.float16, kinds.BF16: torch.bfloat16}
        return own.get(self.tensors[self.names[part.tensor]].tensor_type, torch.float32)

    def read(self, part: TensorSlice, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        tensor = self.tensors[self.names[part.tensor]]
        stored = tensor.data if len(shape) == 2 else tensor.data[None]
        rows = np.arange(offset[0], offset[0] + shape[0]) if len(shape) == 2 else np.zeros(1, dtype=np.int64)
        if self.interleaved and part.tensor.endswith(("q_proj.weight", "k_proj.weight")):
            head, row = np.divmod(rows, self.config.head_dim)
            half, pair = np.divmod(row, self.config.head_dim // 2)
            rows = head * self.config.head_dim + 2 * pair + half
        columns = slice(offset[-1], offset[-1] + shape[-1])
        out = torch.empty((len(rows), shape[-1]), dtype=self.dtype(part))
        for start in range(0, len(rows), _ROWS):
            raw = np.ascontiguousarray(stored[rows[start : start + _ROWS]])
            values = self.gguf.quants.dequantize(raw, tensor.tensor_type)
            out[start : start + _ROWS] = torch.from_numpy(values[:, columns].astype(np.float32))
        # The file is memory-mapped: its pages count as memory of this process once read.
        self.reader.data._mmap.madvise(mmap.MADV_DONTNEED)
        return out.view(shape)

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The file's tokenizer as transformers reads it, plus SmolLM's split into single digits, which it does not."""
        from transformers import AutoTokenizer  # takes seconds

        try:
            tokenizer: Any = AutoTokenizer.from_pretrained(str(self.path.parent), gguf_file=self.path.name)
        except Exception as error:  # of any type in the tokenizers library, without the file's name
            raise ValueError(f"{self.path}: no tokenizer can be read from it: {error}") from error
        if self._value("tokenizer.ggml.pre") == "smollm":
            tokenizer.backend_tokenizer.pre_tokenizer = Sequence(
                [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
            )
        return tokenizer
