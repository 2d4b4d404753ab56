"""Peak memory of the conversion scripts: less than three times the largest tensor."""

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
run(small)  # imports everything
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # resets the peak
before = peak()
run(large)
print("peak KB", peak() - before)
"""
MB = 1 << 20
LLAMA = SIZES | {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 1}
BAICHUAN2 = LLAMA | {
    "architectures": ["BaichuanForCausalLM"],
    "model_type": "baichuan",
    "alibi": False,
    "norm_head": True,
}
HEAD = {"hidden_size": 1024, "intermediate_size": 1024, "vocab_size": 16384}
DOWN = {"hidden_size": 1024, "intermediate_size": 16384}


def folder_of(folder: Path, values: dict[str, Any], dtype: torch.dtype = torch.bfloat16) -> Path:
    """A folder of this config with cheap numbers, different in each row."""
    tensors = {}
    for name, shape in hf_shapes(from_hf_dict(values)).items():
        numbers = torch.arange(torch.Size(shape).numel()) % 9973 - 4986 + len(name)
        tensors[name] = (numbers / 9973).to(dtype).view(shape)
    return write_folder(folder, values, tensors)


def largest(values: dict[str, Any], bytes_: int) -> int:
    return max(torch.Size(shape).numel() for shape in hf_shapes(from_hf_dict(values)).values()) * bytes_


def adapters(base: Path, checkpoint: Path, lora: LoRA) -> None:
    """A LoRA run's checkpoint of adapters on `base`."""
    shapes = adapter_shapes(read_config(base), lora)
    entries = [Entry(f"actor/master/{n}", s, (0, 0), torch.full(s, 0.1), True) for n, s in shapes.items()]
    record = {key: getattr(lora, key) for key in ("rank", "alpha", "rslora", "quantize")}
    record |= {"targets": list(lora.targets), "base": str(base), "digest": base_digest(base)}
    write(checkpoint, [entries], lambda entry: entry.tensor, {"adapters": {"actor": record}}, assets(base, "actor/"))


def assert_small(script: str, arguments: tuple[str, ...], root: Path, bound: int) -> None:
    """Runs a script on `small` and then on `large` ("{}" in its arguments), with a peak of less than three bounds."""
    both = [str(ROOT / "launch" / script)] * 2
    for argument in arguments:
        both += [argument.format(root / size) for size in ("small", "large")]
    result = subprocess.run([sys.executable, "-c", PEAK, *both], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    peak = int(result.stdout.split("peak KB")[1]) << 10
    assert peak < 3 * bound, f"{script}: {peak / bound:.2f} times the largest tensor"


def test_import_and_export_of_many_tensors(tmp_path):
    """250 MB of weights in tensors of at most 32 MB, sharded."""
    sizes = {"hidden_size": 1024, "intermediate_size": 8192, "num_hidden_layers": 2, "vocab_size": 4096}
    values = LLAMA | sizes
    folder, bound = folder_of(tmp_path / "large", values, torch.float32), largest(values, 4)
    folder_of(tmp_path / "small", LLAMA | {"num_hidden_layers": 2}, torch.float32)
    tensors = tensors_of(folder)
    assert bound == 32 * MB and sum(4 * t.numel() for t in tensors.values()) > 7 * bound
    (folder / "model.safetensors").unlink()
    places = {name: f"part{number % 5}.safetensors" for number, name in enumerate(tensors)}
    for file in set(places.values()):
        write_folder(folder, values, {name: tensors[name] for name, place in places.items() if place == file})
        (folder / "model.safetensors").rename(folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    layout = ("--tp", "2", "--pp", "2")
    assert_small("import_hf.py", ("--model", "{}", "--output", "{}_checkpoint", *layout), tmp_path, bound)
    exporting = ("--checkpoint", "{}_checkpoint", "--output", "{}_out", "--dtype", "float32")
    assert_small("export_hf.py", exporting, tmp_path, bound)
    assert same_bits(tensors_of(tmp_path / "large_out"), tensors)


def test_conversion_to_a_wider_dtype_and_a_normalized_head(tmp_path):
    """A Baichuan2 in bfloat16, imported and exported in float32; its tensors have up to 32 MB before."""
    for name, values in (("small", BAICHUAN2), ("large", BAICHUAN2 | HEAD)):
        folder_of(tmp_path / name, values)
        import_checkpoint(tmp_path / name, tmp_path / f"{name}_narrow")
    bound, wide = largest(BAICHUAN2 | HEAD, 2), ("--dtype", "float32")
    assert_small("import_hf.py", ("--model", "{}", "--output", "{}_wide", *wide), tmp_path, bound)
    exporting = ("--checkpoint", "{}_narrow", "--output", "{}_out", "--as", "llama", *wide)
    assert_small("export_hf.py", exporting, tmp_path, bound)


@pytest.mark.parametrize(
    ("targets", "quantize", "sizes"), [(("head",), False, HEAD), (("q", "down"), True, DOWN)], ids=["head", "qlora"]
)
def test_export_of_merged_adapters(targets: tuple[Choice, ...], quantize, sizes, tmp_path):
    lora = LoRA(4, 8.0, targets, quantize=quantize)
    for name, values in (("small", LLAMA | {"hidden_size": 64, "intermediate_size": 64}), ("large", LLAMA | sizes)):
        base = folder_of(tmp_path / f"{name}_base", values)
        adapters(base, tmp_path / f"{name}_checkpoint", lora)
    arguments = ("--checkpoint", "{}_checkpoint", "--output", "{}_out")
    assert_small("export_hf.py", arguments, tmp_path, largest(LLAMA | sizes, 2))
    assert tensors_of(tmp_path / "large_out")["lm_head.weight"].dtype == torch.bfloat16


def test_import_of_a_gguf_file(tmp_path):
    """8-bit weights, 32 MB of them in float32."""
    from test_gguf import write_gguf  # skips without the optional package gguf

    sizes = {"hidden_size": 1024, "intermediate_size": 8192}
    for name, values in (("small", LLAMA), ("large", LLAMA | sizes)):
        write_gguf(tmp_path / f"{name}.gguf", folder_of(tmp_path / name, values, torch.float32), "llama", True)
    arguments = ("--model", "{}.gguf", "--output", "{}_checkpoint")
    assert_small("import_hf.py", arguments, tmp_path, largest(LLAMA | sizes, 4))
