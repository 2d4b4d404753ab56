"""Atomic writes of files: whole, or as before."""

import pytest
from trialign.engine.storage.atomic import atomic_file, write_text


def test_a_file_is_whole_or_as_before(tmp_path):
    path = tmp_path / "new" / "facts.json"
    write_text(path, "1")
    with pytest.raises(KeyboardInterrupt), atomic_file(path) as aside:
        aside.write_text("half")
        assert path.read_text() == "1"
        raise KeyboardInterrupt
    assert path.read_text() == "1"
    write_text(path, "2")
    assert path.read_text() == "2" and [p.name for p in path.parent.iterdir()] == ["facts.json"]
