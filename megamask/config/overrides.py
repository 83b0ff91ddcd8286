"""Overrides of a configuration: the settings in a TOML or JSON file, under new or old names."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from megamask.config.pretrain_config import RECORDED, PretrainConfig, as_dict
from megamask.config.removed import removed_values
from megamask.config.sources import has_shares
from megamask.errors import ConfigError, must, raise_all, unknown
from megamask.errors.setting_rules import field_problem, setting_of
from megamask.storage import strict_json
from megamask.storage.dotted import flatten, is_under, merged, names_in
from megamask.storage.old_setting_names import new_name, with_new_names
from megamask.storage.strict_toml import read_toml


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a TOML or JSON file, such as a run's own config.json; `override_settings` checks them."""
    kind = path.suffix.lower().removeprefix(".")
    if kind not in ("toml", "json"):
        raise ConfigError(f"`{path}` must be a TOML or JSON file, with the ending .toml or .json. Convert it.")
    try:
        settings = read_toml(path) if kind == "toml" else strict_json.read_json(path, strict_json.LARGEST_SETTINGS)
    except OSError as error:
        raise ConfigError(f"`{path}` cannot be read: {error.strerror}.") from None
    except strict_json.BadRecord as error:
        raise ConfigError(f"`{path}` is not {kind.upper()}: {error}.") from None
    if not isinstance(settings, dict):
        raise ConfigError(must(str(path), "contain a table of settings", settings))
    return settings


def override_settings(base: PretrainConfig, values: dict[str, Any], source: str) -> PretrainConfig:
    """``base`` with ``values`` in place of its own; they may have old names.

    ConfigError names every unknown key, wrong type and removed value, with the key as the file ``source`` has it.
    """
    if values.keys() >= RECORDED:
        values = {key: value for key, value in values.items() if key not in RECORDED}
    written = {new_name(name): name for name in names_in(values)}
    values = with_new_names(values)
    known = names_in(as_dict(base))
    removed = removed_values(flatten(values), source)
    wrong = [unknown(written[key], known, f"`{source}`") for key in names_in(values) if key not in known]
    try:
        # strict, by the rules of JSON: "3" does not count as 3, nor true as 1; a list is accepted for a tuple
        config = _schema().validate_json(json.dumps(merged(as_dict(base), values)), strict=True)
    except ValidationError as error:
        for each in error.errors(include_url=False):
            name = setting_of(PretrainConfig, each)
            old = written.get(name, name)
            shown = f"{name}`" if old == name else f"{old}` (now `{name}`)"
            if not is_under(name, removed):
                wrong.append(field_problem(PretrainConfig, each, f"{shown} in `{source}"))
    if has_shares(values.get("data")) and (values.get("mixture") or {}).get("shares"):
        wrong.append(f"`{source}` has shares in `data` and in `mixture.shares`. Remove one of them.")
    raise_all(ConfigError, list(dict.fromkeys([*removed.values(), *wrong])))  # a union has a problem for each member
    return config


@cache
def _schema() -> TypeAdapter:
    return TypeAdapter(PretrainConfig)
