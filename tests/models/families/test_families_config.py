"""config.json of every family: read, written, read by transformers, written by it, and read again: the same config."""

import dataclasses
import json
import math
import re
from typing import Any

import pytest
import torch
from families import ALL, PEERS, SIZES, peer_config, values_of
from trialign.models.config import ModelConfig
from trialign.models.families.registry import FAMILIES, family_of, from_hf_dict, head_of, read_config, to_hf_dict
from trialign.models.rope import Rope


@pytest.mark.parametrize("head", ["lm", "score"])
@pytest.mark.parametrize("name", ALL)
def test_written_and_read(name, head):
    config = from_hf_dict(values_of(name))
    values = json.loads(json.dumps(to_hf_dict(config, head, "float32")))
    assert values["torch_dtype"] == "float32"
    again = from_hf_dict(values)
    assert head_of(again) == head and family_of(again) is family_of(config)
    tied = config.tie_embeddings and head == "lm"
    assert again == dataclasses.replace(config, architecture=again.architecture, tie_embeddings=tied)
    assert head == "score" or again == config


@pytest.mark.parametrize("head", ["lm", "score"])
@pytest.mark.parametrize("name", PEERS)
def test_transformers_reads_and_writes_it_alike(name, head, tmp_path, caplog):
    from transformers import AutoConfig

    config = from_hf_dict(values_of(name))
    (tmp_path / "config.json").write_text(json.dumps(to_hf_dict(config, head)))
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert type(theirs) is type(peer_config(name)) and theirs.dtype == torch.bfloat16
    assert theirs.tie_word_embeddings == (config.tie_embeddings and head == "lm")
    assert not [record for record in caplog.records if "rope" in record.getMessage()]  # keys it does not know
    theirs.save_pretrained(tmp_path)
    again = read_config(tmp_path)
    assert again == dataclasses.replace(from_hf_dict(to_hf_dict(config, head)))
    original = peer_config(name).to_dict()
    for key in ("rope_parameters", "sliding_window", "layer_types", "num_key_value_heads", "attention_bias"):
        if original.get(key) is not None and not (
            key == "sliding_window" and not original.get("use_sliding_window", 1)
        ):
            assert getattr(theirs, key) == original[key], key


def test_several_ends_of_sequence_are_a_list():
    config = llama(eos_token_id=[2, 5])
    assert config.eos_ids == (2, 5) and llama(**to_hf_dict(config)) == config


def test_every_family_has_both_heads():
    names = [name for family in FAMILIES for name in family.architectures]
    assert len(names) == len(set(names))
    assert all(set(family.architectures.values()) == {"lm", "score"} for family in FAMILIES)


def llama(**changes: Any) -> ModelConfig:
    return from_hf_dict(SIZES | {"architectures": ["LlamaForCausalLM"]} | changes)


@pytest.mark.parametrize(
    ("keys", "rope", "theta"),
    [
        ({}, Rope(), 1e4),
        ({"rope_theta": 7e4}, Rope(), 7e4),
        ({"rope_theta": 7e4, "rope_scaling": None}, Rope(), 7e4),
        ({"rope_theta": 7e4, "rope_scaling": {"type": "default"}}, Rope(), 7e4),
        ({"rope_parameters": {"rope_theta": 8e4, "rope_type": "default"}}, Rope(), 8e4),
        ({"rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2}}, Rope("linear", 2.0), 5e5),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, Rope("dynamic", 4.0, original_positions=64), 1e4),
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}},
            Rope("yarn", 4.0, original_positions=16),
            1e4,
        ),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, Rope("yarn", 2.0, original_positions=64), 1e4),
        (
            {
                "rope_theta": 5e5,
                "rope_scaling": {
                    "rope_type": "llama3",
                    "factor": 32.0,
                    "low_freq_factor": 1.0,
                    "high_freq_factor": 4.0,
                    "original_max_position_embeddings": 8192,
                },
            },
            Rope("llama3", 32.0, original_positions=8192),
            5e5,
        ),
        # transformers 5 and our own folders: both sections, and they agree
        (
            {
                "rope_theta": 3e4,
                "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 3e4},
                "rope_scaling": {"rope_type": "linear", "factor": 2.0},
            },
            Rope("linear", 2.0),
            3e4,
        ),
    ],
)
def test_rope_scaling_old_and_new(keys, rope, theta):
    config = llama(**keys)
    assert (config.rope, config.rope_theta) == (rope, theta)
    assert llama(**to_hf_dict(config)) == config


@pytest.mark.parametrize(
    ("keys", "longest"),
    [
        ({}, 64),
        ({"rope_scaling": {"type": "linear", "factor": 2.5}}, 160),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, 256),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}}, 64),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 16}}, 64),
        ({"rope_scaling": {"type": "yarn", "factor": 8.0}, "original_max_position_embeddings": 16}, 128),
    ],
)
def test_scaled_contexts(keys, longest):
    """max_position_embeddings is 64: the trained length, or the stretched one."""
    config = llama(**keys)
    assert config.longest_rollout == config.longest_document == longest
    assert llama(**to_hf_dict(config)).longest_rollout == longest


