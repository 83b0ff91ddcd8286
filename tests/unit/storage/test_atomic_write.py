"""A file or folder is replaced as a whole, everything in it is synced first, and a failure changes nothing."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from megamask.storage import atomic_write
from megamask.storage.atomic_write import atomic_folder, write_atomic
from megamask.storage.file_list import list_files


@pytest.fixture
def operations(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """The syncs and renames, in order."""
    done: list[tuple] = []
    for name in ("sync", "rename"):
        act = getattr(atomic_write, name)

        def recorded(*paths: Path, act=act, name=name) -> None:
            done.append((name, *(path.resolve() for path in paths)))
            act(*paths)

        monkeypatch.setattr(atomic_write, name, recorded)
    return done


@pytest.mark.parametrize("content", ["text", b"text", [b"te", memoryview(b"xt")], iter([b"text"])])
def test_a_file_is_written_in_one_step(tmp_path: Path, operations: list[tuple], content) -> None:
    path = tmp_path / "file"
    path.write_text("old")
    entry = write_atomic(path, content)
    assert path.read_text() == "text" and {"file": entry} == list_files(tmp_path, ["file"])
    assert [name for name, *_ in operations] == ["rename", "sync"] and operations[-1] == ("sync", tmp_path)
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_stays_as_it_was_after_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("old")

    def half():
        yield b"half"
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "file", half())
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


@pytest.mark.parametrize("before", ["nothing", "an empty folder", "a full folder"])
def test_a_folder_appears_in_one_step(tmp_path: Path, operations: list[tuple], before: str) -> None:
    output = tmp_path / "output"
    if before != "nothing":
        output.mkdir()
    if before == "a full folder":
        (output / "old").write_text("old")
    with atomic_folder(output) as temporary:
        (temporary / "inside").mkdir()
        (temporary / "inside" / "new").write_text("new")
        paths = [temporary / "inside" / "new", temporary / "inside", temporary]
    assert [path.name for path in output.rglob("*")] == ["inside", "new"]
    assert list(tmp_path.iterdir()) == [output]
    # the content is durable before the name is
    renamed = operations.index(("rename", temporary, output))
    assert all(("sync", path) in operations[:renamed] for path in paths)
    assert ("sync", tmp_path) in operations[renamed:]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_a_folder_stays_as_it_was_after_an_error(tmp_path: Path, error: type[BaseException]) -> None:
    output = tmp_path / "output"
    output.mkdir()
    (output / "old").write_text("old")
    with pytest.raises(error), atomic_folder(output) as temporary:
        (temporary / "new").write_text("new")
        raise error
    assert list(tmp_path.rglob("*")) == [output, output / "old"]


def test_a_rename_that_fails_gives_the_old_folder_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "output"
    output.mkdir()
    (output / "old").write_text("old")
    rename = atomic_write.rename

    def fails(old: Path, new: Path) -> None:
        if old.name.startswith(".tmp-"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        rename(old, new)

    monkeypatch.setattr(atomic_write, "rename", fails)
    with pytest.raises(OSError, match="Input/output error"), atomic_folder(output):
        pass
    assert list(tmp_path.rglob("*")) == [output, output / "old"]
    monkeypatch.setattr(
        atomic_write, "rename", lambda old, new: rename(old, new) if new != output else fails(temporary, new)
    )
    with pytest.raises(OSError, match="Input/output error"), atomic_folder(output) as temporary:
        pass
    assert next(tmp_path.glob(".old-*/old")).read_text() == "old"  # not deleted, though it has no name
