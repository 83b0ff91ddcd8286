"""The folders of text that `data` names, and the shares of a mixture of several; without torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from megamask.config.settings import MixtureConfig
from megamask.errors import Removable, must

Data = Path | tuple[Path, ...] | None
"""The setting `data`: a folder, several folders, or None for text of this machine."""
MOST = 1000
"""Folders of a mixture: each has at least one pack in a thousand."""


def data_folders(data: object) -> tuple[Path, ...]:
    """The folders in the setting `data`, also as config.json has it; empty without one."""
    if isinstance(data, list | tuple):
        return tuple(Path(str(folder)) for folder in data)
    return (Path(str(data)),) if data else ()


def source_names(folders: Sequence[Path]) -> list[str]:
    """A name for each folder, for logs: its last part, or the whole path if several folders end alike."""
    last = [folder.name or str(folder) for folder in folders]
    return [name if last.count(name) == 1 else str(folder) for name, folder in zip(last, folders, strict=True)]


def has_shares(data: object) -> bool:
    """Whether `data` names several folders, one of them as FOLDER=SHARE."""
    return isinstance(data, list | tuple) and len(data) > 1 and any("=" in str(folder) for folder in data)


def split_shares(data: Data, mixture: MixtureConfig) -> tuple[Data, MixtureConfig]:
    """`data` without shares, and ``mixture`` with them; both as they are if no share, or not every one, can be read.

    ``--data wiki=0.6 books=0.4`` is short for ``--data wiki books --mixture.shares 0.6 0.4``. The last = of a word
    separates them.
    """
    if not isinstance(data, tuple) or not has_shares(data):
        return data, mixture
    words = [str(folder).rpartition("=") for folder in data]
    try:
        shares = tuple(float(share) for _, _, share in words)
    except ValueError:
        return data, mixture
    if not all(folder for folder, _, _ in words):
        return data, mixture
    return tuple(Path(folder) for folder, _, _ in words), replace(mixture, shares=shares)


def data_problems(data: Data, mixture: MixtureConfig) -> list[str]:
    """Sentences for what is wrong with `data` and ``mixture`` together, after `split_shares`."""
    if not isinstance(data, tuple):
        return _single_problems(data, mixture)
    if len(data) < 2 or len(data) > MOST:
        rule = f"be one folder, or 2 to {MOST:,} folders of a mixture"
        return [must("data", rule, f"a list of {len(data)}")]
    problems = []
    if has_shares(data):
        problems += _share_problems(data)
    else:
        problems += [_no_folder(folder) for folder in data if not folder.is_dir()]
    seen: dict[Path, Path] = {}
    for folder in data:
        first = seen.setdefault(folder.resolve(), folder)
        if first is not folder:
            problems.append(f"`data` names {first} twice ({folder}). Name it once, with the sum of the shares.")
    shares = mixture.shares
    if shares is not None and len(shares) != len(data) and not has_shares(data):
        rule = f"have a share for each of the {len(data)} folders of `data`"
        problems.append(must("mixture.shares", rule, list(shares)))
    return problems


def _single_problems(data: Path | None, mixture: MixtureConfig) -> list[str]:
    why = "has no effect with a single folder in `data`"
    problems: list[str] = []
    if mixture.shares is not None:
        problems.append(Removable("mixture.shares", why, None))
    if mixture.alpha != MixtureConfig().alpha and mixture.shares is None:
        problems.append(Removable("mixture.alpha", why, MixtureConfig().alpha))
    if mixture.alpha_end is not None and mixture.shares is None:
        problems.append(Removable("mixture.alpha_end", why, None))
    folder, _, share = str(data).rpartition("=")
    if data is not None and not data.is_dir():
        is_share = folder and "=" not in folder and _is_finite(share)
        problems.append(f"`data` is {data}, and a share {why}. Name {folder} alone." if is_share else _no_folder(data))
    return problems


def _no_folder(folder: Path) -> str:
    separate = ": separate several folders by spaces" * ("," in str(folder))
    return f"`data`: {folder} is not a folder{separate}. Prepare it with `megamask prepare`."


def _share_problems(data: tuple[Path, ...]) -> list[str]:
    """A sentence for each folder whose share cannot be read."""
    problems = []
    for word in map(str, data):
        folder, equals, share = word.rpartition("=")
        if not equals:
            problems.append(f"`data` must have a share for each folder or for none, but {word} has none.")
        elif not folder:
            problems.append(must("data", "name folders as FOLDER=SHARE", word))
        elif not _is_finite(share):
            problems.append(must("data", "have a finite number behind =", word, "A folder with = needs a share too."))
    return problems


def _is_finite(word: str) -> bool:
    try:
        return math.isfinite(float(word))
    except ValueError:
        return False
