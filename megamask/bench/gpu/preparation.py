"""What is checked, held and prepared before anything is measured on a GPU. Without torch."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from megamask.bench.gpu.parts import PARTS
from megamask.bench.gpu.settings import GpuBenchConfig, PartName
from megamask.bench.gpu.sizes import open_text, sizes
from megamask.data.shards import Shards
from megamask.errors import DataError, StorageError, must
from megamask.storage.lock import Lock, names_launch

LOCK = "lock"
LEAST_PACKS = 4
"""Packs of the largest size that the text must have, so that steps read different ones."""


def reads_text(parts: Sequence[PartName]) -> bool:
    """Whether one of ``parts`` trains."""
    return any(PARTS[name].text for name in parts)


def text_problems(config: GpuBenchConfig) -> list[str]:
    """Sentences for what is wrong with `data`, if it is given."""
    if config.data is None:
        return []
    if not config.data.is_dir():
        rule = "be a folder of token shards, which `megamask prepare` makes"
        return [must("data", rule, str(config.data), "Without it, text of this machine is used.")]
    chosen = sizes(config)
    needed = {"train": LEAST_PACKS * max(*chosen.packs.values(), chosen.run_pack), "valid": chosen.run_pack}
    try:
        train = Shards.open(config.data)
        counts = {"train": train.tokens, "valid": train.of_split("valid").tokens}
    except DataError as error:
        return list(error.problems)
    return [
        f"`data` must have at least {least:,} tokens in the split {split!r}, but {config.data} has {counts[split]:,}. "
        "Prepare more text" + (", or a larger `--valid-share`." if split == "valid" else ".")
        for split, least in needed.items()
        if counts[split] < least
    ]


def prepare_text(config: GpuBenchConfig) -> None:
    """Prepare the text of this machine, unless it is prepared or `data` is given. Raises DataError, StorageError."""
    try:
        open_text(config)
    except OSError as error:
        raise StorageError(f"The text of this machine cannot be prepared: {error}.") from None


@contextmanager
def held_folder(output: Path) -> Iterator[None]:
    """Hold ``output``, unless the process that started this one holds it for both. Raises LockError, StorageError."""
    if names_launch(output / LOCK, _launch(os.getppid())):
        yield
        return
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = Lock(output / LOCK, _launch(os.getpid()))
    except OSError as error:
        raise StorageError(f"{output} cannot be written: {error.strerror}.") from None
    try:
        yield
    finally:
        lock.close()


def _launch(process: int) -> str:
    return f"bench-gpu-{process}"
