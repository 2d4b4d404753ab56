"""Import: a Hugging Face folder, a GGUF file or another checkpoint into a checkpoint, tensor by tensor."""

from __future__ import annotations

import json
import math
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import torch
from torch import Tensor

from ...engine.mesh import mesh_as
from ...engine.parallel.shard import shard_of
from ...engine.storage.checkpoint import Entry, write
from ..config import check_layout
from ..decoder import Decoder
from .gguf import GGUFFile
from .save import assets, copy_assets
from .source import Source, open_source, read_finite
from .table import Place, blocks, places


def import_checkpoint(
    model: Path, output: Path, *, tp: int = 1, pp: int = 1, dtype: torch.dtype | None = None
) -> tuple[Source, str]:
    """Writes `model` as a checkpoint: role "actor", or "critic" where it has a score head; whole, or not at all.

    The host holds one rank's piece of one tensor at a time, whatever the model's size.

    Args:
        model: a folder, a .gguf file, a checkpoint.
        output: the checkpoint; must not exist, or be an empty folder.
        tp, pp: the files are cut as the ranks of this layout hold the model, so that each reads only its own. A run in
            any other layout reads it too.
        dtype: of the numbers; None keeps each tensor's own (float32 for quantized ones).

    Returns:
        the model as it was read, and the role.

    Raises:
        ValueError: a layout that the model cannot be cut into; a tensor or file that is missing, damaged or
            not of the model, or holds a NaN or an infinity; `output` is not empty.
        OSError: the disk is full.
    """
    source = open_source(model)
    config, head = source.config, source.config.head
    check_layout(config, tp, pp)
    role, table = "actor" if head == "lm" else "critic", places(config, head)
    found: dict[str, Place] = {}  # by entry's name

    def entries(rank: int) -> Iterator[Entry]:
        stage = Decoder(config, mesh_as(rank, tp=tp, pp=pp, device="meta"), dtype=torch.float32, head=head)
        for name, parameter in stage.named_parameters():
            shard = shard_of(parameter)
            owned = not shard.duplicate and (shard.axis is not None or rank % tp == 0)
            for piece in (piece for piece in shard.pieces if math.prod(piece.shape)):
                place = table[name, piece.part]
                key = f"{role}/master/{place.name}"
                found[key] = place
                kept = torch.empty(piece.shape, dtype=dtype or source.dtype(place), device="meta")
                yield Entry(key, piece.global_shape, piece.offset, kept, owned)

    def numbers(entry: Entry) -> Tensor:
        piece, (top, *left) = torch.empty_like(entry.tensor, device="cpu"), entry.offset
        for rows in blocks(piece.shape):
            shape = (rows.stop - rows.start, *piece.shape[1:])
            piece[rows] = read_finite(source, model, found[entry.name], (top + rows.start, *left), shape)
        return piece

    with ExitStack() as stack:
        made = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        if isinstance(source, GGUFFile):
            values = config.to_hf_dict()
            (made / "config.json").write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
            source.tokenizer().save_pretrained(made)
        else:
            copy_assets(model, made)
        state = {"imported_from": str(model), "tp": tp, "pp": pp}
        write(output, map(entries, range(tp * pp)), numbers, state, assets(made, f"{role}/"))
    return source, role
