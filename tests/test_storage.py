from pathlib import Path

import pytest

from sa_engine.storage import atomic_write


def test_atomic_write_replaces_the_whole_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.json"
    for data in (b"first", b"2nd"):
        atomic_write(path, data)
        assert path.read_bytes() == data
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_leaves_no_temporary_file(tmp_path: Path) -> None:
    (tmp_path / "taken" / "inside").mkdir(parents=True)
    with pytest.raises(OSError):
        atomic_write(tmp_path / "taken", b"data", scratch=tmp_path / "scratch")
    assert list((tmp_path / "scratch").iterdir()) == []
