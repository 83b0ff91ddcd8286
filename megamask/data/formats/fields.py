"""The text of a record: a field that must exist and be a string."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from megamask.data.formats.lines import SHOWN, BadDocument
from megamask.errors.json_types import json_kind

NAMES = 10
"""Number of fields that an error lists."""
CURE = "Set `text_field`, or leave the file out with `exclude`."


def text_field(place: str, record: dict[str, Any], field: str) -> str | BadDocument:
    """The string in ``field`` of a record; ``place`` says where the record is."""
    if field not in record:
        return BadDocument(f"{place} has no field {field!r}; its fields are {quoted_names(record)}. {CURE}")
    text = record[field]
    if not isinstance(text, str):
        return BadDocument(f"{place}: the field {field!r} must be a string, but is {json_kind(text)}.")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return BadDocument(f"{place}: the field {field!r} has an unpaired surrogate at character {error.start}.")
    return text


def missing_column(path: object, field: str, names: Iterable[str], more: str = "") -> BadDocument:
    """The error for a table without the column ``field``."""
    return BadDocument(
        f"{path} has no column {field!r}; its columns are {quoted_names(names)}.{more} {CURE}", ends_file=True
    )


def quoted_names(names: Iterable[str]) -> str:
    """The first names, each shortened; "none" if there are none."""
    names = list(names)
    shown = [repr(name if len(name) <= SHOWN else name[:SHOWN] + "...") for name in names[:NAMES]]
    more = [f"{len(names) - NAMES} more"] if len(names) > NAMES else []
    return ", ".join(shown + more) or "none"
