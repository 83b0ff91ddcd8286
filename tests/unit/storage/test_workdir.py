"""The folder of finished work, when the disk is full."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from megamask.errors import StorageError
from megamask.storage import workdir


@pytest.mark.parametrize(("name", "stays"), [("0.npz", True), (".tmp-0.npz-7", False)])
def test_only_finished_files_stay_when_the_disk_is_full(tmp_path: Path, name: str, stays: bool) -> None:
    with (
        pytest.raises(StorageError, match="output cannot be written: No space left on device") as error,
        workdir.folder(tmp_path / "work", "identity", tmp_path / "output") as work,
    ):
        (work / "units").mkdir()
        (work / "units" / name).touch()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert ("Finished work stays in" in str(error.value)) == stays == (tmp_path / "work").exists()
