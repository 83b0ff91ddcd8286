"""The errors that a user may meet, as sentences: the name, the rule, the value and the cure.

Checks collect every problem before they raise, so a user corrects a configuration once, not five times. Each class has
the exit code of the command, for scripts that decide what to do next.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterable

REQUEUE = 75
"""The exit code of a run that stopped as requested, before its last step (EX_TEMPFAIL of sysexits.h)."""


SHOWN = 5
"""How many names of a list an error shows."""


class MegamaskError(ValueError):
    """One or more problems that a user can correct; ``str`` has a line for each."""

    exit_code = 1
    everywhere = False
    """Whether all ranks have the same error, so that only rank 0 prints it."""

    def __init__(self, *problems: str):
        super().__init__(*problems)
        self.problems = problems

    def __str__(self) -> str:
        # a value may contain anything, such as escape codes of a terminal
        return "\n".join(
            "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in p) for p in self.problems
        )


class ConfigError(MegamaskError):
    """A setting, flag or combination of them that cannot be run."""

    exit_code = 2
    everywhere = True


class LaunchError(ConfigError):
    """Environment variables of a launcher that cannot be used. Each rank prints its own."""

    everywhere = False


class DataError(MegamaskError):
    """Text, a tokenizer or shards that are missing, damaged or do not fit together."""

    exit_code = 3


class CheckpointError(MegamaskError):
    """A checkpoint or run folder that is missing, damaged or of another run."""

    exit_code = 4


class NonFiniteError(MegamaskError):
    """NaN or Inf in a loss or gradient. No checkpoint contains weights that it changed."""

    exit_code = 5


class WeightsDivergedError(MegamaskError):
    """Weights that differ between ranks although they must be equal: a machine is faulty."""

    exit_code = 5


class HangError(MegamaskError):
    """The run made no progress within its timeout."""

    exit_code = 6


class PeerLostError(MegamaskError):
    """Another rank has failed. Without a problem to print, that rank prints its own and ends with ``exit_code``."""

    def __init__(self, *problems: str, exit_code: int = 1):
        super().__init__(*problems)
        self.exit_code = exit_code


class StorageError(MegamaskError):
    """No space, no permission, or a file system that does not answer."""

    exit_code = 7


class LockError(MegamaskError):
    """A run folder that another launch is writing or has taken over."""

    exit_code = 8


def must(name: str, rule: str, found: object, cure: str = "") -> str:
    """The sentence "`name` must <rule>, but is <found>. <cure>"."""
    return f"`{name}` must {rule}, but is {shown_value(found)}." + (f" {cure}" if cure else "")


def shown_value(value: object) -> str:
    """A value as files and flags write it: 3, 'soon', true, null, [1, 2]; at most 80 characters of a list or table."""
    if isinstance(value, str):
        return repr(value)
    if value is not None and not isinstance(value, (bool, list, dict)):
        return str(value)
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:77]}..."


def unknown(name: str, known: Iterable[str], where: str = "") -> str:
    """The sentence for a name that is not known, with the nearest that is, or with some or all that are."""
    ends = {full: full.rpartition(".") for full in sorted(known)}
    section, _, last = name.rpartition(".")
    place = f" in {where}" if where else ""
    lasts = {end for _, _, end in ends.values()}
    near = [last] if last in lasts else difflib.get_close_matches(last, lasts, n=3, cutoff=0.5)
    near = near or [end for end in lasts if end.lower() == last.lower()]
    # sections share names, such as `every`: how near the section is counts as much as how near the name is
    likeness = {full: _alike(end, last) + _alike(begin, section) for full, (begin, _, end) in ends.items()}
    nearest = sorted(likeness, key=likeness.__getitem__, reverse=True)
    if near:
        return (
            f"`{name}` is not known{place}. Did you mean `{next(full for full in nearest if ends[full][2] in near)}`?"
        )
    few = len(ends) <= 2 * SHOWN
    names = ", ".join(f"`{full}`" for full in (ends if few else nearest[:SHOWN]))
    return f"`{name}` is not known{place}. {'Known are' if few else 'The nearest are'}: {names}."


def _alike(one: str, two: str) -> float:
    """1 for equal words, 0 for words without a common letter."""
    return difflib.SequenceMatcher(None, one, two).ratio()


class Removable(str):
    """The sentence for a setting that has no effect, or does harm, under the others: "`name` <why>. <cure>".

    A setting that somebody typed is refused with it. One that comes from a recipe is set to ``neutral`` instead, the
    value with which the sentence goes away; for a section of settings, the section with which it does.
    """

    name: str
    why: str
    neutral: object

    def __new__(cls, name: str, why: str, neutral: object, cure: str = "Remove it.") -> Removable:
        self = super().__new__(cls, f"`{name}` {why}. {cure}")
        self.name, self.why, self.neutral = name, why, neutral
        return self


def listed(names: Iterable[str], noun: str = "") -> str:
    """The first five ``names`` and how many more there are; with a ``noun``, how many of what."""
    every = list(names)
    shown = ", ".join(every[:SHOWN]) + (f" and {len(every) - SHOWN} more" if len(every) > SHOWN else "")
    if not noun:
        return shown
    return f"the {noun} {shown}" if len(every) == 1 else f"{len(every)} {noun}s: {shown}"


def raise_all(error: type[MegamaskError], problems: list[str]) -> None:
    """Raise ``error`` with all problems, or return if there are none."""
    if problems:
        raise error(*problems)
