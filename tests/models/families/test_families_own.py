"""Qwen 1 and Baichuan, which transformers lacks, against a plain float64 reference of their papers.

The reference is independent of trialign: it reads the published tensors, and applies the formulas head by head.
"""

import json
import math
from functools import cache, reduce
from pathlib import Path
from typing import Any

import pytest
import torch
from families import OWN, random_folder, tiny_family
from family_run import LONG, NEW_TOKENS, PROMPTS, as_trialign, assert_agrees, assert_same, rank_scores, room_for
from harness import run_ranks
from peft_case import build
from safetensors.torch import load_file
from torch import Tensor
from trialign.engine.generation.embedded import EmbeddedGenerator
from trialign.engine.generation.interface import SamplingParams
from trialign.engine.mesh import build_mesh
from trialign.models.config import ModelConfig
from trialign.models.families.registry import from_hf_dict, read_config, to_hf_dict
from trialign.models.rope import alibi_slopes

Weights = dict[str, Tensor]


def rms(x: Tensor, weight: Tensor) -> Tensor:
    return x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def rotated(x: Tensor, trained: int | None) -> Tensor:
    """RoFormer's rotation of [length, d] at positions 0, 1, ...: entry i with entry i + d/2, base 10000; under Qwen's
    dynamic NTK the base grows by alpha^(d/(d-2)), where alpha + 1 is the power of two from twice length/trained on."""
    length, d = x.shape
    alpha = 1
    while trained is not None and alpha + 1 < 2 * length / trained:
        alpha = 2 * alpha + 1
    base = 10000 * alpha ** (d / (d - 2))
    places, (a, b) = torch.arange(length, dtype=torch.float64), x.chunk(2, 1)
    angle = torch.stack([places / base ** (2 * i / d) for i in range(d // 2)], 1)
    return torch.cat((a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()), 1)


def attention(
    q: Tensor, k: Tensor, v: Tensor, slope: float | None, log_base: int | None, trained: int | None = None
) -> Tensor:
    """Causal attention of one head, [length, d] each, row by row."""
    if slope is None:
        q, k = rotated(q, trained), rotated(k, trained)
    rows = []
    for i in range(len(q)):
        query = q[i] * (math.log(i + 1, log_base) if log_base is not None and i + 1 > log_base else 1.0)
        scores = k[: i + 1] @ query / math.sqrt(q.shape[1])
        if slope is not None:
            scores = scores - slope * torch.arange(i, -1, -1)
        rows.append(scores.softmax(0) @ v[: i + 1])
    return torch.stack(rows)


def paper_slopes(heads: int) -> list[float]:
    """ALiBi, section 3: a geometric sequence; else that of the lower power of two, then every other one of the next."""
    if math.log2(heads).is_integer():
        start = 2 ** (-(2 ** -(math.log2(heads) - 3)))
        return [start * start**i for i in range(heads)]
    below = 2 ** math.floor(math.log2(heads))
    return paper_slopes(below) + paper_slopes(2 * below)[0::2][: heads - below]


# Qwen 1's names -> Baichuan's.
NAMES = {
    **{"transformer.wte": "model.embed_tokens", "transformer.h": "model.layers", "transformer.ln_f": "model.norm"},
    **{"ln_1": "input_layernorm", "attn.c_attn": "self_attn.W_pack", "attn.c_proj": "self_attn.o_proj"},
    **{"ln_2": "post_attention_layernorm", "mlp.w1": "mlp.up_proj", "mlp.w2": "mlp.gate_proj"},
    **{"mlp.c_proj": "mlp.down_proj"},
}


def reference_logits(weights: Weights, config: dict[str, Any], tokens: list[int]) -> Tensor:
    """[length, vocab], by Qwen's technical report, section 2.3, and Baichuan 2's, sections 2.3 and 2.6."""
    w = {reduce(lambda name, old: name.replace(old, NAMES[old]), NAMES, name): t for name, t in weights.items()}
    heads, alibi = config["num_attention_heads"], "model_max_length" in config
    slopes = paper_slopes(heads) if alibi else [None] * heads
    log_base = config["seq_length"] if config.get("use_logn_attn") else None
    trained = config["seq_length"] if config.get("use_dynamic_ntk") else None
    x = w["model.embed_tokens.weight"][tokens]
    for i in range(config["num_hidden_layers"]):
        name = f"model.layers.{i}."
        fused = rms(x, w[name + "input_layernorm.weight"]) @ w[name + "self_attn.W_pack.weight"].T
        fused = fused + w.get(name + "self_attn.W_pack.bias", 0)
        q, k, v = (part.reshape(len(tokens), heads, -1) for part in fused.chunk(3, -1))
        out = [attention(q[:, h], k[:, h], v[:, h], slopes[h], log_base, trained) for h in range(heads)]
        x = x + torch.cat(out, -1) @ w[name + "self_attn.o_proj.weight"].T
        y = rms(x, w[name + "post_attention_layernorm.weight"])
        gate, up = (y @ w[f"{name}mlp.{part}_proj.weight"].T for part in ("gate", "up"))
        x = x + (gate / (1 + (-gate).exp()) * up) @ w[name + "mlp.down_proj.weight"].T
    head = w["lm_head.weight"]
    if "z_loss_weight" in config:
        head = head / head.pow(2).sum(1, keepdim=True).sqrt()
    return rms(x, w["model.norm.weight"]) @ head.T


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("own")
    return {name: tiny_family(root / name, name) for name in OWN}


# Trained on 8 positions: documents of 2 to 40 tokens have four different bases, and log-n attention past the eighth.
STRETCHED = OWN["qwen"] | {"seq_length": 8}


@cache
def reference(name: str, folder: Path) -> tuple[Tensor, Weights, list[list[int]]]:
    """Logits [tokens, vocab], gradients of the mean logprob by name, greedy tokens."""
    weights = {key: t.double().requires_grad_() for key, t in load_file(folder / "model.safetensors").items()}
    values, prompts = (STRETCHED, LONG) if name == "stretched" else (OWN[name], PROMPTS)
    logits = [reference_logits(weights, values, prompt) for prompt in prompts]
    picked = [part[:-1].log_softmax(-1)[range(len(p) - 1), p[1:]] for part, p in zip(logits, prompts, strict=True)]
    (-torch.cat(picked).mean()).backward()
    with torch.no_grad():
        completions = []
        for prompt in room_for(read_config(folder), prompts)[:2]:
            tokens = list(prompt)
            for _ in range(NEW_TOKENS):
                tokens.append(int(reference_logits(weights, values, tokens)[-1].argmax()))
            completions.append(tokens[len(prompt) :])
    return torch.cat(logits).detach(), {key: w.grad for key, w in weights.items() if w.grad is not None}, completions


# Six heads: not a power of two, so ALiBi has slopes of both series; uneven over tp=4.
@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (4, 1), (2, 2)])
def test_published_models_equal_the_reference(folders, tp, pp):
    for name, got in as_trialign(folders, tp, pp).items():
        assert_agrees(got, *reference(name, folders[name]), name)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 2)])
