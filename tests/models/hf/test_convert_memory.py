"""Memory of the conversion scripts: always less than three times the largest tensor they meet."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from families import SIZES, same_bits, tensors_of, write_folder
from trialign.engine.parallel.lora import LoRA
from trialign.engine.parallel.shard import Entry
from trialign.engine.storage.checkpoint import write
from trialign.models.families.registry import from_hf_dict, read_config
from trialign.models.folder import assets
from trialign.models.hf.adapter_record import base_digest
from trialign.models.hf.convert import import_checkpoint
from trialign.models.hf.table import hf_shapes
from trialign.models.lora import Choice, adapter_shapes

PEAK = """
import runpy, sys
def run(arguments):
    sys.argv = arguments
    sys.path[0] = arguments[0].rpartition("/")[0]  # as where Python starts the script
    runpy.run_path(arguments[0], run_name="__main__")
def peak():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmHWM"))
small, large = (sys.argv[1:][i :: 2] for i in (0, 1))
run(small)  # imports and caches
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # resets the peak
before = peak()
run(large)
print("peak KB", peak() - before)
"""
MB = 1 << 20
LLAMA = SIZES | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 1}
BAICHUAN2 = LLAMA | {"architectures": ["BaichuanForCausalLM"], "model_type": "baichuan"}
BAICHUAN2 |= {"alibi": False, "norm_head": True}
HEAD = {"hidden_size": 1024, "intermediate_size": 1024, "vocab_size": 16384}
DOWN = {"hidden_size": 1024, "intermediate_size": 16384}


def folder_of(folder: Path, values: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> Path:
    """A folder with this config, filled fast; no two rows of a tensor are equal."""
    tensors = {}
    for name, shape in hf_shapes(from_hf_dict(values)).items():
        numbers = torch.arange(torch.Size(shape).numel()) % 9973 - 4986 + len(name)
        tensors[name] = (numbers / 9973).to(dtype).view(shape)
    return write_folder(folder, values, tensors)


def assert_small(script: str, arguments: tuple[str, ...], root: Path, bound: int = 32 * MB) -> None:
    """Runs a script on `small` and then on `large` ("{}" in its arguments), whose peak stays below three bounds."""
    both = [str(ROOT / "launch" / script)] * 2
    for argument in arguments:
        both += [argument.format(root / size) for size in ("small", "large")]
    result = subprocess.run([sys.executable, "-c", PEAK, *both], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    peak = int(result.stdout.split("peak KB")[1]) << 10
    assert peak < 3 * bound, f"{script}: {peak / bound:.2f} times the largest tensor"


def test_memory_of_many_tensors_and_dtypes(tmp_path):
    """120 MB of weights in files and tensors of at most 32 MB, imported as float32 and exported."""
    folder = folder_of(tmp_path / "large", LLAMA | DOWN | {"vocab_size": 4096})
    folder_of(tmp_path / "small", LLAMA)
    tensors = tensors_of(folder)
    assert max(t.nbytes for t in tensors.values()) == 32 * MB < sum(t.nbytes for t in tensors.values()) / 3.5
    (folder / "model.safetensors").unlink()
    files = {name: f"part{number % 5}.safetensors" for number, name in enumerate(tensors)}
    for file in set(files.values()):
        part = write_folder(tmp_path / "part", {}, {name: tensors[name] for name in tensors if files[name] == file})
        (part / "model.safetensors").rename(folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    importing = ("--model", "{}", "--output", "{}_checkpoint", "--dtype", "float32", "--tp", "2")
    assert_small("import_hf.py", importing, tmp_path)
    exporting = ("--checkpoint", "{}_checkpoint", "--output", "{}_out", "--dtype", "bfloat16")
    assert_small("export_hf.py", exporting, tmp_path, 64 * MB)
    assert same_bits(tensors_of(tmp_path / "large_out"), tensors)


def test_memory_of_a_normalized_head(tmp_path):
    """A Baichuan2's, 32 MB in bfloat16, exported in a wider dtype."""
    for name, values in (("small", BAICHUAN2), ("large", BAICHUAN2 | HEAD)):
        import_checkpoint(folder_of(tmp_path / name, values), tmp_path / f"{name}_checkpoint")
    arguments = ("--checkpoint", "{}_checkpoint", "--output", "{}_out", "--as", "llama", "--dtype", "float32")
    assert_small("export_hf.py", arguments, tmp_path)


@pytest.mark.parametrize(
    ("targets", "quantize", "sizes"), [(("head",), False, HEAD), (("q", "down"), True, DOWN)], ids=["head", "qlora"]
)
def test_memory_of_merged_adapters(targets: tuple[Choice, ...], quantize, sizes, tmp_path):
    lora = LoRA(4, 8.0, targets, quantize=quantize)
    for name, values in (("small", LLAMA | {"hidden_size": 64, "intermediate_size": 64}), ("large", LLAMA | sizes)):
        base = folder_of(tmp_path / f"{name}_base", values)
        shapes = adapter_shapes(read_config(base), lora)
        entries = [Entry(f"actor/master/{n}", s, (0, 0), torch.full(s, 0.1), True) for n, s in shapes.items()]
        record = {key: getattr(lora, key) for key in ("rank", "alpha", "rslora", "quantize")}
        record |= {"targets": list(lora.targets), "base": str(base), "digest": base_digest(base)}
        state = {"adapters": {"actor": record}}
        write(tmp_path / f"{name}_checkpoint", [entries], lambda entry: entry.tensor, state, assets(base, "actor/"))
    assert_small("export_hf.py", ("--checkpoint", "{}_checkpoint", "--output", "{}_out"), tmp_path)
    assert tensors_of(tmp_path / "large_out")["lm_head.weight"].dtype == torch.bfloat16


def test_memory_of_a_gguf_file(tmp_path):
    """8-bit numbers, which become float32: 32 MB of them."""
    from test_gguf import write_gguf  # skips without the optional package gguf

    sizes = {"hidden_size": 1024, "intermediate_size": 8192}
    for name, values in (("small", LLAMA), ("large", LLAMA | sizes)):
        folder = folder_of(tmp_path / name, values, torch.float32)
        write_gguf(tmp_path / f"{name}.gguf", folder, quantized=True)
    assert_small("import_hf.py", ("--model", "{}.gguf", "--output", "{}_checkpoint"), tmp_path)
