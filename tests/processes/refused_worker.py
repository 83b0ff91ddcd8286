"""Two ranks that meet bad input at once, each row in a launch of its own; all launches side by side."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

from megamask import pretrain
from megamask.data.manifest import NAME
from megamask.runtime import ranks
from tests.processes import forked
from tests.processes.conftest import free_port
from tests.processes.faults import make_data
from tests.system.commands import ROOT, training

WORLD = 2
Plant = Callable[[Path, Path], list[str]]
"""Given a folder of its own and sound shards: the command line that meets the fault. Called on each rank."""


def no_flag(folder: Path, data: Path) -> list[str]:
    return [*training(data, folder / "run"), "--stepz", "3"]


def no_settings(folder: Path, data: Path) -> list[str]:
    return [*training(data, folder / "run", packs__per_step=3), "--config", str(folder / "nowhere.toml")]


def uneven(folder: Path, data: Path) -> list[str]:
    return training(data, folder / "run", packs__per_step=3)


def no_start(folder: Path, data: Path) -> list[str]:
    return [*training(data, folder / "run"), "--resume", "must"]


def no_teacher(folder: Path, data: Path) -> list[str]:
    return [*training(data, folder / "run"), "--teacher.path", str(folder), "--distill.weight.start", "0.5"]


def wide(folder: Path, data: Path) -> list[str]:
    return training(data, folder / "run", packs__tokens=2**20)


def cut(folder: Path, data: Path, rank: int | None = None) -> list[str]:
    """Shards cut short; of ``rank`` alone, as on a disk that only it sees."""
    shards = folder / f"data-{ranks.rank()}"
    shutil.copytree(data, shards)
    if rank in (None, ranks.rank()):
        file = shards / "train-00000.tokens.npy"
        os.truncate(file, file.stat().st_size - 2)
    return training(shards, folder / "run", verify=False)


def cut_for_one(folder: Path, data: Path) -> list[str]:
    return cut(folder, data, 1)


def no_manifest(folder: Path, data: Path) -> list[str]:
    shutil.copytree(data, shards := folder / f"data-{ranks.rank()}")
    (shards / NAME).unlink()
    return training(shards, folder / "run")


def below_a_file(folder: Path, data: Path) -> list[str]:
    (folder / "file").write_text("")
    return training(data, folder / "file" / "run")


ROWS: dict[str, Plant] = {
    refusal.__name__: refusal
    for refusal in (
        no_flag, no_settings, uneven, cut, cut_for_one, no_manifest, wide, no_start, no_teacher, below_a_file,
    )
}  # fmt: skip


def refusals(folder: str, names: list[str], alone: bool = False) -> dict[str, dict]:
    """What each rank of each launch said, its exit code, and how many seconds the last outlived the first.

    ``alone``: a broken variant, in which no rank hears of what another has met.
    """
    home = Path(folder)
    data = make_data(home)
    teams = {}
    for name in names:
        place = home / name
        place.mkdir()
        teams[name] = forked.fork(
            WORLD, lambda tell, at=place, do=ROWS[name]: _be(at, data, do, alone, tell), free_port()
        )
    refusals_by_name = {}
    for name, team in teams.items():
        reports, codes = team.end(120)
        times = [float(one) for one in re.findall(r"\S+", reports)]
        outputs = [(home / name / f"said-{rank}.txt").read_text() for rank in range(WORLD)]
        refusals_by_name[name] = {"codes": codes, "said": outputs, "seconds": max(times) - min(times)}
    return refusals_by_name


def _be(place: Path, data: Path, plant: Plant, alone: bool, tell: forked.Tell) -> None:
    """A rank, from its command line to its end, which it tells."""
    code = 1
    with (
        (place / f"said-{ranks.rank()}.txt").open("w") as output,
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
    ):
        if alone:
            ranks.all_ranks_or_none = lambda act: act()
        os.chdir(ROOT)
        try:
            code = pretrain.main(plant(place, data))
        except SystemExit as end:  # what the parser of flags does
            code = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        sys.stdout.flush()
    tell(f"{time.monotonic()} ")
    os._exit(code)
