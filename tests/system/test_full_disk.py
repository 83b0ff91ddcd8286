"""A full disk ends every command with exit code 7 and a sentence, and leaves nothing half written.

Files cannot grow beyond a limit of the operating system here, which fails at any byte, in any library.
"""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import pytest

from megamask import pretrain
from megamask.__main__ import SUBCOMMANDS, main
from megamask.errors import StorageError
from tests.system.command_lines import ELSEWHERE, LINES, WRITE_NOTHING, Place, export_for_tests
from tests.system.commands import Ended, content, run, shell


@pytest.fixture
def place(folder: Path, data: Path, finished: Path, tmp_path: Path) -> Place:
    return Place(tmp_path, data, finished, export_for_tests(finished, folder))


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file of this process and its children can grow beyond ``size`` bytes.

    Python would keep a compiled module that it cut at this size, so it writes none.
    """
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    with patch.object(sys, "dont_write_bytecode", True), patch.dict(os.environ, PYTHONDONTWRITEBYTECODE="1"):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)


def start(name: str, place: Place) -> Ended:
    arguments = LINES[name](place)
    if name == "bench":  # the Trainer wants a process of its own
        return shell(sys.executable, "-m", "megamask", name, *arguments)
    return run(pretrain.main, *arguments) if name == "pretrain" else run(main, *name.split(), *arguments)


def test_every_command_is_tried() -> None:
    assert SUBCOMMANDS.keys() - LINES.keys() <= ELSEWHERE


@pytest.mark.slow
@pytest.mark.parametrize("name", LINES)
def test_a_full_disk_ends_a_command_and_the_same_command_continues(name: str, place: Place) -> None:
    LINES[name](place)
    before = content(place.folder)
    sizes = {"export": (0, 40_000), "import": (0, 40_000), "pretrain": (0, 40_000), "bench": (600,)}
    for size in sizes.get(name, (0, 600)):
        with largest_file(size):
            ended = start(name, place)
        assert "Traceback" not in ended.err
        if name in WRITE_NOTHING:
            assert ended.code == 0, ended.err
            continue
        assert (ended.code, "File too large" in ended.err) == (StorageError.exit_code, True), ended.err
        assert len(ended.err.strip().splitlines()[-1]) < 500
        if "Finished work stays in" not in ended.err and name != "pretrain":
            assert content(place.folder) == before
            assert not place.output.exists()
    ended = start(name, place)
    assert ended.code == 0, ended.err


@pytest.mark.parametrize("name", ["inspect", "pretrain"])
def test_without_a_folder_for_temporary_files_a_command_names_them(name: str, place: Place) -> None:
    """torch asks for one when it is imported."""
    with largest_file(0):
        done = shell(sys.executable, "-m", "megamask", name, *LINES[name](place))
    assert done.code == StorageError.exit_code
    assert "No usable temporary directory" in done.err and "set TMPDIR to a folder with space" in done.err
    assert "Traceback" not in done.err