def test_qwen_past_its_trained_length_equals_the_reference(tmp_path, tp, pp):
    folder = random_folder(tmp_path / "stretched", STRETCHED)
    got = as_trialign({"stretched": folder}, tp, pp, prompts=LONG)["stretched"]
    logits, gradients, _ = reference("stretched", folder)
    assert_agrees(got, logits, gradients, [], "stretched")


def test_alibi_slopes_equal_the_papers():
    for heads in (1, 2, 6, 8, 12, 32, 40):
        torch.testing.assert_close(alibi_slopes(heads).double(), torch.tensor(paper_slopes(heads)).double())


def test_dynamic_ntk_sampling_is_bounded_by_trained_length(folders):
    """Rotations depend on the final length, known only in scoring and training."""
    model = build(folders["qwen"], build_mesh())
    with pytest.raises(ValueError, match="sample 0 has 60 tokens, with max_new_tokens=5"):
        EmbeddedGenerator(model, model.mesh).generate([[5] * 60], [0], SamplingParams(max_new_tokens=5))


def test_normalized_head_is_cached_only_during_generation(folders):
    model = build(folders["baichuan2-7b"], build_mesh())
    assert model.head is not None
    generator, params = EmbeddedGenerator(model, model.mesh), SamplingParams(temperature=0, max_new_tokens=12)
    before = generator.generate(PROMPTS, list(range(4)), params)
    with torch.no_grad():
        model.head.weight.mul_(2)  # the same normalized rows, to the bit
        assert generator.generate(PROMPTS, list(range(4)), params) == before
        model.head.weight.copy_(model.head.weight.flip(0))
    assert generator.generate(PROMPTS, list(range(4)), params) != before
    torch.testing.assert_close(model.head_weight().norm(dim=1), torch.ones(101))
    assert model.head_weight().requires_grad


