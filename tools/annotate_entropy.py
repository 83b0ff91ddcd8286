#!/usr/bin/env python
"""A teacher's entropy of every token, a byte each, beside the shards: ``tools/annotate_entropy.py --data DIR --teacher
PATH``. Runs that use it set `entropy.source` to 'sidecar'."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the megamask of this clone, installed or not
from megamask.runtime import entry_point

if __name__ == "__main__":
    entry_point.begin()

import tyro

from megamask.errors import ConfigError, raise_all
from megamask.teacher.annotation_settings import EntropyAnnotation


@entry_point.command
def main(args: list[str] | None = None) -> int:
    config = tyro.cli(EntropyAnnotation, description=__doc__, args=args)
    raise_all(ConfigError, config.problems())
    from megamask.annotate import store_entropies  # here, so that --help need not wait for torch
    from megamask.data.shards import Shards

    folder = store_entropies(config)
    said = Shards.open(folder).sidecar_facts("entropy")
    assert said is not None
    print(
        f"{folder}: entropies of every token. Train with --entropy.source sidecar --entropy.signal {said['signal']} "
        f"--entropy.measure {said['measure']} --packs.length {said['length']}."
    )
    return 0


if __name__ == "__main__":
    entry_point.run(main)
