"""Exports served by vLLM, in the environment that `make vllm` makes: tokens as trialign's own generator gives them."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT
from families import shake, write_folder
from peft_case import build, learner
from test_adapter import save
from tiny import tiny_llama
from trialign.engine.mesh import build_mesh
from trialign.engine.parallel.lora import LoRA
from trialign.engine.rollout.generate import Generator, SamplingParams
from trialign.models.adapter import export_adapter
from trialign.models.config import ModelConfig
from trialign.models.decoder import Decoder
from trialign.models.export import export_checkpoint
from trialign.models.hf import hf_shapes, load_hf
from trialign.models.importing import import_checkpoint
from trialign.models.tokenizer import read_tokenizer

VLLM = Path(os.environ.get("TRIALIGN_VLLM_PYTHON", ROOT / ".venv-vllm" / "bin" / "python"))
pytestmark = pytest.mark.skipif(not VLLM.is_file(), reason="vLLM's environment is not there: make vllm")

_BAICHUAN = {
    "vocab_size": 512,
    "hidden_size": 160,  # 5 heads of 32: not a power of two, so the slopes come of both series
    "intermediate_size": 224,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "rms_norm_eps": 1e-6,
    "eos_token_id": 2,
}
# 7B: RoPE, and LLaMA once W_pack is cut; 13B: ALiBi; Baichuan2: NormHead. As their publishers write them.
FOLDERS: dict[str, dict[str, Any]] = {
    "baichuan-7b": _BAICHUAN
    | {"architectures": ["BaiChuanForCausalLM"], "max_position_embeddings": 512, "norm_head": False},
    "baichuan-13b": _BAICHUAN | {"architectures": ["BaichuanForCausalLM"], "model_max_length": 512, "norm_head": False},
    "baichuan2-13b": _BAICHUAN
    | {"architectures": ["BaichuanForCausalLM"], "model_max_length": 512, "z_loss_weight": 0},
}
_numbers = torch.Generator().manual_seed(5)
PROMPTS = [torch.randint(3, 512, (n,), generator=_numbers).tolist() for n in (5, 1, 60, 200)]
CHATS = (
    [{"role": "user", "content": "What is the capital of France?"}],
    [{"role": "user", "content": "Write two sentences about the sea."}],
    [{"role": "user", "content": "你好！12 x 34 = ?"}],
)


def our_tokens(folder: Path, prompts: list[list[int]], count: int) -> list[list[int]]:
    """What trialign's generator answers greedily, in fp32."""
    model = Decoder(ModelConfig.from_hf(folder), build_mesh(), dtype=torch.float32)
    load_hf(model, folder)
    return answers(model, prompts, count)


def answers(model: Decoder, prompts: list[list[int]], count: int) -> list[list[int]]:
    greedy = SamplingParams(temperature=0, max_new_tokens=count)
    completions = Generator(model, model.mesh).generate(prompts, list(range(len(prompts))), greedy)
    return [completion.tokens for completion in completions]


def baichuan(folder: Path, name: str) -> Path:
    values = FOLDERS[name] | {"model_type": "baichuan"}
    shapes = hf_shapes(ModelConfig.from_hf_dict(values))
    tensors = {tensor: torch.empty(shape) for tensor, shape in shapes.items()}
    shake(tensors, seed=3)
    return write_folder(folder, values, tensors)


def adapter(root: Path) -> dict[str, Any]:
    """A small LLaMA with adapters on every linear, as a checkpoint of a LoRA run gives them in PEFT's format."""
    base = tiny_llama(root / "llama", vocab_size=512, hidden_size=128, intermediate_size=256)
    model = build(base, build_mesh(), LoRA(8, 16.0, rslora=True))
    draws = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):  # zero at the start, which changes nothing
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=draws))
    checkpoint = save(learner(model), root / "adapters", base, model.mesh)
    export_adapter(checkpoint, root / "peft")
    job = {"folder": str(base), "adapter": str(root / "peft"), "prompts": PROMPTS, "tokens": 24}
    return job | {"ours": answers(model, PROMPTS, 24), "base": our_tokens(base, PROMPTS, 24)}


@pytest.fixture(scope="module")
def served(smollm2, tmp_path_factory) -> dict[str, dict[str, Any]]:
    """name -> {"folder", "prompts", "ours", "theirs"}: every export, and what both answered. One process serves all."""
    root = tmp_path_factory.mktemp("vllm")
    jobs: dict[str, dict[str, Any]] = {}

    def add(name: str, source: Path, prompts: list[list[int]], count: int, ours: list[list[int]], **options) -> None:
        checkpoint, out = root / f"{name}-checkpoint", root / name
        import_checkpoint(source, checkpoint, tp=options.pop("tp", 1), pp=2)
        export_checkpoint(checkpoint, out, dtype=torch.float32, **options)
        jobs[name] = {"folder": str(out), "prompts": prompts, "tokens": count, "ours": ours}

    template = read_tokenizer(smollm2)
    prompts: Any = [
        template.apply_chat_template(chat, add_generation_prompt=True, return_dict=False, tokenize=True)
        for chat in CHATS
    ]
    add("smollm2", smollm2, prompts, 64, our_tokens(smollm2, prompts, 64), tp=3)
    for name in FOLDERS:
        folder = baichuan(root / f"{name}-source", name)
        ours = our_tokens(folder, PROMPTS, 24)
        add(name, folder, PROMPTS, 24, ours)
        if name == "baichuan-7b":
            add("baichuan-7b-as-llama", folder, PROMPTS, 24, ours, family="llama")
    jobs["adapter"] = adapter(root)
    (root / "jobs.json").write_text(json.dumps(jobs))
    command = [str(VLLM), "-P", str(ROOT / "tests" / "vllm_side.py"), "jobs.json", "answers.json"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    answers = json.loads((root / "answers.json").read_text())
    return {name: job | {"theirs": answers[name]} for name, job in jobs.items()}


def test_smollm2_gives_one_answer_everywhere(served):
    """The real model through a checkpoint of tp=3 x pp=2: trialign, transformers and vLLM, 64 tokens each."""
    from transformers import AutoModelForCausalLM

    job = served["smollm2"]
    assert job["theirs"] == job["ours"], job["theirs"]
    loaded: Any = AutoModelForCausalLM.from_pretrained(job["folder"], output_loading_info=True)
    model, info = loaded
    assert not any(info.values()), info
    for prompt, ours in zip(job["prompts"], job["ours"], strict=True):
        ids = torch.tensor([prompt])
        # The mask in full: left out, transformers takes the ends of turns in the prompt for padding.
        options = {"attention_mask": torch.ones_like(ids), "do_sample": False, "eos_token_id": None}
        out = model.generate(ids, max_new_tokens=64, **options)
        assert out[0, len(prompt) :].tolist() == ours


@pytest.mark.parametrize("name", ["baichuan-7b-as-llama", *FOLDERS])
def test_baichuan_is_served(served, name):
    assert served[name]["theirs"] == served[name]["ours"], served[name]["theirs"]
    assert len({tuple(tokens) for tokens in served[name]["ours"]}) == len(PROMPTS)


def test_an_adapter_is_served(served):
    job = served["adapter"]
    assert job["theirs"] == job["ours"], job["theirs"]
    assert all(with_it != without for with_it, without in zip(job["ours"], job["base"], strict=True))
