#!/usr/bin/env python
"""Tokens per second of megamask beside transformers' masked-language-model example, in one run: ``tools/bench.py``.

Both train the same vocabulary, layers, width, sequence length, rows a step and share of masked tokens on the same
text. Variants take turns. Prints the machine, what was done, and a Markdown table of medians. The package accelerate,
which ``Trainer`` needs, comes with ``pip install -e '.[bench]'``; without it the Trainer's step is taken by hand.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the megamask of this clone, installed or not
from megamask.runtime import entry_point

if __name__ == "__main__":
    entry_point.begin()

import tyro

from megamask.bench.settings import BenchConfig
from megamask.errors import ConfigError, raise_all


@entry_point.command
def main(args: list[str] | None = None) -> int:
    config = tyro.cli(BenchConfig, description=__doc__, args=args)
    raise_all(ConfigError, config.problems())
    from megamask.bench.comparing import bench  # here, so that --help need not wait for torch

    bench(config)
    return 0


if __name__ == "__main__":
    entry_point.run(main, entry_point.end_process)
