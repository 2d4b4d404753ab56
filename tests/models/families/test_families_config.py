"""config.json of every family: read, written, read and written by transformers, and refused."""

import dataclasses
import json
import math
import re
from typing import Any

import pytest
import torch
from families import ALL, PEERS, SIZES, peer_config, values_of
from transformers import AutoConfig
from trialign.models.config import ModelConfig
from trialign.models.families.registry import FAMILIES, family_of, from_hf_dict, head_of, read_config, to_hf_dict
from trialign.models.rope import Rope

LLAMA, MISTRAL, MIXTRAL, QWEN2 = (f"{name}ForCausalLM" for name in ("Llama", "Mistral", "Mixtral", "Qwen2"))


def config_of(architecture: str | None = LLAMA, **changes: Any) -> ModelConfig:
    return from_hf_dict(SIZES | {"architectures": [architecture]} | changes)


@pytest.mark.parametrize("head", ["lm", "score"])
@pytest.mark.parametrize("name", ALL)
def test_config_round_trips_also_through_transformers(name, head, tmp_path, caplog):
    config = from_hf_dict(values_of(name))
    values = json.loads(json.dumps(to_hf_dict(config, head)))
    again, tied = from_hf_dict(values), config.tie_embeddings and head == "lm"
    assert head_of(again) == head and family_of(again) is family_of(config)
    assert again == dataclasses.replace(config, architecture=again.architecture, tie_embeddings=tied)
    assert head == "score" or again == config
    if name not in PEERS:
        return
    (tmp_path / "config.json").write_text(json.dumps(values))
    peer = AutoConfig.from_pretrained(tmp_path)
    assert type(peer) is type(peer_config(name)) and peer.dtype == torch.bfloat16
    assert peer.tie_word_embeddings == tied
    assert not [record for record in caplog.records if "rope" in record.getMessage()]  # warnings of unknown keys
    peer.save_pretrained(tmp_path)
    assert read_config(tmp_path) == again
    original = peer_config(name).to_dict()
    keys = ["rope_parameters", "layer_types", "num_key_value_heads", "attention_bias"]
    for key in keys + ["sliding_window"] * original.get("use_sliding_window", True):
        if original.get(key) is not None:
            assert getattr(peer, key) == original[key], key


def test_architecture_names_are_unique_and_several_ends_kept():
    names = [name for family in FAMILIES for name in family.architectures]
    assert len(names) == len(set(names))
    several = config_of(eos_token_id=[2, 5])
    assert several.eos_ids == (2, 5) and config_of(**to_hf_dict(several)) == several


LINEAR = {"type": "linear", "factor": 2}
YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0}
LLAMA3 = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
ORIGINAL = "original_max_position_embeddings"


@pytest.mark.parametrize(
    ("keys", "rope", "theta", "longest"),
    [  # max_position_embeddings is 64: the trained length, or the extended one
        ({}, Rope(), 1e4, 64),
        ({"rope_theta": 7e4, "rope_scaling": {"type": "default"}}, Rope(), 7e4, 64),
        ({"rope_parameters": {"rope_theta": 8e4, "rope_type": "default"}}, Rope(), 8e4, 64),
        ({"rope_theta": 5e5, "rope_scaling": LINEAR}, Rope("linear", 2.0), 5e5, 128),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, Rope("dynamic", 4.0, 64), 1e4, 64),
        ({"rope_scaling": YARN | {ORIGINAL: 16}}, Rope("yarn", 4.0, 16), 1e4, 64),
        ({"rope_scaling": YARN | {"factor": 8.0}, ORIGINAL: 16}, Rope("yarn", 8.0, 16), 1e4, 128),
        ({"rope_parameters": YARN}, Rope("yarn", 4.0, 64), 1e4, 256),
        ({"rope_theta": 5e5, "rope_scaling": LLAMA3 | {ORIGINAL: 8192}}, Rope("llama3", 32.0, 8192), 5e5, 64),
        # both sections, as transformers 5 and trialign write them
        ({"rope_parameters": LINEAR | {"rope_theta": 3e4}, "rope_scaling": LINEAR, "rope_theta": 3e4},)
        + (Rope("linear", 2.0), 3e4, 128),
    ],
)
def test_rope_scaling_keys_old_and_new(keys, rope, theta, longest):
    config = config_of(**keys)
    assert (config.rope, config.rope_theta, config.longest_rollout) == (rope, theta, longest)
    assert config.longest_document == (math.inf if rope.kind == "dynamic" else longest)
    assert config_of(**to_hf_dict(config)) == config


