#!/usr/bin/env python
"""What a run folder holds, what of it is whole, and what a resume would do: ``tools/inspect_run.py --run DIR``.

Touches nothing, takes no lock. Ends with the code with which a resume that cannot begin would end, else with 0.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the megamask of this clone, installed or not
from megamask.runtime import entry_point

if __name__ == "__main__":
    entry_point.begin()

import tyro

if TYPE_CHECKING:
    from megamask.checkpoint.inspect import RunReport


@dataclass(frozen=True)
class Arguments:
    run: Path
    """Folder of the run."""
    verify: bool = True
    """Read every byte and hold it against its hash; without it, sizes alone."""
    json: bool = False
    """Print JSON."""


@entry_point.command
def main(args: list[str] | None = None) -> int:
    arguments = tyro.cli(Arguments, description=__doc__, args=args)
    from megamask.checkpoint.inspect import inspect_folder  # here, so that --help need not wait for torch

    found = inspect_folder(arguments.run, hashes=arguments.verify)
    if arguments.json:
        print(json.dumps(asdict(found), indent=2, default=str))
    else:
        print("\n".join(lines(found, arguments.verify)))
    return found.exit_code


def lines(found: RunReport, verified: bool) -> list[str]:
    """The inspection for people."""
    launches = f"{found.launches} launch{'es' * (found.launches != 1)}"
    told = [f"{found.run}", f"  recipe {found.recipe or 'none'}, {found.steps or '?'} steps, {launches}"]
    told += [f"  text, {line}" for line in found.text]
    told += [f"  written by {found.writer}"] if found.writer else []
    told += ["", f"  {'step':>9}  {'state':8} {'MB':>10}  {'ranks':>5}  launch"] if found.checkpoints else []
    for each in found.checkpoints:
        here = " <- latest" if found.latest == f"step-{each.step}" else ""
        told.append(
            f"  {each.step:>9}  {each.state:8} {each.bytes / 1e6:>10,.1f}  {each.ranks:>5}  {each.launch}{here}"
        )
        told += [f"             {problem}" for problem in each.problems]
    told += ["", "  sizes alone were compared, no hashes"] if found.checkpoints and not verified else []
    told += [f"  set aside: {name}" for name in found.aside]
    told += [f"  left half done, will be deleted: {name}" for name in found.leftovers]
    return [*told, "", *(f"  {sentence}" for sentence in found.resume)]


if __name__ == "__main__":
    entry_point.run(main)