def test_the_trained_length_beside_the_section_is_the_sections():
    """By transformers' own angles, which differ from those of a trained length of 64."""
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    keys: dict[str, Any] = SIZES | {"original_max_position_embeddings": 16}
    keys |= {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}}
    config, theirs = llama(**keys), LlamaRotaryEmbedding(LlamaConfig(**keys)).inv_freq
    ours, _ = config.rope.frequencies(config.rope_theta, config.head_dim)
    torch.testing.assert_close(ours, theirs)
    assert config.rope == Rope("yarn", 4.0, original_positions=16)


def test_llama3_frequencies_are_the_papers_bands():
    """Wavelengths above original/low are divided, those below original/high are not, those between are blended."""
    rope = Rope("llama3", 8.0, original_positions=8192)
    plain, _ = Rope().frequencies(5e5, 128)
    got, scale = rope.frequencies(5e5, 128)
    wavelength = 2 * math.pi / plain
    assert scale == 1.0
    torch.testing.assert_close(got[wavelength < 8192 / 4], plain[wavelength < 8192 / 4])
    torch.testing.assert_close(got[wavelength > 8192], plain[wavelength > 8192] / 8)
    between = (wavelength > 8192 / 4) & (wavelength < 8192)
    assert between.any() and (got[between] < plain[between]).all() and (got[between] > plain[between] / 8).all()


