"""Remove settings of a recipe that have no effect under the user's settings, with a log line for each.

A recipe sets `optimizer.muon_lr_scale` for its Muon; a user who chooses AdamW did not choose it. Settings that the user
typed, as a flag or in a file, are never removed: if they have no effect, they are refused.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import fields, is_dataclass, replace
from typing import Any

from megamask.config.checks import config_problems
from megamask.config.flags import flags_in
from megamask.config.pretrain_config import RECORDED, PretrainConfig, as_dict
from megamask.errors import Removable
from megamask.storage.dotted import flatten, names_in
from megamask.storage.old_setting_names import with_new_names


def typed(config: PretrainConfig, arguments: Iterable[str], file: dict[str, Any]) -> set[str]:
    """The dotted names of the settings that ``arguments`` or a ``file`` of overrides name.

    The config.json of a run does not count, since the run wrote it.
    """
    known = set(names_in(as_dict(config)))
    flags = flags_in(arguments)
    named = flags & known
    for flag in flags - named:  # --no-export, --masking.entropy.no-standardise
        section, _, last = flag.rpartition(".")
        named.add(".".join(part for part in (section, last.removeprefix("no_")) if part))
    return (named & known) | (set() if is_record(file) else set(flatten(with_new_names(file))))


def is_record(settings: dict[str, Any]) -> bool:
    """Whether ``settings`` are the config.json that a run wrote."""
    return settings.keys() >= RECORDED


def leave_out(config: PretrainConfig, typed: Collection[str], recipe: str) -> tuple[PretrainConfig, list[str]]:
    """``config`` without settings that have no effect and are not ``typed``, and a line for each of them.

    ``recipe`` is the recipe that set them. After one is removed, another may have no effect either.
    """
    lines: list[str] = []
    while True:
        before = config
        for problem in config_problems(config):
            if isinstance(problem, Removable):
                after = _replaced(config, problem.name.split("."), problem.neutral, "", typed)
                lines += _lines(config, after, problem, recipe)
                config = after
        if config == before:
            return config, lines


def _replaced(value: Any, path: list[str], neutral: Any, name: str, typed: Collection[str]) -> Any:
    """``value`` with ``neutral`` at ``path``, except for the settings that are ``typed``."""
    if path:
        inside = _replaced(getattr(value, path[0]), path[1:], neutral, f"{name}.{path[0]}".lstrip("."), typed)
        return replace(value, **{path[0]: inside})
    if is_dataclass(value) and not isinstance(value, type):
        parts = {field.name: (getattr(value, field.name), getattr(neutral, field.name)) for field in fields(value)}
        return replace(
            value,
            **{part: _replaced(own, [], plain, f"{name}.{part}", typed) for part, (own, plain) in parts.items()},
        )
    return value if name in typed else neutral


def _lines(before: PretrainConfig, after: PretrainConfig, problem: Removable, recipe: str) -> list[str]:
    was, now = flatten(as_dict(before)), flatten(as_dict(after))
    return [
        f"`{name}` {value!r} of the recipe {recipe!r} is left out: "
        f"{'it' if name == problem.name else f'`{problem.name}`'} {problem.why}."
        for name, value in was.items()
        if now[name] != value
    ]
