"""JSON and YAML as they stand in files: read whole, or refused with a reason. Nothing in them is misread in silence.

Refused is what a parser would pass over or choke on: a key that is there twice, numbers that are none, nesting without
end, a file that is a pipe or a device or larger than such a file can be. YAML is read by the rules of its version 1.2,
where `010`, `1_000` and `yes` are words: by those of 1.1 they are 8, 1000 and true. It has no aliases and no tags.

Costs the speed of the parsers: JSON 50 MB a second, YAML 0.1.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NoReturn

import yaml

LARGEST = 2**27
"""Bytes of a JSON file, at most: a manifest of a million shards."""
LARGEST_YAML = 2**18
DEEPEST = 64
"""Levels of nesting, at most."""


class BadRecord(ValueError):
    """A file that is not what it should be; ``str`` says why, without its name."""


def read_json(path: Path, most: int = LARGEST) -> Any:
    """What the JSON file at ``path`` says. Raises BadRecord, or OSError if it is not there or cannot be read."""
    return parse_json(read_text(path, most))


def read_yaml(path: Path) -> Any:
    """What the YAML or JSON file at ``path`` says, without aliases and tags. Raises BadRecord or OSError."""
    text = read_text(path, LARGEST_YAML)
    try:
        return _Yaml(text).get_single_data()
    except yaml.MarkedYAMLError as error:
        place = f"line {error.problem_mark.line + 1}: " if error.problem_mark else ""
        raise BadRecord(place + str(error.problem or error.context)) from None
    except yaml.YAMLError as error:
        raise BadRecord(" ".join(str(error).split())) from None
    except RecursionError:
        raise BadRecord(f"it is nested more than {DEEPEST} levels deep") from None


def read_text(path: Path, most: int) -> str:
    """The text of a regular file of at most ``most`` bytes."""
    # a pipe would be waited for, and a device has no end
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise BadRecord("it is no regular file")
    with open(handle, "rb") as file:
        raw = file.read(most + 1)
    if len(raw) > most:
        raise BadRecord(f"it has more than {most:,} bytes")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadRecord(f"it is not UTF-8: byte {error.start} is 0x{raw[error.start]:02x}") from None


def parse_json(text: str, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """What the JSON ``text`` says; raises BadRecord. ``pairs`` makes a table of its names and values (json.loads)."""
    try:
        found = json.loads(text, object_pairs_hook=pairs or _once, parse_constant=_no_number, parse_float=_finite)
    except RecursionError:
        raise BadRecord(f"it is nested more than {DEEPEST} levels deep") from None
    except BadRecord:
        raise
    except ValueError as error:
        raise BadRecord(str(error)) from None
    _check_depth(found)
    return found


def to_json(tree: Any) -> bytes:
    """``tree``, as it was read, for parsers that take bytes."""
    return json.dumps(tree).encode()


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise BadRecord(f"it has the key {_twice(key for key, _ in pairs)!r} twice")
    return found


def _twice(keys: Iterable[str]) -> str:
    seen: set[str] = set()
    return next(key for key in keys if key in seen or seen.add(key))  # type: ignore[func-returns-value]


def _no_number(word: str) -> float:
    raise BadRecord(f"{word} is no number")


def _finite(digits: str) -> float:
    found = float(digits)
    if not math.isfinite(found):
        raise BadRecord(f"{digits[:40]} is no finite number")
    return found


def _check_depth(tree: Any) -> None:
    level, depth = [tree], 0
    while level:
        depth += 1
        if depth > DEEPEST:
            raise BadRecord(f"it is nested more than {DEEPEST} levels deep")
        level = [
            part
            for node in level
            if isinstance(node, (dict, list))
            for part in (node.values() if isinstance(node, dict) else node)
            if isinstance(part, (dict, list))
        ]


# ---- YAML


class _Yaml(yaml.SafeLoader):
    """The core schema of YAML 1.2, which is that of JSON."""

    yaml_implicit_resolvers: dict = {}  # noqa: RUF012
    yaml_constructors: dict = {}  # noqa: RUF012
    depth = 0

    def compose_node(self, parent, index):
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            self.refuse(event, f"the alias *{event.anchor} is refused: write out what it stands for")
        if event.tag is not None:
            self.refuse(event, f"the tag {event.tag} is refused: write a plain value")
        self.depth += 1
        if self.depth > DEEPEST:
            raise RecursionError
        try:
            return super().compose_node(parent, index)
        finally:
            self.depth -= 1

    def table(self, node: yaml.MappingNode) -> dict[str, Any]:
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:str":
                self.refuse(key, "a name must be a word")
        found = {key.value: self.construct_object(value, deep=True) for key, value in node.value}
        if len(found) != len(node.value):
            self.refuse(node, f"the key {_twice(key.value for key, _ in node.value)!r} stands there twice")
        return found

    def whole(self, node: yaml.ScalarNode) -> int:
        return self.number(node, int)

    def real(self, node: yaml.ScalarNode) -> float:
        found = self.number(node, float)
        if not math.isfinite(found):
            self.refuse(node, f"{node.value[:40]} is no finite number")
        return found

    def number(self, node: yaml.ScalarNode, kind: type):
        try:
            return kind(node.value)
        except ValueError:
            self.refuse(node, f"{node.value[:40]!r} is no number")

    def refuse(self, at: yaml.Node | yaml.Event, why: str) -> NoReturn:
        raise yaml.constructor.ConstructorError(None, None, why, at.start_mark)


_Yaml.add_constructor("tag:yaml.org,2002:map", _Yaml.table)
_Yaml.add_constructor("tag:yaml.org,2002:seq", lambda loader, node: loader.construct_sequence(node, deep=True))
_Yaml.add_constructor("tag:yaml.org,2002:str", yaml.SafeLoader.construct_scalar)
_Yaml.add_constructor("tag:yaml.org,2002:null", lambda loader, node: None)
_Yaml.add_constructor("tag:yaml.org,2002:bool", lambda loader, node: node.value.lower() == "true")
_Yaml.add_constructor("tag:yaml.org,2002:int", _Yaml.whole)
_Yaml.add_constructor("tag:yaml.org,2002:float", _Yaml.real)
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", "~nN\0"),
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0|[1-9][0-9]*)", "-+0123456789"),
    ("float", r"[-+]?((0|[1-9][0-9]*)(\.[0-9]*)?|\.[0-9]+)([eE][-+]?[0-9]+)?", "-+.0123456789"),
):
    firsts = [*_first.replace("\0", ""), *([""] if _tag == "null" else [])]
    _Yaml.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), firsts)
