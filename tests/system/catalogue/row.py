"""A row of the catalogue of bad input: what is wrong, how the command must end, and what it must name."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from megamask import pretrain
from tests.system.commands import Ended, training
from tests.system.conftest import STEPS

DONE, CONFIG, DATA, CHECKPOINT, STORAGE, LOCK = 0, 2, 3, 4, 7, 8
Command = tuple[Callable[[list[str]], int], list[object]]
"""A command's main and its arguments."""
SAME = {"steps": STEPS, "checkpoint__every": 4, "validation__every": 4}
"""Of the run that nothing disturbed."""


@dataclass(frozen=True)
class Ground:
    """Where a row works: a folder of its own, and sound shards and a finished run, of which it takes copies."""

    folder: Path
    data: Path
    finished: Path
    patch: pytest.MonkeyPatch

    @property
    def output(self) -> Path:
        """The run folder of whatever is started."""
        return self.folder / "run"

    def copy(self, of: Path) -> Path:
        """A copy of the shards or of the run, to be spoilt."""
        return Path(shutil.copytree(of, self.folder / of.name, ignore=shutil.ignore_patterns("packs")))

    def train(self, *arguments: object, data: Path | None = None, output: Path | None = None, **more) -> Command:
        """A small run of pretrain.py."""
        return pretrain.main, [*training(data or self.data, output or self.output, **more), *arguments]


Plant = Callable[[Ground], Command]


@dataclass(frozen=True)
class Row:
    """A bad input."""

    name: str
    plant: Plant
    code: int
    culprits: tuple[str, ...]
    stays: bool = True
    """Whether everything that is there before the command is there behind it; it may add to it."""

    def wrong(self, ended: Ended) -> list[str]:
        """What is wrong with how the command ended."""
        # a parser of command lines draws boxes and breaks lines
        output = " ".join((ended.out + ended.err).replace("│", " ").split())
        problems = [] if ended.code == self.code else [f"the exit code is {ended.code}, not {self.code}"]
        problems += [f"the sentence does not name {culprit}" for culprit in self.culprits if culprit not in output]
        problems += ["there is a trace"] if "Traceback" in output else []
        return [*problems, output] if problems else []


def rows(code: int, plant: Callable[..., Plant], *entries: tuple) -> list[Row]:
    """Rows of one kind, each said as (name, what ``plant`` takes, culprits)."""
    return [Row(name, plant(what), code, tuple(culprits)) for name, what, culprits in entries]


# ---- what may happen to a file


def missing(name: str) -> Callable[[Path], object]:
    """A file that is gone."""
    return lambda folder: (folder / name).unlink()


def cut(name: str, size: int) -> Callable[[Path], None]:
    """A file that lacks its end (below 0), or is of this size."""
    return lambda folder: os.truncate(folder / name, size + (size < 0) * (folder / name).stat().st_size)


def append(name: str) -> Callable[[Path], object]:
    """A file that grew."""
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes() + b"x")


def as_it_was(folder: Path) -> None:
    """Nothing happens."""