def test_critic_scores_equal_the_reference(folders):
    """The head is one plain row, also where the language model has a normalized head."""
    alone, (cut, other) = run_ranks(rank_scores, 1, folders)[0], run_ranks(rank_scores, 2, folders)
    draws = torch.randn(1, 48, generator=torch.Generator().manual_seed(0)) / 49
    for name, folder in folders.items():
        weights = {key: t.double() for key, t in load_file(folder / "model.safetensors").items()}
        weights["lm_head.weight"] = draws.double()
        plain = {key: value for key, value in OWN[name].items() if key != "z_loss_weight"}
        expected = torch.stack([reference_logits(weights, plain, prompt)[-1, 0] for prompt in PROMPTS])
        for scores in (alone[name], cut[name], other[name]):
            assert_same(scores, expected, name)


_7B, _13B = ({"hidden_size": size} for size in (4096, 5120))
PUBLISHED: dict[str, dict[str, Any]] = {  # config.json of the publishers, without what decides nothing
    "7B": _7B | {"architectures": ["BaiChuanForCausalLM"], "max_position_embeddings": 4096},
    "13B": _13B | {"architectures": ["BaichuanForCausalLM"], "model_max_length": 4096},
}
PUBLISHED |= {
    "2-7B": PUBLISHED["13B"] | _7B | {"max_position_embeddings": 4096, "vocab_size": 125696},
    "2-13B": PUBLISHED["13B"] | {"vocab_size": 125696, "z_loss_weight": 0},
}


def baichuan_config(values: dict[str, Any]) -> ModelConfig:
    sizes = {"num_attention_heads": values["hidden_size"] // 128, "num_hidden_layers": 2, "intermediate_size": 128}
    return from_hf_dict({"vocab_size": 64000} | sizes | values)


@pytest.mark.parametrize(
    ("name", "alibi", "norm_head"),
    [("7B", False, False), ("13B", True, False), ("2-7B", False, True), ("2-13B", True, True)],
)
def test_published_baichuan_models_are_recognized(name, alibi, norm_head):
    config = baichuan_config(PUBLISHED[name])
    assert (config.alibi, config.norm_head, config.max_positions) == (alibi, norm_head, 4096)
    written = json.loads(json.dumps(to_hf_dict(config)))
    assert from_hf_dict(written) == config
    bare = {key: value for key, value in written.items() if key not in ("alibi", "norm_head")}
    assert from_hf_dict(bare).alibi == config.alibi


def test_ambiguous_or_unsupported_configs_are_refused():
    for name, changes, message in (
        ("7B", {"hidden_size": 5120}, "hidden_size=5120.*BaiChuanForCausalLM: neither a 7B .* nor a 13B"),
        ("13B", {"hidden_size": 4096}, "hidden_size=4096, max_position_embeddings=None.*key alibi to true or false"),
        ("13B", {"model_max_length": None}, "neither a 7B"),
        ("2-7B", {"vocab_size": 125700}, "vocab_size=125700 and z_loss_weight=None: neither Baichuan .* norm_head"),
        ("13B", {"z_loss_weight": 0}, "vocab_size=64000 and z_loss_weight=0: neither"),
        ("7B", {"num_key_value_heads": 4}, "num_key_value_heads=4"),
        ("7B", {"norm_head": "no"}, "norm_head='no'"),
    ):
        with pytest.raises(ValueError, match=message):
            baichuan_config(PUBLISHED[name] | changes)
    qwen: tuple[dict[str, Any], ...] = ({"intermediate_size": 71}, {"rotary_pct": 0.5})
    for changes in (*qwen, {"no_bias": False}, {"use_dynamic_ntk": 1}):
        ((key, value),) = changes.items()
        with pytest.raises(ValueError, match=f"{key}={value}"):
            from_hf_dict(OWN["qwen"] | changes)
