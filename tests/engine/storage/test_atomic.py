"""Atomic writes of files and folders."""

import pytest
from trialign.engine.storage.atomic import atomic_file, replace_folder, write_text


def test_failed_write_leaves_the_file_unchanged(tmp_path):
    path = tmp_path / "new" / "facts.json"
    write_text(path, "1")
    with pytest.raises(KeyboardInterrupt), atomic_file(path) as aside:
        aside.write_text("half")
        assert path.read_text() == "1"
        raise KeyboardInterrupt
    assert path.read_text() == "1"
    write_text(path, "2")
    assert path.read_text() == "2" and [p.name for p in path.parent.iterdir()] == ["facts.json"]


def test_replaced_folder_has_the_new_files_alone(tmp_path):
    for name in ("old", "new", ".old.deleted"):  # the last one is of a killed process
        write_text(tmp_path / name / name, name)
    replace_folder(tmp_path / "old", tmp_path / "new")
    assert [str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*")] == ["old", "old/new"]
