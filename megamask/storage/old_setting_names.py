"""Settings that were renamed, removed or added, as an earlier run or an older file of settings names them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from megamask.errors import ConfigError

RENAMED = {
    "packs.views": "packs.masks_per_text",
    "masking.explore": "masking.random_share",
    "masking.corruption.keep": "masking.corruption.unchanged",
    "masking.entropy.cap": "masking.entropy.skip_top",
    "entropy.passes": "entropy.num_passes",
    "entropy.average": "entropy.ema_decay",
    "teacher.sweep": "teacher.packs_per_pass",
    "optimizer.rate": "optimizer.lr",
    "optimizer.muon_rate": "optimizer.muon_lr_scale",
    "optimizer.clip": "optimizer.max_grad_norm",
    "spikes.back": "spikes.rewind_steps",
    "spikes.rewinds": "spikes.max_rewinds",
    "spikes.broken_in_row": "spikes.max_nonfinite_in_row",
    "spikes.broken_in_100": "spikes.max_nonfinite_in_100",
    "hang": "watchdog",
    "hang.longest": "watchdog.rare_timeout",
}
"""Old name -> new name, of settings and sections. Each changes the last part of a name only."""
REMOVED = {"masking.ratio.middle", "masking.random_share.middle", "distill.weight.middle"}
"""New names of settings that no longer exist, and that earlier runs recorded as None, without effect."""
_OF_A_PHASE = ("packs.start_length", "packs.start_steps")
"""Settings of a first phase, before runs had `phases`."""

ADDED: dict[str, Any] = {
    "phases": [],
    "mixture.shares": None,
    "mixture.alpha": 1.0,
    "mixture.alpha_end": None,
    "masking.corruption.random_from": "vocabulary",
    "masking.correction": 0.0,
    "masking.max_weight": None,
    "masking.entropy.effective_sample_size": None,
    "masking.token_type.signal": "accuracy",
    "masking.token_type.every": 200,
    "masking.token_type.momentum": 0.2,
    "masking.token_type.floor": 0.005,
    "masking.token_type.temperature": 1.0,
    "model.layer_groups": None,
    "model.embedding_size": None,
    "masking.ratio.back": None,
    "masking.random_share.back": None,
    "distill.weight.back": None,
    "checkpoint.background": False,
}
"""Settings that earlier runs did not record, each with the value that changes nothing in such a run."""


def with_added(settings: dict[str, Any], known: Iterable[str]) -> dict[str, Any]:
    """``settings`` by dotted name, with those of ``known`` that did not exist when they were recorded."""
    return {name: ADDED[name] for name in known if name in ADDED} | settings


def new_name(name: str) -> str:
    """The name today of the setting or section ``name``: "optimizer.rate.peak" -> "optimizer.lr.peak"."""
    parts = name.split(".")
    prefixes = (".".join(parts[: depth + 1]) for depth in range(len(parts)))
    return ".".join(RENAMED.get(prefix, prefix).rpartition(".")[2] for prefix in prefixes)


def renamed_problems(names: Iterable[str]) -> list[str]:
    """A sentence for each of ``names`` that is the old name of a setting."""
    names = sorted(names)
    phases = [f"`{name}` is part of a phase now: --phases steps=N,length=L." for name in names if name in _OF_A_PHASE]
    return [f"`{name}` is called `{new}` now." for name in names if (new := new_name(name)) != name] + phases


def with_new_names(settings: dict[str, Any], section: str = "") -> dict[str, Any]:
    """``settings`` under their new names: tables in tables, or one table with dotted names.

    Raises ConfigError if a setting has both its old and its new name.
    """
    renamed = _renamed(settings, section)
    return renamed if section else _with_phase(renamed)


def _with_phase(settings: dict[str, Any]) -> dict[str, Any]:
    """``settings`` with a phase in place of a length and a number of steps for the beginning of the run."""
    table, prefix = (settings["packs"], "") if isinstance(settings.get("packs"), dict) else (settings, "packs.")
    length, steps = (table.get(f"{prefix}{name}") for name in ("start_length", "start_steps"))
    if (length is None) != (steps is None):
        return settings  # refused as unknown
    rest = {name: value for name, value in table.items() if f"packs.{name.removeprefix('packs.')}" not in _OF_A_PHASE}
    settings = settings | {"packs": rest} if table is not settings else rest
    return settings if length is None else settings | {"phases": [{"steps": steps, "length": length}]}


def _renamed(settings: dict[str, Any], section: str) -> dict[str, Any]:
    renamed: dict[str, Any] = {}
    for key, value in settings.items():
        full = new_name(f"{section}{key}")
        if full in REMOVED and value is None:
            continue
        name = full.removeprefix(new_name(section))
        if name in renamed or (name != key and name in settings):
            raise ConfigError(f"`{section}{key}` is the old name of a setting that has its new name too. Remove it.")
        renamed[name] = _renamed(value, f"{section}{key}.") if isinstance(value, dict) else value
    return renamed
