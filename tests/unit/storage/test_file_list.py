"""A list of files is what was written, and every difference is a sentence with the file's name."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from megamask.storage.file_list import (
    FileEntry,
    FileList,
    damage,
    from_record,
    is_inside,
    list_files,
    sha256,
    to_record,
)


@pytest.fixture
def files(tmp_path: Path) -> FileList:
    (tmp_path / "inside").mkdir()
    for name, content in {"a.npy": b"some bytes", "inside/b.json": b"{}"}.items():
        (tmp_path / name).write_bytes(content)
    return list_files(tmp_path, ["a.npy", "inside/b.json"])


def test_an_unchanged_list_has_no_damage(tmp_path: Path, files: FileList) -> None:
    assert damage(tmp_path, files) == {}
    assert from_record(to_record(files)) == files
    assert files["a.npy"] == FileEntry(10, hashlib.sha256(b"some bytes").hexdigest())


def test_reading_reports_every_byte(tmp_path: Path, files: FileList) -> None:
    counts: list[int] = []
    assert sha256(tmp_path / "a.npy", counts.append) == files["a.npy"].sha256
    assert sum(counts) == 10


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(b"more than some bytes"), "has 20 bytes, but 10 were written"),
        (lambda path: path.write_bytes(b"some bytez"), "is damaged: its sha256"),
        (lambda path: (path.rename(path.parent / "c"), path.symlink_to(path.parent / "c")), "is not a regular file"),
        (lambda path: (path.unlink(), path.mkdir()), "is not a regular file"),
    ],
)
def test_each_difference_is_named(tmp_path: Path, files: FileList, change, sentence: str) -> None:
    change(tmp_path / "a.npy")
    problems = damage(tmp_path, files)
    assert problems.keys() == {"a.npy"}
    assert str(tmp_path / "a.npy") in problems["a.npy"] and sentence in problems["a.npy"]


def test_without_hashes_only_sizes_count(tmp_path: Path, files: FileList) -> None:
    (tmp_path / "a.npy").write_bytes(b"some bytez")
    assert not damage(tmp_path, files, hashes=False)


@pytest.mark.parametrize("name", ["../a", "/etc/passwd", ".hidden", "a/../b", "", "a//b", "a/", "a\0b", "a\n", "ä"])
def test_a_name_outside_of_the_folder_is_refused(tmp_path: Path, name: str) -> None:
    assert not is_inside(name)
    assert "which leads out of the folder" in damage(tmp_path, {name: FileEntry(1, "")})[name]


def test_a_linked_folder_leads_out(tmp_path: Path, files: FileList) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "linked").symlink_to(tmp_path / "inside")
    problems = damage(tmp_path / "folder", {"linked/b.json": files["inside/b.json"]})
    assert "which leads out of the folder" in problems["linked/b.json"]


def test_storage_that_fails_is_not_damage(tmp_path: Path, files: FileList, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(path: Path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "lstat", fails)
    with pytest.raises(OSError, match="Input/output error"):
        damage(tmp_path, files)


def test_other_keys_of_an_entry_are_ignored():
    assert from_record({"a": {"bytes": 1, "sha256": "x", "mode": 7}}) == from_record({"a": {"bytes": 1, "sha256": "x"}})
