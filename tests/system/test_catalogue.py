"""Every bad input of the catalogue ends in a sentence with its culprits and the exit code of its kind; what was there
stays."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from megamask.data import manifest
from tests.system.catalogue import runs, settings, shards, teachers, texts
from tests.system.catalogue.row import DONE, Ground, Row
from tests.system.commands import content, run

ROWS = [
    *settings.SETTINGS, *texts.TEXT, *texts.TOKENIZERS, *shards.SHARDS, *teachers.TEACHERS, *runs.RUNS, *runs.STORAGES,
]  # fmt: skip


PASSING = ("lock", "request", "environment.json")
"""Ends of the names of files in which each launch writes."""


@pytest.fixture
def ground(data: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Ground:
    return Ground(tmp_path, data, finished, monkeypatch)


def held(folder: Path) -> Counter:
    """How often each content of a file is there, whatever its name, but for what each launch writes."""
    return Counter(digest for name, digest in content(folder).items() if not name.endswith(PASSING))


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_bad_input_is_named(row: Row, ground: Ground) -> None:
    main, arguments = row.plant(ground)
    before, made = held(ground.folder), [ground.folder / "made", ground.folder / "exported", ground.folder / "start"]
    there = [path.exists() for path in made]
    published = set(ground.folder.rglob("step-*/MANIFEST.json"))
    assert not row.wrong(run(main, *arguments))
    assert not row.stays or not before - held(ground.folder), "something is gone"
    if row.code != DONE:
        assert [path.exists() for path in made] == there
        assert not set(ground.folder.rglob("step-*/MANIFEST.json")) - published


def test_names_of_rows_are_unique() -> None:
    assert len({row.name for row in ROWS}) == len(ROWS)


def test_a_reader_that_sees_nothing_is_found(ground: Ground, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shards whose sizes nobody compares, and a sentence that does not say which."""
    (row,) = (row for row in ROWS if row.name == "a flipped bit")
    main, arguments = row.plant(ground)
    find = manifest.file_problems
    monkeypatch.setattr(manifest, "file_problems", lambda *given, **named: dict.fromkeys(find(*given, **named), "?"))
    assert row.wrong(run(main, *arguments))
    monkeypatch.setattr(manifest, "file_problems", lambda *given, **named: {})
    assert row.wrong(run(main, *arguments))
