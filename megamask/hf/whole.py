"""A folder of a model that is written as a whole, or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from megamask.errors import StorageError
from megamask.storage.durable import atomic_folder


@contextmanager
def new_model_folder(output: Path) -> Iterator[Path]:
    """`atomic_folder`, but it raises StorageError if the folder cannot be written."""
    try:
        with atomic_folder(output) as temporary:
            yield temporary
    except (OSError, SafetensorError) as error:
        if isinstance(error, OSError) and error.errno is None:
            raise  # transformers raised it, not the storage
        raise StorageError(f"{output} cannot be written: {getattr(error, 'strerror', None) or error}.") from None
