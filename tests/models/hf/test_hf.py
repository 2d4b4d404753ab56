"""Loading of Hugging Face folders: dtypes, heads, stop and padding tokens; invalid folders are refused."""

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny_llama, tiny_tokenizer, weight_pieces
from torch import Tensor
from trialign.algorithms.config.common import ParallelConfig
from trialign.algorithms.config.run import RunConfig
from trialign.algorithms.roles.build import read_shape
from trialign.engine.mesh import build_mesh, mesh_as
from trialign.models.config import ModelConfig, check_layout
from trialign.models.decoder import Decoder
from trialign.models.families.registry import head_of, read_config
from trialign.models.folder import INDEX
from trialign.models.hf.convert import import_checkpoint
from trialign.models.hf.load import load_hf
from trialign.models.hf.padding import padding_id, write_padding
from trialign.models.hf.source import open_source
from trialign.models.hf.table import hf_shapes
from trialign.models.hf.tokenizer import read_tokenizer, stop_ids


@pytest.fixture
def untied(tmp_path) -> Path:
    return tiny_llama(tmp_path / "untied", tied=False)


def test_stop_ids_are_those_of_configs_and_tokenizer(tmp_path):
    config = read_config(tiny_llama(tmp_path, eos_token_id=5))
    tokenizer, path = read_tokenizer(tiny_tokenizer(tmp_path)), tmp_path / "generation_config.json"  # its own is 2
    for named, expected in (([9, 5], (2, 5, 9)), (7, (2, 5, 7))):
        path.write_text(json.dumps({"eos_token_id": named}))
        assert stop_ids(tmp_path, config, tokenizer) == expected
    for text, message in (
        ("{", "not JSON"),
        ('{"eos_token_id": "</s>"}', "eos_token_id='</s>'.* vocab_size=96"),
        ('{"eos_token_id": [5, 96]}', r"eos_token_id=\[5, 96\].* vocab_size=96"),
        ('{"eos_token_id": [true]}', r"eos_token_id=\[True\]"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=f"generation_config.json: .*{message}"):
            stop_ids(tmp_path, config, tokenizer)
    path.unlink()
    assert stop_ids(tmp_path, config, tokenizer) == (2, 5)
    tokenizer.eos_token = None
    assert stop_ids(tmp_path, config, tokenizer) == (5,)
    tokenizer.eos_token = "z"  # a token beyond the model's vocabulary
    with pytest.raises(ValueError, match=f"eos_token_id={tokenizer.eos_token_id}.* vocab_size=8"):
        stop_ids(tmp_path, dataclasses.replace(config, vocab_size=8), tokenizer)


def test_unfit_layouts_are_refused_by_size(untied):
    config = read_config(untied)  # 4 heads, 2 key/value heads, ffn 64, vocabulary 96, 4 layers
    smollm2 = dataclasses.replace(config, num_heads=9, num_kv_heads=3, ffn_size=1536, vocab_size=49153)
    for shape, tp, pp in ((config, 2, 4), (config, 3, 3), (smollm2, 2, 1), (smollm2, 7, 2), (smollm2, 9, 1)):
        check_layout(shape, tp, pp)
    for shape, tp, pp, message in (
        (config, 8, 1, "num_heads=4 .* tp=8 ranks; allowed tp: 1 to 4"),
        (config, 0, 1, "num_heads=4 .* tp=0 ranks; allowed tp: 1 to 4"),
        (dataclasses.replace(smollm2, ffn_size=7), 8, 1, "ffn_size=7 .* tp=8 ranks; allowed tp: 1 to 7"),
        (config, 1, 5, "num_layers=4 .* pp=5; allowed pp: 1 to 4"),
    ):
        with pytest.raises(ValueError, match=message):
            check_layout(shape, tp, pp)


def build(folder: Path, tp: int, pp: int, rank: int, *, head=None, dtype=torch.float32, **options) -> Decoder:
    config = read_config(folder)
    model = Decoder(config, mesh_as(rank, tp=tp, pp=pp), dtype=dtype, head=head or head_of(config))
    load_hf(model, folder, **options)
    return model


@pytest.mark.parametrize("stored", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loaded_dtype_is_the_parameters(untied, stored, dtype):
    """Also from an old file with rotary frequencies, which are ignored."""
    tensors = {name: t.to(stored) for name, t in load_file(untied / "model.safetensors").items()}
    rotary = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(4)}
    save_file(tensors | rotary, untied / "model.safetensors")
    for name, _, view in weight_pieces(build(untied, 1, 1, 0, dtype=dtype)):
        assert view.dtype == dtype and torch.equal(view, tensors[name].to(dtype))


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_score_head_of_a_causal_model_is_new(tmp_path, tied):
    folder = tiny_llama(tmp_path, tied=tied)
    with pytest.raises(ValueError, match="LlamaForCausalLM has no score.weight; expected LlamaForSequence"):
        build(folder, 1, 1, 0, head="score")
    zero = build(folder, 1, 1, 0, head="score", new_head="zero")
    assert zero.head is not None and zero.head.weight.eq(0).all()
    assert set(hf_shapes(zero.config, "score")) == {name for name, _, _ in weight_pieces(zero)}
    first, second, last, other = (build(folder, 2, 2, rank, head="score", new_head="normal").head for rank in range(4))
    assert first is second is None and last is not None and other is not None
    assert torch.equal(last.weight, other.weight) and 0.5 < last.weight.std() * 33 < 1.5


def test_padding_is_a_token_that_ends_nothing(tmp_path):
    """Of a tokenizer that pads with its end of sequence and has unused special tokens."""
    tokenizer = read_tokenizer(tiny_tokenizer(tmp_path))
    specials: list = ["<|im_end|>", "<|endoftext|>", "</tool>", "<|file_sep|>", "<|fim_pad|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": specials})
    ids: Any = tokenizer.convert_tokens_to_ids(["<|fim_pad|>", "<|file_sep|>", "<unk>", "<s>"])
    pad, sep, unk, bos = ids
    assert padding_id(tokenizer, (2,), 1000) == pad
    assert padding_id(tokenizer, (2,), pad) == sep  # the model has no row for the other
    assert padding_id(tokenizer, (2, pad), 1000) == sep
    assert padding_id(tokenizer, (2,), sep) == unk  # unused, as bytes are never unknown
    tokenizer.pad_token = "<s>"
    assert padding_id(tokenizer, (2,), 1000) == bos
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<|file_sep|>\n{% endfor %}"
    tokenizer.pad_token = "<|file_sep|>"
    assert padding_id(tokenizer, (2,), 1000) == pad


