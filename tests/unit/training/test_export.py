"""What an export needs is written into the run folder, or the error names what failed."""

from __future__ import annotations

import errno
import os

import pytest

from megamask.data.shards import Shards
from megamask.errors import StorageError
from megamask.model.shape import EncoderShape
from megamask.training.export import write_description
from tests.unit.training.stand_ins import bare, fails

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_a_failure_to_describe_the_run_is_a_sentence_with_code_7(run, tmp_path) -> None:
    shape = bare(EncoderShape, save=lambda folder: None)
    with pytest.raises(StorageError, match=r"could not describe the run"):
        write_description(run, shape, bare(Shards, folder=tmp_path / "nowhere"))
    with pytest.raises(StorageError, match=r"could not describe the run: No space left on device"):
        write_description(run, bare(EncoderShape, save=fails(FULL)), bare(Shards, folder=tmp_path))
