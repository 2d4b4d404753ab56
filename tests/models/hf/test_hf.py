"""Hugging Face folders into decoders: names, slices, types, refusals."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_llama, tiny_tokenizer, weight_pieces
from torch import Tensor
from trialign.engine.mesh import build_mesh, mesh_as
from trialign.models.config import ModelConfig, check_layout
from trialign.models.decoder import Decoder
from trialign.models.families.registry import from_hf_dict, head_of, read_config
from trialign.models.hf.load import load_hf
from trialign.models.hf.table import hf_name, hf_shapes
from trialign.models.hf.tokenizer import read_tokenizer, stop_ids


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("hf")
    return {
        "tied": tiny_llama(root / "tied", tied=True),
        "untied": tiny_llama(root / "untied", tied=False),
        "score": tiny_llama(root / "score", score=True),
    }


@pytest.fixture
def copy(folders, tmp_path) -> Path:
    """An untied folder to spoil."""
    return Path(shutil.copytree(folders["untied"], tmp_path / "copy"))


def rewrite(folder: Path, **changes) -> None:
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(values | changes))


def test_config_that_is_no_config(tmp_path):
    with pytest.raises(
        ValueError, match=r"x.gguf: a GGUF file is imported into a checkpoint first \(launch/import_hf.py\)"
    ):
        read_config("x.gguf")
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        read_config(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no config.json in this folder"):
        read_config(tmp_path)
    for text, message in (("{", "not JSON"), ("[1]", "expected a JSON object, found list")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=f"config.json: .*{message}"):
            read_config(tmp_path)


def test_a_value_that_is_refused_names_the_file_too(copy):
    for changes, message in (
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"id2label": 3}, "a value of the wrong type: "),
    ):
        rewrite(copy, **{"vocab_size": 96, "id2label": None} | changes)
        with pytest.raises(ValueError, match=f"config.json: {message}"):
            read_config(copy)


def test_stop_ids_are_those_of_both_configs_and_of_the_tokenizer(tmp_path):
    config = read_config(tiny_llama(tmp_path, eos_token_id=5))
    tokenizer = read_tokenizer(tiny_tokenizer(tmp_path))  # its end of sequence is 2
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [9, 5]}))
    assert stop_ids(tmp_path, config, tokenizer) == (2, 5, 9)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 7}))
    assert stop_ids(tmp_path, config, tokenizer) == (2, 5, 7)
    for text, message in (
        ("{", "not JSON"),
        ("[]", "expected a JSON object, found list"),
        ('{"eos_token_id": "</s>"}', "eos_token_id='</s>': expected a token id below vocab_size=96 or a list"),
        ('{"eos_token_id": [5, 96]}', r"eos_token_id=\[5, 96\]: expected a token id below vocab_size=96"),
        ('{"eos_token_id": [true]}', r"eos_token_id=\[True\]"),
    ):
        (tmp_path / "generation_config.json").write_text(text)
        with pytest.raises(ValueError, match=f"generation_config.json: {message}"):
            stop_ids(tmp_path, config, tokenizer)
    (tmp_path / "generation_config.json").unlink()
    assert stop_ids(tmp_path, config, tokenizer) == (2, 5)
    tokenizer.eos_token = None
    assert stop_ids(tmp_path, config, tokenizer) == (5,)
    tokenizer.eos_token = "z"  # a letter's token, beyond the model's vocabulary
    with pytest.raises(ValueError, match=f"eos_token_id={tokenizer.eos_token_id}: expected a token id below"):
        stop_ids(tmp_path, dataclasses.replace(config, vocab_size=8), tokenizer)


def test_check_layout(folders):
    config = read_config(folders["tied"])  # 4 heads, 2 key/value heads, ffn 64, vocabulary 96, 4 layers
    smol = dataclasses.replace(config, num_heads=9, num_kv_heads=3, ffn_size=1536, vocab_size=49153)
    for shape, tp, pp in ((config, 2, 4), (config, 1, 3), (config, 3, 1), (smol, 2, 1), (smol, 7, 2), (smol, 9, 1)):
        check_layout(shape, tp, pp)
    for shape, tp, pp, message in (
        (config, 8, 1, "num_heads=4 cannot be sharded over tp=8 ranks; allowed tp: 1 to 4"),
        (config, 0, 1, "num_heads=4 cannot be sharded over tp=0 ranks; allowed tp: 1 to 4"),
        (
            dataclasses.replace(smol, ffn_size=7),
            8,
            1,
            "ffn_size=7 cannot be sharded over tp=8 ranks; allowed tp: 1 to 7",
        ),
        (config, 1, 5, "num_layers=4 cannot be shared by pp=5; allowed pp: 1 to 4"),
    ):
        with pytest.raises(ValueError) as caught:
            check_layout(shape, tp, pp)
        assert str(caught.value) == message


def test_names():
    config = from_hf_dict({"architectures": ["LlamaForCausalLM"]} | SIZES)
    tied = dataclasses.replace(config, tie_embeddings=True)
    assert hf_name("layers.1.attention.qkv.weight", "k", config) == "model.layers.1.self_attn.k_proj.weight"
    assert hf_name("head.weight", "", config) == "lm_head.weight"
    assert hf_name("head.weight", "", tied) == "model.embed_tokens.weight"
    assert hf_name("head.weight", "", tied, "score") == "score.weight"


SIZES = {
    "vocab_size": 10,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def build(folder: Path, tp: int, pp: int, rank: int, *, head=None, dtype=torch.float32, **options) -> Decoder:
    config = read_config(folder)
    model = Decoder(config, mesh_as(rank, tp=tp, pp=pp), dtype=dtype, head=head or head_of(config))
    for parameter in model.parameters():
        parameter.data.fill_(-7.0)
    load_hf(model, folder, **options)
    return model


def test_the_cut_written_out(folders):
    """tp=2 x pp=2, last rank, by hand: heads 2 and 3, key/value head 1, the upper half of everything cut."""
    theirs = load_file(folders["untied"] / "model.safetensors")
    parameters = dict(build(folders["untied"], 2, 2, 3).named_parameters())
    old = "model.layers.3."
    q, k, v = (theirs[f"{old}self_attn.{x}_proj.weight"] for x in "qkv")
    gate, up = (theirs[f"{old}mlp.{x}_proj.weight"] for x in ("gate", "up"))
    expected = {
        "layers.3.attention.qkv.weight": torch.cat((q[16:], k[8:], v[8:])),
        "layers.3.attention.output.weight": theirs[f"{old}self_attn.o_proj.weight"][:, 16:],
        "layers.3.mlp.gate_up.weight": torch.cat((gate[32:], up[32:])),
        "layers.3.mlp.down.weight": theirs[f"{old}mlp.down_proj.weight"][:, 32:],
        "layers.3.attention_norm.weight": theirs[f"{old}input_layernorm.weight"],
        "layers.3.mlp_norm.weight": theirs[f"{old}post_attention_layernorm.weight"],
        "norm.weight": theirs["model.norm.weight"],
        "head.weight": theirs["lm_head.weight"][48:],
    }
    for name, tensor in expected.items():
        assert torch.equal(parameters[name], tensor), name
    assert "embedding.weight" not in parameters and "layers.1.mlp.down.weight" not in parameters


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtype_is_the_parameters(copy, stored, dtype):
    theirs = {name: t.to(stored) for name, t in load_file(copy / "model.safetensors").items()}
    save_file(theirs, copy / "model.safetensors")
    for name, _, view in weight_pieces(build(copy, 1, 1, 0, dtype=dtype)):
        assert view.dtype == dtype and torch.equal(view, theirs[name].to(dtype))


def test_several_files(copy):
    """Sharded by transformers itself: same weights as out of one file."""
    from transformers import LlamaForCausalLM

    before = load_file(copy / "model.safetensors")
    model = LlamaForCausalLM.from_pretrained(copy)
    (copy / "model.safetensors").unlink()
    model.save_pretrained(copy, max_shard_size="20KB")
    assert len(list(copy.glob("*.safetensors"))) > 2
    for rank in (0, 3):
        for name, piece, view in weight_pieces(build(copy, 2, 2, rank)):
            place = tuple(slice(o, o + n) for o, n in zip(piece.offset, piece.shape, strict=True))
            assert torch.equal(view, before[name][place])


def test_critic_from_a_causal_model(folders):
    with pytest.raises(ValueError, match="has a score head; a language model needs lm_head.weight"):
        build(folders["score"], 1, 1, 0, head="lm")
    for kind in ("tied", "untied"):
        with pytest.raises(ValueError, match="LlamaForCausalLM has no score.weight; expected LlamaForSequence"):
            build(folders[kind], 1, 1, 0, head="score")
        zero = build(folders[kind], 1, 1, 0, head="score", new_head="zero")
        assert zero.head is not None and zero.head.weight.eq(0).all()
        assert set(hf_shapes(zero.config, "score")) == {name for name, _, _ in weight_pieces(zero)}
        heads = [build(folders[kind], 2, 2, rank, head="score", new_head="normal").head for rank in range(4)]
        assert heads[0] is heads[1] is None
        last, other = heads[2:]
        assert last is not None and other is not None
        assert torch.equal(last.weight, other.weight)
        assert 0.5 < last.weight.std() * 33 < 1.5


def refused(folder: Path, message: str, config: ModelConfig | None = None) -> None:
    """load_hf refuses the folder and has changed nothing by then."""
    model = Decoder(config or read_config(folder), build_mesh(), dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data.fill_(-7.0)
    with pytest.raises(ValueError, match=message):
        load_hf(model, folder)
    assert all(parameter.eq(-7).all() for parameter in model.parameters())


def change(folder: Path, **tensors: Tensor | None) -> None:
    """Rewrites model.safetensors with some tensors replaced, added or (None) left out."""
    merged = load_file(folder / "model.safetensors") | tensors
    save_file({name: t for name, t in merged.items() if t is not None}, folder / "model.safetensors")


LAST = "model.layers.3.mlp.down_proj.weight"


def test_old_files_rotary_frequencies_are_no_extra(copy):
    change(copy, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)})
    build(copy, 1, 1, 0)


def test_integer_tensor(copy):
    change(copy, **{LAST: torch.zeros(32, 64, dtype=torch.int8)})
    refused(copy, f"{LAST} is I8; allowed: .*BF16")


@pytest.mark.parametrize("keep", [4, 100, -1, -1000])
def test_truncated_file(copy, keep):
    path = copy / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(copy, r"model.safetensors: corrupt or truncated")


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_heads", 8), ("rope_theta", 5e5), ("norm_eps", 1e-5), ("vocab_size", 97), ("tie_embeddings", True)],
)
def test_a_model_of_another_config(folders, key, value):
    config = dataclasses.replace(read_config(folders["untied"]), **{key: value})
    refused(folders["untied"], f"{key}=.*, the model has {value}", config)


def test_a_tensor_in_two_shards(copy):
    both = load_file(copy / "model.safetensors")
    (copy / "model.safetensors").rename(copy / "a.safetensors")
    save_file({LAST: both[LAST] + 1}, copy / "b.safetensors")
    places = dict.fromkeys(both, "a.safetensors") | {"model.norm.weight": "b.safetensors"}
    (copy / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    refused(copy, f"b.safetensors: {LAST} is also in a.safetensors")


def test_tied_file_with_a_head_of_its_own(folders, tmp_path):
    """Equal: taken from the embedding. Not equal: the file contradicts its config, and nobody guesses."""
    folder = Path(shutil.copytree(folders["tied"], tmp_path / "copy"))
    embedding = load_file(folder / "model.safetensors")["model.embed_tokens.weight"]
    change(folder, **{"lm_head.weight": embedding.clone()})
    build(folder, 1, 1, 0)
    change(folder, **{"lm_head.weight": embedding + 1})
    refused(folder, "config.json ties the embeddings, but lm_head.weight differs from model.embed_tokens.weight")
