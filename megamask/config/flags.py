"""The flags in a command line, before tyro reads it."""

from __future__ import annotations

from collections.abc import Iterable

from megamask.config.removed import REMOVED, SETTINGS, USE
from megamask.storage.old_setting_names import new_name


def flag_name(word: str) -> str:
    """The setting that a flag names: "--packs.per-step=2" -> "packs.per_step"."""
    return word[2:].partition("=")[0].replace("-", "_")


def flags_in(arguments: Iterable[str]) -> set[str]:
    """The names of the settings that have a flag in a command line."""
    return {flag_name(word) for word in arguments if word.startswith("--")}


def corrected_flags(arguments: Iterable[str]) -> list[str]:
    """``arguments`` with new names and without removed values, so that their other problems can be found too."""
    corrected: list[str] = []
    setting = ""
    for word in arguments:
        flag, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        if flag:
            setting = flag_name(flag)
            flag = f"--{new_name(setting)}" if new_name(setting) != setting else flag
        if value != REMOVED or setting not in SETTINGS:
            corrected.append(flag + equals + value)
        elif setting == "entropy.source":
            corrected.append(flag + equals + USE)
        elif flag:  # --entropy.audit.fall_back=cache
            corrected.append(flag)
    return corrected
