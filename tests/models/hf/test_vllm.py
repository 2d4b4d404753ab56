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
from scripts import options, succeed
from test_adapter import save
from tiny import tiny_llama
from trialign.engine.generation.embedded import EmbeddedGenerator
from trialign.engine.generation.interface import SamplingParams
from trialign.engine.mesh import build_mesh
from trialign.engine.parallel.lora import LoRA
from trialign.models.decoder import Decoder
from trialign.models.families.registry import from_hf_dict, read_config
from trialign.models.hf.convert import export_checkpoint, import_checkpoint
from trialign.models.hf.load import load_hf
from trialign.models.hf.peft import export_adapter
from trialign.models.hf.table import hf_shapes
from trialign.models.hf.tokenizer import read_tokenizer
from trialign.models.lora import TARGETS

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
# Heads of 32, the smallest that vLLM's attention for CPUs has.
_SIZES = {"vocab_size": 512, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}
_SIZES |= {"num_attention_heads": 4, "max_position_embeddings": 512, "eos_token_id": 2}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "num_key_value_heads": 2}
# 7B: RoPE, and LLaMA once W_pack is cut; 13B: ALiBi; Baichuan2: NormHead. As their publishers write them.
FOLDERS: dict[str, dict[str, Any]] = {
    "baichuan-7b": _BAICHUAN
    | {"architectures": ["BaiChuanForCausalLM"], "max_position_embeddings": 512, "norm_head": False},
    "baichuan-13b": _BAICHUAN | {"architectures": ["BaichuanForCausalLM"], "model_max_length": 512, "norm_head": False},
    "baichuan2-7b": _BAICHUAN
    | {"architectures": ["BaichuanForCausalLM"], "max_position_embeddings": 512, "z_loss_weight": 0},
    "baichuan2-13b": _BAICHUAN
    | {"architectures": ["BaichuanForCausalLM"], "model_max_length": 512, "z_loss_weight": 0},
}
# As published, without any key that an export adds: what they are is told by vocabulary and positions.
PUBLISHED: dict[str, dict[str, Any]] = {
    "baichuan-13b-published": _BAICHUAN
    | {"architectures": ["BaichuanForCausalLM"], "model_max_length": 512, "vocab_size": 64000},
    "baichuan2-7b-published": FOLDERS["baichuan2-7b"] | {"vocab_size": 64064},
}
QWEN = {
    "architectures": ["QWenLMHeadModel"],
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "kv_channels": 32,
    "no_bias": True,
    "layer_norm_epsilon": 1e-6,
    "seq_length": 512,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
}
# name -> transformers' class, what its config says besides _SIZES; the windows are shorter than the longest prompt
PEERS: dict[str, tuple[str, dict[str, Any]]] = {
    "mistral": ("Mistral", {"sliding_window": 48, "num_key_value_heads": 2}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "num_key_value_heads": 2, "sliding_window": None}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2, "tie_word_embeddings": True}),
    "qwen2-window": (
        "Qwen2",
        {"num_key_value_heads": 4, "use_sliding_window": True, "sliding_window": 48, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {"num_key_value_heads": 2, "head_dim": 32}),
    "qwen2-moe": ("Qwen2Moe", _EXPERTS | {"shared_expert_intermediate_size": 96}),
    "qwen3-moe": ("Qwen3Moe", _EXPERTS | {"head_dim": 32, "norm_topk_prob": True}),
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
    model = Decoder(read_config(folder), build_mesh(), dtype=torch.float32)
    load_hf(model, folder)
    return answers(model, prompts, count)


def answers(model: Decoder, prompts: list[list[int]], count: int) -> list[list[int]]:
    greedy = SamplingParams(temperature=0, max_new_tokens=count)
    completions = EmbeddedGenerator(model, model.mesh).generate(prompts, list(range(len(prompts))), greedy)
    return [completion.tokens for completion in completions]


def random_folder(folder: Path, values: dict[str, Any]) -> Path:
    """Of a config as its publisher writes it."""
    shapes = hf_shapes(from_hf_dict(values))
    tensors = {tensor: torch.empty(shape) for tensor, shape in shapes.items()}
    shake(tensors, seed=3)
    return write_folder(folder, values, tensors)


def peer_folder(folder: Path, name: str) -> Path:
    """As transformers writes it."""
    import transformers

    prefix, changes = PEERS[name]
    model = getattr(transformers, f"{prefix}ForCausalLM")(getattr(transformers, f"{prefix}Config")(**_SIZES | changes))
    shake(dict(model.named_parameters()), seed=3)
    model.save_pretrained(folder)
    return folder


def adapter(root: Path) -> dict[str, Any]:
    """A small LLaMA with adapters on every linear, as a checkpoint of a LoRA run gives them in PEFT's format."""
    base = tiny_llama(root / "llama", vocab_size=512, hidden_size=128, intermediate_size=256)
    model = build(base, build_mesh(), LoRA(8, 16.0, TARGETS, rslora=True))
    draws = torch.Generator().manual_seed(7)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):  # zero at the start, which changes nothing
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=draws))
    checkpoint = save(learner(model), root / "adapters", base, model.mesh)
    export_adapter(checkpoint, root / "peft")
    job = {"folder": str(base), "adapter": str(root / "peft"), "prompts": PROMPTS, "tokens": 24}
    return job | {"ours": answers(model, PROMPTS, 24), "base": our_tokens(base, PROMPTS, 24)}


