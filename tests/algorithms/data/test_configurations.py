"""Data sets of several configurations: read by `name:config:split`, from a folder and by the code that reads the hub.

To `datasets` a folder with a README.md is such a data set, so nothing is fetched here.
"""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from samples import write_jsonl
from trialign.algorithms.data.sources import _read_hub, read_rows

ROWS = {"main": {"train": "ab", "test": "c"}, "socratic": {"train": "d"}}
EVERY = ("main:train", "main:test", "socratic:train")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("set")
    card = "---\nconfigs:\n"
    for config, splits in ROWS.items():
        (folder / config).mkdir()
        card += f"- config_name: {config}\n  data_files:\n"
        for split, texts in splits.items():
            card += f"  - split: {split}\n    path: {config}/{split}.jsonl\n"
            write_jsonl(folder / config / f"{split}.jsonl", [{"prompt": text} for text in texts])
    (folder / "README.md").write_text(f"{card}---\n")
    return folder


def from_folder(folder: Path, chosen: str) -> Iterator:
    return read_rows(f"{folder}:{chosen}" if chosen else str(folder))


def from_hub(folder: Path, chosen: str) -> Iterator:
    return _read_hub(str(folder), chosen)


@pytest.mark.parametrize("read", [from_folder, from_hub])
def test_configuration_and_split_are_selected(folder, read: Callable[..., Iterator]):
    texts = {chosen: "".join(row["prompt"] for _, row in read(folder, chosen)) for chosen in (*EVERY, "socratic")}
    assert texts == {"main:train": "ab", "main:test": "c", "socratic:train": "d", "socratic": "d"}
    for chosen in ("", "train", "main:dev", "other:train", "train[:1]"):
        with pytest.raises(ValueError) as error:
            list(read(folder, chosen))
        assert str(error.value).startswith(f"data source {folder}{':' * bool(chosen)}{chosen}: ")
        assert ", ".join(f"{folder}:{one}" for one in EVERY) in str(error.value)


def test_hub_default_split_and_slices(folder):
    assert [row["prompt"] for _, row in from_hub(folder, "main")] == ["a", "b"]
    assert [row["prompt"] for _, row in from_hub(folder, "main:train[1:]")] == ["b"]
    with pytest.raises(ValueError, match="name one"):
        list(from_folder(folder, "main"))
    with pytest.raises(ValueError, match="data source no/such:main:train: no such file or folder.*hub"):
        list(read_rows("no/such:main:train"))