@pytest.mark.parametrize(
    ("keys", "window", "full"),
    [
        ({"use_sliding_window": False, "sliding_window": 9, "max_window_layers": 0}, None, ()),
        ({"sliding_window": 9, "max_window_layers": 4}, None, ()),
        ({"sliding_window": None, "max_window_layers": 1}, None, ()),
        ({"max_window_layers": 3}, 4096, (0, 1, 2)),
        ({"sliding_window": 9, "max_window_layers": 0}, 9, ()),
        ({"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"] * 2}, 9, (1, 3)),
    ],
)
def test_qwen2_windows_by_layer(keys, window, full):
    config = config_of(QWEN2, **{"use_sliding_window": True} | keys)
    assert (config.window, config.full_layers) == (window, full)
    assert [config.window_of(i) for i in range(4)] == [None if i in full else window for i in range(4)]


def test_absent_keys_have_transformers_defaults():
    for architecture, expected in (
        (MISTRAL, {"window": 4096, "num_kv_heads": 8}),
        ("Qwen3ForCausalLM", {"head_dim": 128, "qkv_bias": False, "qk_norm": True}),
        (QWEN2, {"qkv_bias": True, "output_bias": False, "window": None}),
        (MIXTRAL, {"norm_eps": 1e-5, "rope_theta": 1e6, "window": None}),
    ):
        config = config_of(architecture, num_attention_heads=8)
        assert {key: getattr(config, key) for key in expected} == expected


INVALID = [  # architecture, key, invalid values: the message has key and value
    (LLAMA, "rope_theta", [math.inf, math.nan, 0, "1"]),
    (LLAMA, "hidden_act", ["gelu"]),
    (LLAMA, "attention_bias", ["yes"]),
    (LLAMA, "sliding_window", [4096]),
    (LLAMA, "quantization_config", [{"bits": 4}]),
    (LLAMA, "hidden_size", ["32", 0, True]),
    (LLAMA, "num_key_value_heads", [3]),
    (LLAMA, "head_dim", [7]),
    (LLAMA, "eos_token_id", [[2, 10**6], True, ["x"]]),
    (LLAMA, "pad_token_id", [96]),
    (MISTRAL, "attention_bias", [True]),
    (MISTRAL, "sliding_window", [0]),
    (MIXTRAL, "router_jitter_noise", [0.1]),
    (MIXTRAL, "router_aux_loss_coef", [-0.1]),
]
WINDOWED: dict[str, Any] = {"use_sliding_window": True}
CONTRADICTIONS: list[tuple[str | None, dict[str, Any], str]] = [
    ("GPT2LMHeadModel", {}, "architectures=.*GPT2.*allowed: LlamaForCausalLM, LlamaForSeq"),
    (LLAMA, {"hidden_size": None}, "hidden_size is missing"),
    (LLAMA, {"head_dim": None, "hidden_size": 30}, "hidden_size=30.*num_attention_heads=4"),
    ("LlamaForSequenceClassification", {"id2label": {"0": "a", "1": "b"}}, "num_labels=2"),
    (LLAMA, {"rope_parameters": {"rope_type": "longrope"}}, "rope_type='longrope'.*allowed: default, l"),
    (LLAMA, {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "'llama3' needs low_freq_factor"),
    (LLAMA, {"rope_parameters": YARN, "rope_scaling": LINEAR}, "rope_scaling=.* disagree"),
    (LLAMA, {"rope_parameters": {"rope_type": "linear", "factor": 0.5}}, "factor=0.5"),
    (LLAMA, {"rope_parameters": {"mrope_section": [1]}}, "mrope_section not supported; allowed"),
    (LLAMA, {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5; allowed: 1.0"),
    (LLAMA, {ORIGINAL: 16, "rope_parameters": YARN | {ORIGINAL: 32}}, f"{ORIGINAL}=16 and 32 in rope_parameters"),
    (QWEN2, WINDOWED | {"layer_types": ["full"] * 4}, "layer_types=.*expected 4 of"),
    (QWEN2, WINDOWED | {"sliding_window": None, "layer_types": ["sliding_attention"] * 4}, "window is null, .*types="),
    ("Qwen2MoeForCausalLM", WINDOWED | {"moe_intermediate_size": 16}, "use_sliding_window=True.* allowed: false"),
    (MISTRAL, {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types=.*allowed: all"),
]


def test_invalid_missing_and_contradictory_keys_are_refused():
    cases = [(arch, {key: value}, re.escape(f"{key}={value!r}")) for arch, key, values in INVALID for value in values]
    for architecture, keys, message in (*cases, *CONTRADICTIONS):
        with pytest.raises(ValueError, match=message):
            config_of(architecture, **{"num_key_value_heads": 4} | keys)


@pytest.mark.parametrize("name", ALL)
def test_other_than_causal_attention_is_refused(name):
    """Without is_causal, transformers attends to later tokens too."""
    values = values_of(name)
    config = from_hf_dict(values)
    for key, allowed, invalid in (
        ("is_causal", (True, None), False),
        ("dual_chunk_attention_config", (None,), {"chunk_size": 262144, "local_size": 8192}),
    ):
        assert all(from_hf_dict(values | {key: value}) == config for value in allowed)
        with pytest.raises(ValueError, match=re.escape(f"{key}={invalid!r}")):
            from_hf_dict(values | {key: invalid})