def tuned_smollm2(source: Path, root: Path) -> dict[str, Any]:
    """The real model as a checkpoint of tp=3 x pp=2, one step of SFT from it on those six ranks, and the export."""
    start, run, out = root / "smollm2-checkpoint", root / "smollm2-run", root / "smollm2"
    succeed("import_hf", "--model", source, "--output", start, "--tp", 3, "--pp", 2)
    rows = root / "rows.jsonl"
    rows.write_text("".join(json.dumps({"prompt": f"{i} + {i}?", "response": f"{2 * i}!"}) + "\n" for i in range(4)))
    layout = options(model_path=start, model_dtype="float32", parallel_tp=3, parallel_pp=2, parallel_device="cpu")
    # A warm-up of the whole run would make its one step a step of nothing.
    knobs = options(data_sources=rows, optimizer_lr=5e-5, optimizer_warmup_ratio=0, update_batch_size=4)
    succeed("sft", *layout, *knobs, *options(run_output=run, run_steps=1, run_show=0, run_log=()), ranks=6)
    succeed("export_hf", "--checkpoint", run / "checkpoints" / "step_1", "--output", out, "--dtype", "float32")
    template = read_tokenizer(source)
    prompts: Any = [
        template.apply_chat_template(chat, add_generation_prompt=True, return_dict=False, tokenize=True)
        for chat in CHATS
    ]
    ours = our_tokens(run / "checkpoints" / "step_1", prompts, 64)
    return {"folder": str(out), "prompts": prompts, "tokens": 64, "ours": ours}