def test_padding_is_written_to_the_tokenizers_files(tmp_path):
    tiny_tokenizer(tmp_path)
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "</s>", "pad_token": "</s>"}))
    write_padding(tmp_path, "<s>")
    tokenizer = read_tokenizer(tmp_path)
    assert (tokenizer.pad_token, tokenizer.eos_token) == ("<s>", "</s>")


NORM, DOWN = "model.layers.1.input_layernorm.weight", "model.layers.3.mlp.down_proj.weight"


@pytest.fixture
def folder(tmp_path) -> Path:
    """A tiny LLaMA in two files with an index."""
    folder = tiny_llama(tmp_path / "model", tied=False)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    files = {name: f"{'b' if 'layers.1' in name else 'a'}.safetensors" for name in tensors}
    for file in set(files.values()):
        save_file({name: tensor for name, tensor in tensors.items() if files[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"weight_map": files}))
    open_source(folder)
    return folder


def change(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def point(folder: Path, name: str, file: str | list[str]) -> None:
    """Changes the index's file of a tensor."""
    index = json.loads((folder / INDEX).read_text())
    change(folder / INDEX, weight_map=index["weight_map"] | {name: file})


def put(file: Path, name: str, tensor: Tensor) -> None:
    save_file(load_file(file) | {name: tensor}, file)


A, CONFIG = "a.safetensors", "config.json"
FOLDERS = {
    "layers": (lambda f: change(f / CONFIG, num_hidden_layers=10**6), r"model: config.json .*1000000 num_h.* \d+ tens"),
    "model-type": (lambda f: change(f / CONFIG, model_type="qwen2"), "config.json: model_type='qwen2' .*: 'llama'"),
    "vocab-size": (lambda f: change(f / CONFIG, vocab_size=0), "config.json: vocab_size=0"),
    "wrong-type": (lambda f: change(f / CONFIG, id2label=3), "config.json: a value of the wrong type"),
    "no-json": (lambda f: (f / CONFIG).write_text("{"), "config.json: not JSON"),
    "nested-config": (lambda f: (f / CONFIG).write_text('{"a": ' + "[" * 10**5), "config.json: .* nested too deep"),
    "index-numbers": (lambda f: change(f / INDEX, weight_map=3), "index.json: not an index"),
    "file-elsewhere": (lambda f: point(f, NORM, "../b.safetensors"), f"{INDEX}: weight_map, {NORM}: '../b.saf"),
    "wrong-file": (lambda f: point(f, NORM, A), f"{A}: no tensor {NORM}, expected by {INDEX}; it is in b.saf"),
    "missing-file": (lambda f: point(f, NORM, "c.safetensors"), "c.safetensors: missing"),
    "missing-tensor": (lambda f: point(f, "odd", A), f"{A}: no tensor odd, expected by {INDEX}"),
    "tensor-twice": (lambda f: put(f / A, NORM, torch.ones(32)), f"b.safetensors: {NORM} is also in {A}"),
    "integers": (lambda f: put(f / A, DOWN, torch.zeros(32, 64).char()), f"{DOWN} is I8; allowed: .*BF16"),
    "truncated": (lambda f: os.truncate(f / A, 1000), f"{A}: corrupt or truncated"),
    "tied": (lambda f: change(f / CONFIG, tie_word_embeddings=True), "lm_head.weight differs from model.embed_tokens"),
    "no-config": (lambda f: (f / CONFIG).unlink(), "no config.json in this folder"),
}


def assert_load_refuses(folder: Path, message: str, config: ModelConfig) -> None:
    model = Decoder(config, build_mesh(), dtype=torch.float32)
    for parameter in model.parameters():
        parameter.data.fill_(-7.0)
    with pytest.raises(ValueError, match=message):
        load_hf(model, folder)
    assert all(parameter.eq(-7).all() for parameter in model.parameters())


@pytest.mark.parametrize("case", FOLDERS)
def test_inconsistent_folders_are_refused_before_any_work(case, folder):
    (corrupt, message), config = FOLDERS[case], read_config(folder)
    corrupt(folder)
    with pytest.raises(ValueError, match=message):
        read_shape(str(folder), ParallelConfig(), RunConfig())
    with pytest.raises(ValueError, match=message):
        import_checkpoint(folder, folder.parent / "imported")
    assert not (folder.parent / "imported").exists()
    assert_load_refuses(folder, message, config)


@pytest.mark.parametrize(
    ("key", "value"),
    [("num_heads", 8), ("rope_theta", 5e5), ("norm_eps", 1e-5), ("vocab_size", 97), ("tie_embeddings", True)],
)
def test_folder_of_another_config_is_refused(folder, key, value):
    config = dataclasses.replace(read_config(folder), **{key: value})
    assert_load_refuses(folder, f"{key}=.*, the model has {value}", config)


def test_nonfinite_tensors_are_refused_by_name(folder):
    model = Decoder(read_config(folder), build_mesh(), dtype=torch.float32)
    for number in (float("nan"), float("inf")):
        put(folder / "b.safetensors", NORM, torch.ones(32).index_fill(0, torch.tensor(31), number))
        for call in (lambda: import_checkpoint(folder, folder.parent / "imported"), lambda: load_hf(model, folder)):
            with pytest.raises(ValueError, match=f"model: {NORM} has NaN or infinity"):
                call()
    assert not (folder.parent / "imported").exists()
