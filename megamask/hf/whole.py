"""A folder that appears whole or not at all."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from megamask.errors import StorageError
from megamask.storage import durable


@contextmanager
def atomic_folder(output: Path) -> Iterator[Path]:
    """A new folder beside ``output`` to write into; it becomes ``output`` at the end, in place of what was there.

    Whatever is raised meanwhile, nothing is left but what was there before. Raises StorageError if it cannot be
    written.
    """
    temporary, old = (output.with_name(f".{kind}-{output.name}-{os.getpid()}") for kind in ("tmp", "old"))
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        yield temporary
        if output.exists():
            os.rename(output, old)
        try:
            os.rename(temporary, output)
        except OSError:
            if old.exists():
                os.rename(old, output)
            raise
        durable.sync(output.parent)
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno is None:
            raise  # of transformers, not of the disk
        raise StorageError(f"{output} cannot be written: {getattr(error, 'strerror', None) or error}.") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
