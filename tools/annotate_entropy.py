#!/usr/bin/env python
"""A teacher's entropy of every token, a byte each, beside the shards: ``tools/annotate_entropy.py --data DIR --teacher
PATH``. Runs that use it set `entropy.source` to 'sidecar'."""

from __future__ import annotations

import sys

import tyro

from megamask import versions
from megamask.annotate import EntropyAnnotation, entropies
from megamask.data.shards import Shards
from megamask.errors import MegamaskError


def main(args: list[str] | None = None) -> int:
    config = tyro.cli(EntropyAnnotation, description=__doc__, args=args)
    try:
        versions.check()
        folder = entropies(config)
        said = Shards.open(folder).sidecar_facts("entropy")
    except MegamaskError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("Stopped. The same command goes on from here.", file=sys.stderr)
        return 130
    assert said is not None
    print(
        f"{folder}: entropies of every token. Train with --entropy.source sidecar --entropy.signal {said['signal']} "
        f"--entropy.measure {said['measure']} --packs.length {said['length']}."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