@pytest.fixture(scope="module")
def served(smollm2, tmp_path_factory) -> dict[str, dict[str, Any]]:
    """name -> {"folder", "prompts", "ours", "theirs"}: every export, and what both answered. One process serves all."""
    root = tmp_path_factory.mktemp("vllm")
    jobs: dict[str, dict[str, Any]] = {}

    def add(name: str, source: Path, ours: list[list[int]], **changes) -> None:
        checkpoint, out = root / f"{name}-checkpoint", root / name
        import_checkpoint(source, checkpoint, pp=2)
        export_checkpoint(checkpoint, out, dtype=torch.float32, **changes)
        jobs[name] = {"folder": str(out), "prompts": PROMPTS, "tokens": 24, "ours": ours}

    jobs["smollm2"] = tuned_smollm2(smollm2, root)
    dynamic = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    stretched = tiny_llama(root / "dynamic-source", vocab_size=512, hidden_size=128, rope_parameters=dynamic)
    add("dynamic-ntk", stretched, our_tokens(stretched, PROMPTS, 24))
    for name, values in FOLDERS.items():
        folder = random_folder(root / f"{name}-source", values | {"model_type": "baichuan"})
        ours = our_tokens(folder, PROMPTS, 24)
        add(name, folder, ours)
        if name.endswith("7b"):
            add(f"{name}-as-llama", folder, ours, family="llama")
    for name, values in PUBLISHED.items():
        folder = random_folder(root / name, values | {"model_type": "baichuan"})
        jobs[name] = {"folder": str(folder), "prompts": PROMPTS, "tokens": 24, "ours": our_tokens(folder, PROMPTS, 24)}
    (root / "unlike").mkdir()
    unlike = PUBLISHED["baichuan-13b-published"] | {"model_type": "baichuan", "hidden_size": 5120}
    (root / "unlike" / "config.json").write_text(json.dumps(unlike | {"max_position_embeddings": 4096}))
    jobs["unlike"] = {"folder": str(root / "unlike"), "prompts": PROMPTS, "tokens": 24, "ours": []}
    qwen = random_folder(root / "qwen-source", QWEN)
    add("qwen-as-qwen2", qwen, our_tokens(qwen, PROMPTS, 24), family="qwen2")
    for name in PEERS:
        folder = peer_folder(root / f"{name}-source", name)
        add(name, folder, our_tokens(folder, PROMPTS, 24))
    jobs["adapter"] = adapter(root)
    (root / "jobs.json").write_text(json.dumps(jobs))
    command = [str(VLLM), "-P", str(ROOT / "tests" / "support" / "vllm_side.py"), "jobs.json", "answers.json"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    result = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-2000:] + result.stderr[-4000:]
    answers = json.loads((root / "answers.json").read_text())
    return {name: job | {"theirs": answers[name]} for name, job in jobs.items()}


def test_smollm2_gives_one_answer_everywhere(smollm2, served):
    """The real model, tuned for a step in tp=3 x pp=2: trialign, transformers and vLLM, 64 tokens each."""
    from transformers import AutoModelForCausalLM

    job = served["smollm2"]
    assert job["theirs"] == job["ours"], job["theirs"]
    loaded: Any = AutoModelForCausalLM.from_pretrained(job["folder"], output_loading_info=True)
    model, info = loaded
    assert not any(info.values()), info
    before = AutoModelForCausalLM.from_pretrained(smollm2, dtype=torch.float32).state_dict()
    moved = {name: (tensor - before[name]).abs().max().item() for name, tensor in model.state_dict().items()}
    assert 0 < min(moved.values()) and max(moved.values()) < 1e-4, moved  # by the one step of 5e-5
    for prompt, ours in zip(job["prompts"], job["ours"], strict=True):
        ids = torch.tensor([prompt])
        # The mask in full: left out, transformers takes the ends of turns in the prompt for padding.
        greedy = {"attention_mask": torch.ones_like(ids), "do_sample": False, "eos_token_id": None}
        out = model.generate(ids, max_new_tokens=64, **greedy)
        assert out[0, len(prompt) :].tolist() == ours


def test_dynamic_ntk_turns_by_the_same_angles(served):
    """Up to the trained length, which the longest prompt and its answer stay below."""
    assert served["dynamic-ntk"]["theirs"] == served["dynamic-ntk"]["ours"], served["dynamic-ntk"]["theirs"]


TRANSLATED = ("baichuan-7b-as-llama", "baichuan2-7b-as-llama", "qwen-as-qwen2")


@pytest.mark.parametrize(
    "name", [*TRANSLATED, *FOLDERS, *PUBLISHED, *(name for name in PEERS if name != "qwen2-window")]
)
def test_every_family_is_served(served, name):
    assert served[name]["theirs"] == served[name]["ours"], served[name]["theirs"]
    assert len({tuple(tokens) for tokens in served[name]["ours"]}) == len(PROMPTS)


def test_vllm_itself_refuses_a_window_in_some_layers(served):
    assert "Sliding window for some but all layers is not supported" in served["qwen2-window"]["theirs"]


def test_a_baichuan_that_is_like_none_published_is_refused(served):
    assert "neither a 7B nor a 13B" in served["unlike"]["theirs"], served["unlike"]["theirs"]


def test_an_adapter_is_served(served):
    job = served["adapter"]
    assert job["theirs"] == job["ours"], job["theirs"]
    assert all(with_it != without for with_it, without in zip(job["ours"], job["base"], strict=True))
