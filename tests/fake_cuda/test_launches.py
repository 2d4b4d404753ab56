"""Launches and waits in docs/performance.md, counted on a fake CUDA device; as a program: writes them."""

import re
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import pytest

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))
    import conftest  # noqa: F401 (finds the helpers)

from fake_run import FakeCuda
from plant import line_of
from probes import Decoding, Work, decode, faulty, train
from tiny import tiny_llama
from tiny_moe import tiny_mixtral
from trialign.engine.generation.runner import ModelRunner

PAGE = Path(__file__).resolve().parents[2] / "docs" / "performance.md"
KINDS = {"dense": 1, "LoRA": 1, "QLoRA": 1, "mixture": 1, "mixture, ep=2": 2}


class Counts(NamedTuple):
    """Counts of a kind of model, by its number of layers."""

    train: dict[int, tuple[Work, set[str]]]
    eager: dict[int, Decoding]
    captured: Decoding

    def rows(self, kind: str) -> dict[str, tuple[str, str]]:
        """Row of the table -> launches and waits."""
        rows = {
            f"micro-batch, {kind}": in_layers({layers: work for layers, (work, _) in self.train.items()}),
            f"decode step, {kind}": in_layers({layers: found.step for layers, found in self.eager.items()}),
        }
        if self.captured.replays:
            rows[f"captured decode step, {kind}"] = in_layers(dict.fromkeys((2, 4), self.captured.step))
        return rows | {"plan of a decode step": in_layers({layers: found.plan for layers, found in self.eager.items()})}


def in_layers(counts: dict[int, Work]) -> tuple[str, str]:
    """Launches and waits of L layers, from those of two and four."""
    cells = []
    for two, four in list(zip(counts[2], counts[4], strict=True))[:2]:
        a_layer, odd = divmod(four - two, 2)
        assert not odd, f"{two} in two layers and {four} in four"
        rest = two - 2 * a_layer
        cells.append(" + ".join([f"{a_layer} L"] * (a_layer > 0) + [str(rest)] * (rest > 0 or not a_layer)))
    return cells[0], cells[1]


def counted(fake: FakeCuda, folder: Path, kind: str) -> Counts:
    make = tiny_mixtral if kind.startswith("mixture") else tiny_llama
    ep, name, found = KINDS[kind], {"mixture": "moe"}.get(kind[:7], kind.lower()), Counts({}, {}, None)  # pyright: ignore
    for layers in (2, 4):
        path = make(folder / f"{layers}", num_hidden_layers=layers, hidden_size=128, intermediate_size=256)
        found.train[layers] = fake.call(train, str(path), name, ep, ranks=ep)[0]
        found.eager[layers] = fake.call(decode, str(path), name, ep, False, ranks=ep)[0]
    return found._replace(captured=fake.call(decode, str(folder / "4"), name, ep, True, ranks=ep)[0])


@pytest.fixture(scope="module")
def counts(fake, tmp_path_factory) -> dict[str, Counts]:
    return {kind: counted(fake, tmp_path_factory.mktemp("model"), kind) for kind in KINDS}


def table() -> dict[str, list[str]]:
    """Row -> its other cells."""
    (lines,) = re.findall(r"<!-- launches -->\n(.*?)<!-- /launches -->", PAGE.read_text(), re.DOTALL)
    rows = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in lines.splitlines()[2:]]
    return {name: cells for name, *cells in rows}


def test_table_holds_the_counts(counts):
    found = {name: list(cells) for kind, own in counts.items() for name, cells in own.rows(kind).items()}
    assert {name: cells[:2] for name, cells in table().items()} == found, f"python {__file__} writes the table"


@pytest.mark.parametrize("kind", KINDS)
def test_decode_steps_of_one_size_are_the_same_work_without_waits(counts, kind):
    """Between two plans: no wait, no copy, the same ops on the same addresses; captured, the same tokens."""
    alone, found = KINDS[kind] == 1, counts[kind]
    for own in found.eager.values():
        assert own.step.copies == 0 and own.same_launches == alone
        assert own.step.waits == 0 or not alone, own.waits
    assert found.captured.tokens == found.eager[4].tokens
    assert (found.captured.step == Work(1, 0, 0) and found.captured.replays > 10) or not alone


def test_planted_item_in_a_decode_step_is_found(fake, tmp_path):
    folder, line = str(tiny_llama(tmp_path)), line_of(ModelRunner._sample, "logits = all_gather(")
    (found,) = fake.call(faulty, folder, False)
    assert found.step.waits == 1 and found.waits == {f"item {line}"}
    (error,) = fake.call(faulty, folder, True)
    assert error == f"operation not permitted when stream is capturing: item at {line}"


def _write() -> None:
    fake, before = FakeCuda(), {name: cells[2:] for name, cells in table().items()}
    lines = ["| | launches | waits | launches before | waits before |", "|---|---|---|---|---|"]
    rows: dict[str, tuple[str, str]] = {}
    for kind in KINDS:
        with tempfile.TemporaryDirectory() as folder:
            rows |= counted(fake, Path(folder), kind).rows(kind)
    fake.close()
    for name in sorted(rows, key=lambda name: (not name.startswith("micro"), name.startswith("plan"))):
        lines.append(f"| {' | '.join([name, *rows[name], *before.get(name, ['', ''])])} |")
    text = "<!-- launches -->\n" + "\n".join(lines) + "\n<!-- /launches -->"
    PAGE.write_text(re.sub(r"<!-- launches -->.*<!-- /launches -->", text, PAGE.read_text(), flags=re.DOTALL))


if __name__ == "__main__":
    _write()
