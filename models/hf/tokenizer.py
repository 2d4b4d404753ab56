"""Tokenizer of a model's folder, loaded without running code from the folder; and its stop tokens.

transformers loads most. Two are built here: a sentencepiece `tokenizer.model` of LLaMA's kind (LLaMA 1 and 2,
Baichuan), which transformers 5 loads with wrong merges and without the first token, checked against sentencepiece
itself; and Qwen 1's tiktoken file, which it does not load (models/hf/tiktoken_file.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from google.protobuf.message import DecodeError
from sentencepiece import SentencePieceProcessor, sentencepiece_model_pb2
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, processors
from tokenizers.pre_tokenizers import Metaspace, Sequence

from ..config import ModelConfig
from ..folder import model_folder, read_json
from .tiktoken_file import END, NAME, rank_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SPACE = "▁"  # sentencepiece's mark for a space
# transformers' classes for the byte-pair model in tokenizer.model.
_LLAMA = ("LlamaTokenizer", "LlamaTokenizerFast", "CodeLlamaTokenizer", "CodeLlamaTokenizerFast")
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")
_KEPT = "chat_template additional_special_tokens model_max_length padding_side".split()
_FILES = {"tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "tekken.json"}
PROBES = (
    "The quick brown fox jumps over 12 lazy dogs.",
    "  Two  spaces,\ttabs\nand\n\nlines ",
    "naïve café, 你好，世界！ Привет 🙂 ١٢",
    "def f(x):\n    return x ** 2  # {'a': [1, 2]}\n",
    "",
)


def has_tokenizer(folder: Path | str) -> bool:
    """Whether a model's folder, or a checkpoint, has any tokenizer file."""
    folder = model_folder(folder)
    return folder.is_dir() and any(path.name in _FILES or path.suffix == ".tiktoken" for path in folder.iterdir())


def read_tokenizer(folder: Path | str) -> PreTrainedTokenizerBase:
    """Tokenizer in `folder`, from transformers or from `build_tokenizer`.

    Raises:
        ValueError: there is none, it needs code from the folder, or it is corrupt.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast  # takes seconds

    folder = model_folder(folder)
    built = build_tokenizer(folder)
    if built is not None:
        return built
    # Explicit, or transformers would ask on the terminal and wait.
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, **options)
        file = folder / "tokenizer.json"
        # transformers 5 rebuilds some classes from the vocabulary: a byte-level one named LLaMA's would lose spaces.
        if file.is_file() and not _same_ids(tokenizer, Tokenizer.from_file(str(file))):
            tokenizer = PreTrainedTokenizerFast.from_pretrained(folder, **options)
        return tokenizer
    except Exception as error:  # of any type in the tokenizers library, without the folder's name
        raise ValueError(f"{folder}: no tokenizer can be read from it: {error}") from error


def stop_ids(folder: Path | str, config: ModelConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Stop tokens: every end of sequence in config.json, generation_config.json and the tokenizer.

    Chat models have the end of a turn in one of them and the end of a text in another.

    Raises:
        ValueError: generation_config.json is not a JSON object, or an eos_token_id not of the model's vocabulary.
    """
    path = model_folder(folder) / "generation_config.json"
    named: Any = _read_optional(path).get("eos_token_id")
    ends: set[int] = set(config.eos_ids)
    for source, value in ((path, named), (f"{folder}: the tokenizer", tokenizer.eos_token_id)):
        ids: list[Any] = value if isinstance(value, list) else [] if value is None else [value]
        if not all(type(i) is int and 0 <= i < config.vocab_size for i in ids):
            allowed = f"a token id below vocab_size={config.vocab_size} or a list of them"
            raise ValueError(f"{source}: eos_token_id={value!r}: expected {allowed}")
        ends |= set(ids)
    return tuple(sorted(ends))


def _same_ids(one: PreTrainedTokenizerBase, other: Tokenizer) -> bool:
    """Whether both encode PROBES alike, without special tokens."""
    options: dict[str, Any] = {"add_special_tokens": False}
    return all(one.encode(probe, **options) == other.encode(probe, **options).ids for probe in PROBES)