@pytest.mark.parametrize(
    ("keys", "window", "full"),
    [
        ({"use_sliding_window": False, "sliding_window": 9, "max_window_layers": 0}, None, ()),
        ({"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 4}, None, ()),
        ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 1}, None, ()),
        ({"use_sliding_window": True, "max_window_layers": 3}, 4096, (0, 1, 2)),
        ({"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 3}, 9, (0, 1, 2)),
        ({"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0}, 9, ()),
        (
            {"use_sliding_window": True, "sliding_window": 9}
            | {"layer_types": ["sliding_attention", "full_attention"] * 2},
            9,
            (1, 3),
        ),
    ],
)
def test_qwen2_windows(keys, window, full):
    config = from_hf_dict(SIZES | {"architectures": ["Qwen2ForCausalLM"]} | keys)
    assert (config.window, config.full_layers) == (window, full)
    assert [config.window_of(i) for i in range(4)] == [None if i in full else window for i in range(4)]


@pytest.mark.parametrize(("kind", "window"), [("full_attention", None), ("sliding_attention", 9)])
@pytest.mark.parametrize("architecture", ["MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"])
def test_layers_of_one_kind(architecture, kind, window):
    """The kind of the layers decides, whatever number stands beside it."""
    keys = {"sliding_window": 9, "layer_types": [kind] * 4, "num_key_value_heads": 4}
    keys |= {"use_sliding_window": True} if "Qwen" in architecture else {}
    config = from_hf_dict(SIZES | {"architectures": [architecture]} | keys)
    assert [config.window_of(i) for i in range(4)] == [window] * 4
    assert from_hf_dict(to_hf_dict(config)) == config


def test_absent_keys_are_transformers_defaults():
    for architecture, expected in (
        ("MistralForCausalLM", {"window": 4096, "num_kv_heads": 8}),
        ("Qwen3ForCausalLM", {"head_dim": 128, "qkv_bias": False, "qk_norm": True}),
        ("Qwen2ForCausalLM", {"qkv_bias": True, "output_bias": False, "window": None}),
        ("MixtralForCausalLM", {"norm_eps": 1e-5, "rope_theta": 1e6, "window": None}),
    ):
        config = from_hf_dict(SIZES | {"architectures": [architecture], "num_attention_heads": 8})
        assert {key: getattr(config, key) for key in expected} == expected


LLAMA, MIXTRAL, QWEN2 = "LlamaForCausalLM", "MixtralForCausalLM", "Qwen2ForCausalLM"
NO_NUMBER = [  # architecture, key, values that are not allowed there: the message has key and value
    (LLAMA, "rope_theta", [math.inf, math.nan, 0]),
    (LLAMA, "rms_norm_eps", [math.inf, "small"]),
    (LLAMA, "hidden_act", ["gelu"]),
    (LLAMA, "attention_bias", ["yes"]),
    (LLAMA, "mlp_bias", [1]),
    (LLAMA, "sliding_window", [4096]),
    (LLAMA, "quantization_config", [{"bits": 4}]),
    (LLAMA, "hidden_size", ["32"]),
    (LLAMA, "num_hidden_layers", [0]),
    (LLAMA, "vocab_size", [True]),
    (LLAMA, "num_key_value_heads", [3]),
    (LLAMA, "head_dim", [7]),
    (LLAMA, "eos_token_id", [[2, 10**6], True, ["x"]]),
    (LLAMA, "bos_token_id", ["<s>"]),
    (LLAMA, "pad_token_id", [96]),
    ("MistralForCausalLM", "attention_bias", [True]),
    ("MistralForCausalLM", "sliding_window", [0]),
    (MIXTRAL, "router_jitter_noise", [0.1]),
    (MIXTRAL, "num_local_experts", [0]),
    (MIXTRAL, "router_aux_loss_coef", [-0.1]),
]


@pytest.mark.parametrize(("architecture", "key", "values"), NO_NUMBER, ids=lambda value: str(value))
def test_what_is_not_supported_is_refused_by_key_and_value(architecture, key, values):
    for value in values:
        with pytest.raises(ValueError, match=re.escape(f"{key}={value!r}")):
            from_hf_dict(SIZES | {"architectures": [architecture], "num_key_value_heads": 4, key: value})


YARN: dict[str, Any] = {"rope_type": "yarn", "factor": 4.0}
WINDOWED: dict[str, Any] = {"use_sliding_window": True}


@pytest.mark.parametrize(
    ("architecture", "keys", "message"),
    [
        (None, {"architectures": ["GPT2LMHeadModel"]}, "architectures=.*GPT2.*allowed: LlamaForCausalLM, LlamaForSeq"),
        (None, {"architectures": None}, "architectures=None: allowed"),
        (LLAMA, {"hidden_size": None}, "hidden_size is missing"),
        ("Qwen3MoeForCausalLM", {"moe_intermediate_size": None}, "moe_intermediate_size is missing"),
        (LLAMA, {"head_dim": None, "hidden_size": 30}, "hidden_size=30.*num_attention_heads=4"),
        ("LlamaForSequenceClassification", {"id2label": {"0": "a", "1": "b"}}, "num_labels=2"),
        (
            LLAMA,
            {"rope_parameters": {"rope_type": "longrope"}},
            "rope_type='longrope' is not supported; allowed: default, l",
        ),
        (LLAMA, {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "'llama3' needs low_freq_factor"),
        (
            LLAMA,
            {"rope_parameters": YARN, "rope_scaling": {"type": "linear", "factor": 2.0}},
            "rope_scaling=.* disagree",
        ),
        (LLAMA, {"rope_parameters": {"rope_type": "linear", "factor": 0.5}}, "factor=0.5"),
        (LLAMA, {"rope_parameters": {"mrope_section": [1]}}, "mrope_section not supported; allowed"),
        (LLAMA, {"rope_parameters": {"full_attention": {}}}, "full_attention not supported"),
        (LLAMA, {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor=0.5; allowed: 1.0"),
        (LLAMA, {"rope_parameters": {"rope_theta": -1}}, "rope_theta=-1"),
        (LLAMA, {"rope_parameters": {"rope_theta": math.inf}}, "rope_theta=inf"),
        (
            LLAMA,
            {
                "original_max_position_embeddings": 16,
                "rope_parameters": YARN | {"original_max_position_embeddings": 32},
            },
            "original_max_position_embeddings=16 and 32 in rope_parameters",
        ),
        (QWEN2, WINDOWED | {"layer_types": ["full"] * 4}, "layer_types=.*expected 4 of"),
        (
            QWEN2,
            WINDOWED | {"sliding_window": None, "layer_types": ["sliding_attention"] * 4},
            "sliding_window is null, but layer_types=",
        ),
        ("Qwen2MoeForCausalLM", WINDOWED | {"moe_intermediate_size": 16}, "use_sliding_window=True.* allowed: false"),
        ("MistralForCausalLM", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types=.*allowed: all"),
        ("MistralForCausalLM", {"layer_types": ["chunked_attention"] * 4}, "layer_types=.*allowed: all sliding_att"),
    ],
)
def test_what_contradicts_itself_or_is_missing_is_refused_by_key(architecture, keys, message):
    with pytest.raises(ValueError, match=message):
        from_hf_dict(SIZES | {"architectures": [architecture], "num_key_value_heads": 4} | keys)


@pytest.mark.parametrize("name", ALL)
def test_only_plain_causal_attention_is_read(name):
    """transformers gives every token the later ones too where is_causal is false."""
    values = values_of(name)
    config = from_hf_dict(values)
    for key, allowed, other in (
        ("is_causal", (True, None), False),
        ("dual_chunk_attention_config", (None,), {"chunk_size": 262144, "local_size": 8192}),
    ):
        assert all(from_hf_dict(values | {key: value}) == config for value in allowed)
        with pytest.raises(ValueError, match=re.escape(f"{key}={other!r}")):
            from_hf_dict(values | {key: other})
