"""Files are written whole or not at all."""

from pathlib import Path

import pytest

from shiva_search.errors import InputError
from shiva_search.records.files import check_folder_writable, read_json, write_atomic, write_json


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})

    def fail(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match="No space left"):
        write_atomic(path, fail)
    assert read_json(path, "file") == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_nan_never_reaches_a_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="JSON"):
        write_json(tmp_path / "x.json", {"a": float("nan")})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("folder", ["/proc/shiva", "/dev/null/x"])
def test_a_folder_that_cannot_be_written_is_refused_early(folder: str) -> None:
    with pytest.raises(InputError, match="cannot write"):
        check_folder_writable(Path(folder))


def test_looking_whether_a_folder_can_be_written_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "there").mkdir()
    for folder in ("there", "reports/run"):
        check_folder_writable(tmp_path / folder)
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]


def test_a_full_disk_is_refused_early(tmp_path: Path) -> None:
    (tmp_path / "full").symlink_to("/dev/full")
    with pytest.raises(InputError, match="No space left"):
        write_atomic(tmp_path / "x", lambda _: (tmp_path / "full").write_text("text"))
    assert not (tmp_path / "x").exists()
