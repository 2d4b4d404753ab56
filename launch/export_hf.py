"""Exports a checkpoint's weights as a Hugging Face folder, or its adapters as a PEFT folder.

    python launch/export_hf.py --checkpoint RUN/checkpoints/step_N --output DIR

The folder loads with transformers' from_pretrained and in vLLM; it includes tokenizer, chat template and generation
config. One process, no GPU, the memory of one tensor. Every file of the checkpoint is checked by its checksum.
"""

from __future__ import annotations

import common.interrupts  # noqa: F401  # isort: skip  (handles signals while torch is imported)

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from trialign.models.folder import checkpoint_role
from trialign.models.hf.convert import ExportRole, export_checkpoint
from trialign.models.hf.peft import export_adapter


@dataclass(frozen=True)
class Export:
    checkpoint: Path
    """A checkpoint of a run: RUN/checkpoints/step_N."""
    output: Path
    """The folder to write: a new or an empty one."""
    role: ExportRole | None = None
    """The policy (AutoModelForCausalLM), the critic or the reward model (AutoModelForSequenceClassification with one
    score a token). None: the actor; in a checkpoint without one, its critic or reward model."""
    weights: Literal["master", "ema"] = "master"
    """The trained weights, or their moving average where the run kept one."""
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """auto: the model's type before training; float32 for adapters. A run's masters are float32, which the other types
    round."""
    adapter: bool = False
    """Write a LoRA run's adapters as a PEFT folder, instead of merging them into their base."""
    base: Path | None = None
    """The model to merge adapters into, where it has moved since the run."""
    family: Annotated[Literal["own", "llama", "qwen2"], tyro.conf.arg(name="as")] = "own"
    """Write it as another architecture that computes the same, for programs that lack its own: Baichuan 7B and
    Baichuan2 7B as llama, Qwen 1 as qwen2. Refused where no other computes the same."""


def main(config: Export) -> None:
    role = config.role or checkpoint_role(config.checkpoint) or "actor"
    options: dict[str, Any] = {"role": role, "weights": config.weights}
    if config.dtype != "auto":
        options["dtype"] = getattr(torch, config.dtype)
    family = None if config.family == "own" else config.family
    if config.adapter and family:
        raise ValueError(f"--adapter: not allowed with --as {family}, which translates whole models")
    if config.adapter:
        export_adapter(config.checkpoint, config.output, **options)
    else:
        export_checkpoint(config.checkpoint, config.output, **options, base=config.base, family=family)
    kind = ", adapters" * config.adapter + (f", as {family}" if family else "")
    print(f"{config.output}: {role}, {config.weights}, {config.dtype}{kind}")


if __name__ == "__main__":
    options = tyro.cli(Export, description=__doc__)
    try:
        main(options)
    except (ValueError, OSError) as error:
        sys.exit(f"export_hf: {error}")
