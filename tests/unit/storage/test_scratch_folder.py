"""Scratch folders belong to one process and do not outlive it for long."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from megamask.storage.scratch_folder import ScratchFolder

KILLED = """
import sys, time
from pathlib import Path
from megamask.storage.scratch_folder import ScratchFolder
folder = ScratchFolder(Path(sys.argv[1]))
(folder.path / "weights").write_text("some")
print(folder.path, flush=True)
time.sleep(600)
"""


def test_each_has_its_own_and_deletes_it(tmp_path: Path) -> None:
    first, second = ScratchFolder(tmp_path / "disk"), ScratchFolder(tmp_path / "disk")
    assert first.path != second.path
    (first.path / "weights").write_text("some")
    first.close()
    assert not first.path.exists() and second.path.is_dir()
    second.close()
    assert list((tmp_path / "disk").iterdir()) == []


def test_that_of_a_killed_process_is_deleted_by_the_next_and_no_other(tmp_path: Path) -> None:
    other = tmp_path / "someone_else"
    other.mkdir()
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    folder = Path(process.stdout.readline().strip())
    ScratchFolder(tmp_path).close()
    assert (folder / "weights").exists()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    ScratchFolder(tmp_path).close()
    assert not folder.exists() and other.exists()


def test_a_file_in_its_place_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match="file"):
        ScratchFolder(tmp_path / "file")
