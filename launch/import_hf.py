"""Writes a Hugging Face folder or a GGUF file as a checkpoint, which runs start from and export_hf.py reads.

    python launch/import_hf.py --model DIR --output CKPT [--tp 2 --pp 4]
    torchrun ... launch/ppo.py --model.path CKPT ...

One process, no GPU; the memory of one tensor. Runs take folders as they are too: a checkpoint saves each rank of a
large model from reading what other ranks hold, and turns what runs do not read (GGUF, a bare tokenizer.model) into
what they do.
"""

from __future__ import annotations

import common.interrupts  # noqa: F401  # isort: skip  (before what takes seconds)

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from trialign.models.hf.convert import import_checkpoint
from trialign.models.hf.tokenizer import read_tokenizer


@dataclass(frozen=True)
class Import:
    model: Path
    """A folder with config.json and safetensors, or a .gguf file (dequantized)."""
    output: Path
    """The checkpoint to write: a new or an empty folder."""
    tp: int = 1
    """Tensor parallelism of the runs to come: each rank finds its part in a file of its own. Others read it too."""
    pp: int = 1
    """Pipeline parallelism of the runs to come, likewise."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """auto keeps every tensor as it is; quantized ones become float32."""


def main(config: Import) -> None:
    dtype = None if config.dtype == "auto" else getattr(torch, config.dtype)
    source, role = import_checkpoint(config.model, config.output, tp=config.tp, pp=config.pp, dtype=dtype)
    print(f"{config.output}: {source.config.architecture} as {role}, files for tp={config.tp} x pp={config.pp}")
    try:
        print(f"tokenizer: {len(read_tokenizer(config.output))} tokens, vocabulary: {source.config.vocab_size}")
    except ValueError as error:
        print(f"its tokenizer's files came along, but runs cannot read them: {error}", file=sys.stderr)


if __name__ == "__main__":
    options = tyro.cli(Import, description=__doc__)
    try:
        main(options)
    except (ValueError, OSError) as error:
        sys.exit(f"import_hf: {error}")
