"""Values of settings that earlier versions had, and what to use instead."""

from __future__ import annotations

from collections.abc import Mapping

SETTINGS = ("entropy.source", "entropy.audit.fall_back")
"""Settings with values that were removed."""


def removed_values(settings: Mapping[str, object]) -> list[str]:
    """Sentences for removed values in ``settings``, which maps dotted names to a value or a list of values."""
    problems = []
    for name in SETTINGS:
        value = settings.get(name)
        if value == "cache" or (isinstance(value, (list, tuple)) and "cache" in value):
            problems.append(
                f"`{name}` must not be 'cache': this source was removed. Use 'probe', which also learns from the loss "
                "at masked tokens. A run that used 'cache' cannot be resumed: start a new run from its weights with "
                "--init."
            )
    return problems
