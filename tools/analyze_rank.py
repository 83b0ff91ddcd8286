#!/usr/bin/env python
"""How many dimensions the states of real tokens and of [MASK] fill, layer by layer: ``tools/analyze_rank.py --run DIR
--output DIR``. Several ``--run`` and ``--model`` are compared on the same text."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the megamask of this clone, installed or not
from megamask.runtime import entry_point

if __name__ == "__main__":
    entry_point.begin()

import tyro

from megamask.analysis.settings import RankConfig
from megamask.errors import ConfigError, raise_all


@entry_point.command
def main(args: list[str] | None = None) -> int:
    config = tyro.cli(RankConfig, description=__doc__, args=args)
    raise_all(ConfigError, config.problems())
    from megamask.analysis.ranking import analyse_rank  # here, so that --help need not wait for torch

    analyse_rank(config)
    return 0


if __name__ == "__main__":
    entry_point.run(main)
