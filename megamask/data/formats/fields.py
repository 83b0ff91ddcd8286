"""The text of a record, and with `split_by` its subset: fields that must exist and be strings."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from megamask.data.formats.lines import SHOWN, BadDocument, SubsetText
from megamask.errors.json_types import json_kind

NAMES = 10
"""Number of fields that an error lists."""
CURE = "Set `text_field`, or leave the file out with `exclude`."
LONGEST = 200
"""Bytes of the longest name of a subset; file systems allow 255."""


def text_field(
    place: str, record: dict[str, Any], field: str, split_by: str | None = None
) -> str | SubsetText | BadDocument:
    """The string in ``field`` of a record; ``place`` says where the record is.

    With ``split_by``, also the value of that field, which must be usable as the name of a folder: text, or a whole
    number.
    """
    text = _string(place, record, field)
    if split_by is None or isinstance(text, BadDocument):
        return text
    if split_by not in record:
        problem = f"{place} has no field {split_by!r}; its fields are {quoted_names(record)}."
        return BadDocument(problem, no_subset=True)
    value = record[split_by]
    subset = str(value) if type(value) is int else _string(place, record, split_by)
    if isinstance(subset, BadDocument):
        return BadDocument(subset.problem, no_subset=True)
    if rule := subset_name_rule(subset):
        shown = repr(subset if len(subset) <= SHOWN else subset[:SHOWN] + "...")
        problem = f"{place}: the field {split_by!r} names a folder, so it must {rule}, but is {shown}."
        return BadDocument(problem, no_subset=True)
    return SubsetText(text, subset)


def subset_name_rule(name: str) -> str:
    """The rule that ``name`` breaks as the name of a folder and in `--data FOLDER=SHARE`, or ""."""
    if not name or name != name.strip():
        return "not be empty, and neither begin nor end with a space"
    if not name.isprintable() or not {"/", "="}.isdisjoint(name):
        return "have only characters that can be printed, without / and ="
    if name.startswith("."):
        return "not begin with a dot"
    return f"have at most {LONGEST} bytes" if len(name.encode()) > LONGEST else ""


def _string(place: str, record: dict[str, Any], field: str) -> str | BadDocument:
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


def missing_column(
    path: object, field: str, names: Iterable[str], more: str = "", setting: str = "text_field"
) -> BadDocument:
    """The error for a table without the column ``field``, which ``setting`` names."""
    cure = CURE.replace("text_field", setting)
    return BadDocument(
        f"{path} has no column {field!r}; its columns are {quoted_names(names)}.{more} {cure}", ends_file=True
    )


def quoted_names(names: Iterable[str]) -> str:
    """The first names, each shortened; "none" if there are none."""
    names = list(names)
    shown = [repr(name if len(name) <= SHOWN else name[:SHOWN] + "...") for name in names[:NAMES]]
    more = [f"{len(names) - NAMES} more"] if len(names) > NAMES else []
    return ", ".join(shown + more) or "none"
