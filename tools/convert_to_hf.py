#!/usr/bin/env python
"""A checkpoint of any run -> a folder for transformers: ``tools/convert_to_hf.py --run DIR --output DIR``."""

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
    output: Path
    """Folder to write; an earlier export of the same run is replaced."""
    step: int | None = None
    """Step of the checkpoint; the newest if not given."""
    replace: bool = False
    """Replace an export of another run too, or one that was changed since."""


@entry_point.command
def main(args: list[str] | None = None) -> int:
    arguments = tyro.cli(Arguments, description=__doc__, args=args)
    from megamask.training.summary import export  # here, so that --help need not wait for torch

    found = export(arguments.run, arguments.output, arguments.step, replace=arguments.replace)
    print(f"{arguments.output}: logits of transformers and ours differ by at most {found.difference:.2g}")
    for note in found.notes:
        print(note)
    return 0


if __name__ == "__main__":
    entry_point.run(main)
