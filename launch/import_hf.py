"""Imports a Hugging Face folder or a GGUF file into a checkpoint, which runs start from and export_hf.py reads.

    python launch/import_hf.py --model DIR --output CKPT [--tp 2 --pp 4]
    torchrun ... launch/ppo.py --model.path CKPT ...

One process, no GPU, one tensor in memory at a time. Runs read Hugging Face folders directly too: in a checkpoint each
rank of a large model reads only its own file, and GGUF files and bare tokenizer.model files become readable for runs.
"""

from __future__ import annotations

import common.interrupts  # noqa: F401  # isort: skip  (handles signals while torch is imported)

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
    """Tensor parallelism of later runs: each rank has a file of its own. Any other layout reads the checkpoint too."""
    pp: int = 1
    """Pipeline parallelism of later runs, likewise."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """auto keeps each tensor's type; quantized ones become float32."""


def main(config: Import) -> None:
    dtype = None if config.dtype == "auto" else getattr(torch, config.dtype)
    source, role = import_checkpoint(config.model, config.output, tp=config.tp, pp=config.pp, dtype=dtype)
    print(f"{config.output}: {source.config.architecture} as {role}, files for tp={config.tp} x pp={config.pp}")
    try:
        print(f"tokenizer: {len(read_tokenizer(config.output))} tokens, vocabulary: {source.config.vocab_size}")
    except ValueError as error:
        print(f"the tokenizer's files were copied, but runs cannot read them: {error}", file=sys.stderr)


if __name__ == "__main__":
    options = tyro.cli(Import, description=__doc__)
    try:
        main(options)
    except (ValueError, OSError) as error:
        sys.exit(f"import_hf: {error}")
