"""Datasets of the library datasets: by name, or saved in a folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from megamask.data.formats.fields import text_field
from megamask.data.formats.lines import BadDocument, SubsetText

SHOWN = 500
"""Number of characters of the library's message that an error shows."""


def is_saved(folder: Path) -> bool:
    """Whether ``folder`` is a saved dataset or a saved dictionary of splits."""
    return (folder / "state.json").exists() or (folder / "dataset_dict.json").exists()


def splits(folder: Path) -> list[str] | None:
    """The splits that are saved in ``folder``; None if it is one dataset without splits."""
    if not (folder / "dataset_dict.json").exists():
        return None
    try:
        listed = json.loads((folder / "dataset_dict.json").read_bytes())["splits"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [str(name) for name in listed] if isinstance(listed, list) else []


def read_saved_dataset(
    name: str, folder: Path | None, split: str, field: str, split_by: str | None = None
) -> Iterator[str | SubsetText | BadDocument]:
    """The string in ``field``, and in ``split_by``, of each row of ``split``.

    Without a folder, of the dataset NAME[:CONFIG].
    """
    import datasets

    try:
        if folder is not None:
            table = datasets.load_from_disk(str(folder))
            if isinstance(table, datasets.DatasetDict):
                table = table[split]
        else:
            path, _, config = name.partition(":")
            table = datasets.load_dataset(path, config or None, split=split, streaming=True)
        for row, record in enumerate(table, start=1):
            yield text_field(f"{name}, row {row}", record, field, split_by)
    except Exception as error:  # the library raises many types: no such name, no network, a corrupt file
        # the second line of its message names the splits or configurations that exist
        reason = " ".join(str(error).split())[:SHOWN] or type(error).__name__
        where = "is not a file or folder, and as a dataset" if folder is None else "as a dataset"
        yield BadDocument(f"{name} {where} cannot be read (split {split!r}, `dataset_split`): {reason}", ends_file=True)
