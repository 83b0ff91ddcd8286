"""What `--help` says about settings: their docstrings and rules, for tyro."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import is_dataclass
from functools import partial
from typing import Annotated, Any, get_args, get_type_hints

import tyro
from docstring_parser import parse_from_object

from megamask.errors.json_types import bare_type
from megamask.errors.setting_rules import OnlyFor, metadata, rule


def with_help(kind: Any) -> Any:
    """``kind``, a dataclass of settings, annotated so that tyro shows the docstrings and rules of all its settings.

    Without it, tyro keeps line breaks of the docstrings. A condition names the section of the other setting, unless
    several sections have the same class.
    """
    sections = list(_sections(kind, ""))
    uses = Counter(section for section, _ in sections)
    for section, name in sections:
        _annotate(section, name if uses[section] == 1 else "")
    return kind


def has_positional(kind: Any) -> bool:
    """Whether ``kind``, a dataclass of settings, has a setting that is typed without a flag."""
    marker = get_args(tyro.conf.Positional[str])[1]
    return any(marker in metadata(hint) for hint in get_type_hints(kind, include_extras=True).values())


def _sections(kind: Any, name: str) -> Iterator[tuple[Any, str]]:
    """``kind`` and the classes of its sections, each with its name and a dot."""
    yield kind, name
    for field, hint in get_type_hints(kind, include_extras=True).items():
        if is_dataclass(section := bare_type(hint)):
            flat = any(getattr(item, "name", None) == "" for item in metadata(hint))
            yield from _sections(section, name if flat else f"{name}{field}.")


def _annotate(kind: Any, name: str) -> None:
    texts = {
        text.arg_name: text.description or ""
        for each in kind.__mro__
        if is_dataclass(each)
        for text in parse_from_object(each).params
    }
    for field, hint in get_type_hints(kind, include_extras=True).items():
        if is_dataclass(bare_type(hint)):
            continue
        conditions = [item.rule(name) for item in metadata(hint) if isinstance(item, OnlyFor)]
        rules = "; ".join(filter(None, [rule(hint) and f"must {rule(hint)}", *conditions]))
        paragraphs = [" ".join(paragraph.split()) for paragraph in re.split(r"\n\s*\n", texts.get(field, ""))]
        behaviour = partial("({}; default: {})".format, rules) if rules else None
        shown = tyro.conf.arg(help="\n\n".join(paragraphs) or None, help_behavior_hint=behaviour)
        kind.__annotations__[field] = Annotated[hint, shown]
