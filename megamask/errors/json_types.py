"""Types of settings in the words of a JSON or TOML file, for sentences about a value of another type."""

from __future__ import annotations

import types
from dataclasses import is_dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from megamask.errors import shown_value

NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", Path: "text", type(None): "null"}

KINDS = {
    bool: "a boolean", int: "a number", float: "a number", str: "a string", list: "a list", dict: "an object",
    type(None): "null",
}  # fmt: skip


def json_kind(value: object) -> str:
    """The type of ``value`` in the words of JSON, such as "a list", or its name in Python if JSON has no such type."""
    return KINDS.get(type(value), type(value).__name__)


def type_rule(hint: Any) -> str:
    """What a file must hold for the type ``hint``, as the end of "must ...": "be a whole number or null"."""
    *others, last = dict.fromkeys(name for member in union_members(hint) for name in _names(member))
    return f"be {', '.join(others)} or {last}" if others else f"be {last}"


def bare_type(hint: Any) -> Any:
    """``hint`` without what ``Annotated`` adds."""
    return bare_type(get_args(hint)[0]) if get_origin(hint) is Annotated else hint


def union_members(hint: Any) -> list[Any]:
    """The types that a union allows, each without what ``Annotated`` adds; of another type, itself."""
    hint = bare_type(hint)
    if get_origin(hint) not in (Union, types.UnionType):
        return [hint]
    return [one for member in get_args(hint) for one in union_members(member)]


def _names(hint: Any) -> list[str]:
    if get_origin(hint) is Literal:
        return [shown_value(value) for value in get_args(hint)]
    if isinstance(hint, type) and issubclass(hint, Enum):
        return [shown_value(member.value) for member in hint]
    if hint in NAMES:
        return [NAMES[hint]]
    if is_dataclass(hint):
        return ["a table of settings"]
    return ["a list" if (get_origin(hint) or hint) in (list, tuple, set) else "an object"]