def _read_optional(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def _settings(folder: Path) -> dict[str, Any]:
    return _read_optional(folder / "tokenizer_config.json")


def build_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """Tokenizer of a folder without tokenizer.json: from Qwen 1's tiktoken file, or from a sentencepiece model of
    LLaMA's kind or of a class that transformers lacks; None for any other folder.

    Raises:
        ValueError: a corrupt file, or a tokenizer that differs from sentencepiece's own.
    """
    if (folder / "tokenizer.json").is_file():
        return None
    if (folder / NAME).is_file():
        return _for_transformers(rank_tokenizer(folder / NAME), {"eos_token": END, "pad_token": END}, folder)
    settings = _settings(folder)
    remote = "AutoTokenizer" in settings.get("auto_map", {})
    if (folder / "tokenizer.model").is_file() and (remote or settings.get("tokenizer_class") in (None, *_LLAMA)):
        return sentencepiece_tokenizer(folder)
    return None


def _for_transformers(built: Tokenizer, specials: dict[str, str], folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer as transformers' class, with the folder's chat template and settings."""
    from transformers import PreTrainedTokenizerFast  # takes seconds

    settings = _settings(folder)
    options = {key: settings[key] for key in _KEPT if settings.get(key) is not None}
    template = folder / "chat_template.jinja"
    if template.is_file():
        options["chat_template"] = template.read_text(encoding="utf-8")
    return PreTrainedTokenizerFast(tokenizer_object=built, clean_up_tokenization_spaces=False, **specials | options)


def sentencepiece_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The byte-pair model in `folder`/tokenizer.model as a tokenizer of transformers.

    Settings in tokenizer_config.json: add_bos_token (default true, as in LLaMA's code), add_eos_token, special and
    added tokens, chat template, and `legacy`: a space before text that follows a special token.

    Raises:
        ValueError: not a byte-pair model of sentencepiece, or the result encodes a text in another way.
    """
    path, settings = folder / "tokenizer.model", _settings(folder)
    built, specials = _byte_pair(path, settings.get("legacy") is not False)
    _add_tokens(built, folder)
    specials |= _special_tokens(built, folder)
    original = SentencePieceProcessor(model_file=str(path))
    for probe in PROBES:
        ids, expected = built.encode(probe, add_special_tokens=False).ids, original.encode(probe)
        if ids != expected:
            raise ValueError(f"{path}: the tokenizers library encodes {probe!r} as {ids}, expected {expected}")
    first = [specials["bos_token"]] if settings.get("add_bos_token", True) and "bos_token" in specials else []
    last = [specials["eos_token"]] if settings.get("add_eos_token", False) and "eos_token" in specials else []
    if first or last:
        built.post_processor = processors.TemplateProcessing(
            single=[*first, "$A", *last],
            pair=[*first, "$A", *last, *first, "$B", *last],
            special_tokens=[(token, built.token_to_id(token)) for token in {*first, *last}],
        )
    return _for_transformers(built, specials, folder)


def _special_tokens(built: Tokenizer, folder: Path) -> dict[str, str]:
    """Special tokens set in the folder, by transformers' names."""
    found = {}
    for values in (_read_optional(folder / "special_tokens_map.json"), _settings(folder)):
        for name in _NAMED:
            token = values.get(name)
            token = token.get("content") if isinstance(token, dict) else token
            if token is not None and built.token_to_id(token) is None:
                raise ValueError(f"{folder}: {name}={token!r} is not in tokenizer.model or among the added tokens")
            found |= {} if token is None else {name: token}
    return found


def _add_tokens(built: Tokenizer, folder: Path) -> None:
    """Appends a fine-tune's added tokens; raises ValueError where their ids do not follow the model's."""
    added = _read_optional(folder / "added_tokens.json")
    tokens = {i: AddedToken(token, normalized=False) for token, i in added.items()}
    for i, entry in _settings(folder).get("added_tokens_decoder", {}).items():
        kinds = {key: entry[key] for key in ("lstrip", "rstrip", "single_word", "special") if key in entry}
        tokens[int(i)] = AddedToken(entry["content"], normalized=False, **kinds)
    for i, token in sorted(tokens.items()):
        built.add_tokens([token])
        if built.token_to_id(token.content) != i:
            actual = built.token_to_id(token.content)
            raise ValueError(f"{folder}: added token {token.content!r} has id {i} in its file, but gets {actual}")


def _byte_pair(path: Path, legacy: bool) -> tuple[Tokenizer, dict[str, str]]:
    """The model as a Tokenizer, and its special tokens by transformers' names.

    Args:
        legacy: put a space before text that follows a special token, as at the start.
    """
    proto = sentencepiece_model_pb2.ModelProto()  # pyright: ignore[reportAttributeAccessIssue]
    try:
        proto.ParseFromString(path.read_bytes())
    except DecodeError as error:
        raise ValueError(f"{path}: not a sentencepiece model: {error}") from None
    trainer, rules, byte_pair = proto.trainer_spec, proto.normalizer_spec, 2
    if trainer.model_type != byte_pair or not proto.pieces:
        kinds = {1: "unigram", 3: "word", 4: "char"}
        raise ValueError(
            f"{path}: a {kinds.get(trainer.model_type, 'unknown')} model of {len(proto.pieces)} pieces; only byte-pair"
            " models are read without tokenizer.json: save the tokenizer with transformers' save_pretrained"
        )
    ids = {piece.piece: i for i, piece in enumerate(proto.pieces)}
    ranked: list[tuple[float, int, int, tuple[str, str]]] = []
    for piece in proto.pieces:
        for i in range(1, len(piece.piece)):
            pair = piece.piece[:i], piece.piece[i:]
            if pair[0] in ids and pair[1] in ids:
                ranked.append((-piece.score, ids[pair[0]], ids[pair[1]], pair))  # highest score first
    merges = [pair for *_, pair in sorted(ranked)]
    unknown = proto.pieces[trainer.unk_id].piece
    built = Tokenizer(
        models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=bool(trainer.byte_fallback))
    )
    steps: list[Any] = [normalizers.Precompiled(rules.precompiled_charsmap)] if rules.precompiled_charsmap else []
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    if rules.add_dummy_prefix and legacy:
        steps.append(normalizers.Prepend(SPACE))
    elif rules.add_dummy_prefix:  # before the whole text only, whose own spaces are SPACE at this stage
        built.pre_tokenizer = Sequence([Metaspace(" ", "first", False), Metaspace(SPACE, "never", False)])
    built.normalizer = normalizers.Sequence([*steps, normalizers.Replace(" ", SPACE)])
    strip = [decoders.Strip(" ", 1, 0)] if rules.add_dummy_prefix else []
    built.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse(), *strip])
    control, user = 3, 4
    added = [piece for piece in proto.pieces if piece.type in (control, user)]
    unk = [AddedToken(unknown, normalized=False, special=True)]
    built.add_tokens([*unk, *(AddedToken(p.piece, normalized=False, special=p.type == control) for p in added)])
    named = {"bos_token": trainer.bos_id, "eos_token": trainer.eos_id, "unk_token": trainer.unk_id}
    specials = {name: proto.pieces[i].piece for name, i in named.items() if i >= 0}
    return built, specials
