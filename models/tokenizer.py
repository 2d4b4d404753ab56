"""The tokenizer of a model's folder, read without running code that lies in it.

transformers reads most. A bare sentencepiece `tokenizer.model` (LLaMA 1 and 2, Baichuan) it reads too, but version 5
cuts text by other merges than the model was trained with and leaves the first token out, so that one is built here and
held against sentencepiece itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from .config import model_folder, read_json

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

SPACE = "▁"  # sentencepiece's mark for a space
_KEPT = "chat_template pad_token additional_special_tokens model_max_length padding_side".split()
_PROBES = (
    "The quick brown fox jumps over 12 lazy dogs.",
    "  Two  spaces,\ttabs\nand\n\nlines ",
    "naïve café, 你好，世界！ Привет 🙂 ١٢",
    "def f(x):\n    return x ** 2  # {'a': [1, 2]}\n",
    "",
)


def read_tokenizer(folder: Path | str) -> PreTrainedTokenizerBase:
    """The tokenizer that lies in `folder`, as transformers reads it or out of a bare tokenizer.model.

    Raises:
        ValueError: there is none, or it needs code from the folder, or it cannot be read as it was meant.
    """
    from transformers import AutoTokenizer

    folder = model_folder(folder)
    if is_bare(folder):
        return sentencepiece_tokenizer(folder)
    try:
        # Said outright: left open, transformers asks on the terminal and waits.
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library raises its own kinds, none of which names the folder
        raise ValueError(f"{folder}: no tokenizer can be read from it: {error}") from error


def _settings(folder: Path) -> dict[str, Any]:
    path = folder / "tokenizer_config.json"
    return read_json(path) if path.is_file() else {}


def is_bare(folder: Path) -> bool:
    """Whether only a sentencepiece model says how to cut text: no tokenizer.json, no class that transformers has."""
    if not (folder / "tokenizer.model").is_file() or (folder / "tokenizer.json").is_file():
        return False
    settings = _settings(folder)
    return "tokenizer_class" not in settings or "AutoTokenizer" in settings.get("auto_map", {})


def sentencepiece_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The byte-pair model in `folder`/tokenizer.model as a tokenizer of transformers.

    tokenizer_config.json decides on the first and last token and on the chat template where it is there; without it
    the first token is put before a text, as LLaMA's own code does.

    Raises:
        ValueError: it is no byte-pair model of sentencepiece, or what is built cuts a text in another way.
    """
    from sentencepiece import SentencePieceProcessor
    from tokenizers import processors
    from transformers import PreTrainedTokenizerFast

    path, settings = folder / "tokenizer.model", _settings(folder)
    built, specials = _byte_pair(path)
    original = SentencePieceProcessor(model_file=str(path))
    for probe in _PROBES:
        ours, theirs = built.encode(probe, add_special_tokens=False).ids, original.encode(probe)
        if ours != theirs:
            raise ValueError(f"{path}: read by the tokenizers library {probe!r} becomes {ours}, it should be {theirs}")
    first = [specials["bos_token"]] if settings.get("add_bos_token", True) and "bos_token" in specials else []
    last = [specials["eos_token"]] if settings.get("add_eos_token", False) and "eos_token" in specials else []
    if first or last:
        built.post_processor = processors.TemplateProcessing(
            single=[*first, "$A", *last],
            pair=[*first, "$A", *last, *first, "$B", *last],
            special_tokens=[(token, built.token_to_id(token)) for token in {*first, *last}],
        )
    options = {key: settings[key] for key in _KEPT if settings.get(key) is not None}
    template = folder / "chat_template.jinja"
    if template.is_file():
        options["chat_template"] = template.read_text(encoding="utf-8")
    return PreTrainedTokenizerFast(tokenizer_object=built, clean_up_tokenization_spaces=False, **specials | options)


def _byte_pair(path: Path) -> tuple[Tokenizer, dict[str, str]]:
    """The model as the tokenizers library has it, and its special tokens by transformers' names."""
    from google.protobuf.message import DecodeError
    from sentencepiece import sentencepiece_model_pb2
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers

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
        for cut in range(1, len(piece.piece)):
            pair = piece.piece[:cut], piece.piece[cut:]
            if pair[0] in ids and pair[1] in ids:
                ranked.append((-piece.score, ids[pair[0]], ids[pair[1]], pair))  # the best score is merged first
    merges = [pair for *_, pair in sorted(ranked)]
    unknown = proto.pieces[trainer.unk_id].piece
    built = Tokenizer(
        models.BPE(ids, merges, unk_token=unknown, fuse_unk=True, byte_fallback=bool(trainer.byte_fallback))
    )
    steps: list[Any] = [normalizers.Precompiled(rules.precompiled_charsmap)] if rules.precompiled_charsmap else []
    if rules.remove_extra_whitespaces:
        steps += [normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    steps += [normalizers.Prepend(SPACE)] if rules.add_dummy_prefix else []
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
