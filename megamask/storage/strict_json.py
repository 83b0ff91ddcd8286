"""JSON files, read whole or refused with a reason.

This module refuses what a parser would silently accept or fail on: a key that appears twice, NaN and Inf, very deep
nesting, a pipe or a device instead of a file, a file that is too large. It reads 50 MB a second.
"""

from __future__ import annotations

import json
import math
import os
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from megamask.errors import MegamaskError

LARGEST = 2**27
"""Largest size of a JSON file in bytes: that of a manifest of a million shards."""
LARGEST_SETTINGS = 2**18
"""Largest size of a file of settings in bytes."""
DEEPEST = 64
"""Largest number of nested levels."""


class BadRecord(ValueError):
    """A file that is not what it should be; ``str`` says why, without its name."""


def read_json(path: Path, most: int = LARGEST) -> Any:
    """The content of the JSON file at ``path``. Raises BadRecord, or OSError if it cannot be read."""
    return parse_json(read_text(path, most))


def read_object(path: Path, error: type[MegamaskError], missing: str, cure: str = "") -> dict[str, Any]:
    """The JSON object at ``path``. Raises ``error`` with a sentence; ``missing`` is the one for a missing file.

    ``cure`` says what to do about a file that is not such an object.
    """
    end = f" {cure}" if cure else ""
    try:
        content = read_json(path)
    except (FileNotFoundError, NotADirectoryError):
        raise error(missing) from None
    except OSError as failure:
        raise error(f"{path} cannot be read: {failure.strerror}.") from None
    except BadRecord as failure:
        raise error(f"{path} is not valid JSON: {failure}.{end}") from None
    if not isinstance(content, dict):
        raise error(f"{path} must contain a JSON object.{end}")
    return content


def read_text(path: Path, most: int) -> str:
    """The text of a regular file of at most ``most`` bytes. Raises BadRecord or OSError."""
    # a pipe would block, and a device has no end
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise BadRecord("it is not a regular file")
    with open(handle, "rb") as file:
        raw = file.read(most + 1)
    if len(raw) > most:
        raise BadRecord(f"it has more than {most:,} bytes")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecord(f"it is not UTF-8: byte {error.start} is 0x{raw[error.start]:02x}") from None


def parse_json(text: str, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """The content of the JSON ``text``; raises BadRecord. ``pairs`` makes a table of its keys and values."""
    try:
        content = json.loads(
            text, object_pairs_hook=pairs or _unique, parse_constant=parse_finite, parse_float=parse_finite
        )
    except RecursionError:
        raise BadRecord(f"it is nested more than {DEEPEST} levels deep") from None
    except BadRecord:
        raise
    except ValueError as error:
        raise BadRecord(str(error)) from None
    check_depth(content)
    return content


def to_json(tree: Any) -> bytes:
    """``tree`` as JSON, for parsers that take bytes."""
    return json.dumps(tree).encode()


def parse_finite(number: str) -> float:
    """The value of a number; BadRecord for NaN and Inf."""
    value = float(number)
    if not math.isfinite(value):
        raise BadRecord(f"{number[:40]} is not a finite number")
    return value


def check_depth(tree: Any) -> None:
    """BadRecord if ``tree`` is nested more than ``DEEPEST`` levels deep."""
    level, depth = [tree], 0
    while level:
        depth += 1
        if depth > DEEPEST:
            raise BadRecord(f"it is nested more than {DEEPEST} levels deep")
        level = [
            child
            for node in level
            if isinstance(node, (dict, list))
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, (dict, list))
        ]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        raise BadRecord(f"it has the key {_repeated(key for key, _ in pairs)!r} twice")
    return table


def _repeated(keys: Iterable[str]) -> str:
    seen: set[str] = set()
    return next(key for key in keys if key in seen or seen.add(key))  # type: ignore[func-returns-value]
