#!/usr/bin/env python
"""Take a step of a run again and hold it against the run's log, bit for bit: ``tools/replay.py --run DIR --step N``.

Goes on from the newest whole checkpoint before the figures that tell of the step, in a temporary folder: the run folder
is only read. So it finds a machine that computed wrongly, or one that computes otherwise. Only on the hardware and with
the libraries and the number of ranks of the run are the figures the same; of several ranks, start as many, on one node:
``torchrun --nproc-per-node 8 tools/replay.py ...``. Costs the steps since that checkpoint, and the room of none.

Ends with 0 if every figure is the same, with 1 if one differs, else with the code of an error.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the megamask of this clone, installed or not
from megamask.runtime import entry_point

if __name__ == "__main__":
    entry_point.begin()

import tyro


@dataclass(frozen=True)
class Arguments:
    run: Path
    """Folder of the run."""
    step: int
    """Number of the step, from 1."""
    data: Path | None = None
    """Folder of the shards, if they lie elsewhere now."""


@entry_point.command
def main(args: list[str] | None = None) -> int:
    arguments = tyro.cli(Arguments, description=__doc__, args=args)
    from megamask.replay import replay_run  # here, so that --help need not wait for torch

    return replay_run(arguments.run, arguments.step, arguments.data)


if __name__ == "__main__":
    entry_point.run(main, entry_point.end_process)
