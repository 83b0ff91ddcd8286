#!/usr/bin/env python
"""A stored sample of a teacher at the targets of a run: ``tools/annotate_targets.py --data DIR --teacher.path PATH
--distill.stored DIR --distill.weight.start 0.5 [what else the run is told]``.

Takes the flags of megamask/pretrain.py, so that the masks are those of the run, and --draws, --packs, --workers. The
run is then started with the same flags, without --teacher.path.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the megamask of this clone, installed or not
from megamask.runtime import entry_point

if __name__ == "__main__":
    entry_point.begin()

from megamask.config import cli


@entry_point.command
def main(args: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--draws", type=int, help="tokens drawn at each target; 32 if not given")
    parser.add_argument("--packs", type=int, help="packs, from number 0; as many as the run asks about if not given")
    parser.add_argument("--workers", type=int, help="processes; one for each GPU or core if not given")
    own, rest = parser.parse_known_args(args)
    run = cli.parse_command(rest).run
    from megamask.annotate import SampleAnnotation, store_targets
    from megamask.data import prepare  # here, so that --help need not wait for torch
    from megamask.training.setup import CACHE

    data = run.data or prepare.local_data(CACHE)
    folder = store_targets(
        run, data, SampleAnnotation(**{name: value for name, value in vars(own).items() if value is not None})
    )
    print(f"{folder}: samples of the teacher. Train with the same flags, without --teacher.path.")
    return 0


if __name__ == "__main__":
    entry_point.run(main)
