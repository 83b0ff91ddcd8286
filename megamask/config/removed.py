"""Values of settings that earlier versions had, and what to use instead."""

from __future__ import annotations

from collections.abc import Mapping

SETTINGS = ("entropy.source", "entropy.audit.fall_back")
"""Settings with values that were removed."""
REMOVED, USE = "cache", "probe"
"""The value that was removed, and the one that replaces it."""


def removed_values(settings: Mapping[str, object], source: str = "") -> dict[str, str]:
    """A sentence for each setting with a removed value, by its name.

    ``settings`` maps dotted names to a value or a list of values; ``source`` is the file that they come from.
    """
    place = f" in `{source}`" if source else ""
    return {
        name: f"`{name}`{place} must not be {REMOVED!r}: this source was removed. Use {USE!r}, which also learns from "
        f"the loss at masked tokens. A run that used {REMOVED!r} cannot be resumed: start a new run from its weights "
        "with --init."
        for name in SETTINGS
        if (value := settings.get(name)) == REMOVED or (isinstance(value, (list, tuple)) and REMOVED in value)
    }
