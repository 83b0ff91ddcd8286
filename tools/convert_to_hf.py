#!/usr/bin/env python
"""A checkpoint of any run -> a folder for transformers: ``tools/convert_to_hf.py --run DIR --output DIR``."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from megamask.checkpoint import find, read_manifest, read_weights
from megamask.errors import CheckpointError, MegamaskError
from megamask.hf import Card, export_model
from megamask.model.shape import EncoderShape


@dataclass(frozen=True)
class Arguments:
    run: Path
    """Folder of the run."""
    output: Path
    """Folder to write; an earlier export there is replaced."""
    step: int | None = None
    """Step of the checkpoint; the newest if not given."""


def convert(arguments: Arguments) -> float:
    """Export, and return the largest difference of logits found."""
    run = arguments.run
    try:
        config = json.loads((run / "config.json").read_bytes())
    except (FileNotFoundError, ValueError):
        raise CheckpointError(f"{run} holds no config.json that can be read, so it is no run.") from None
    checkpoint = find(run, arguments.step)
    card = Card(
        name=run.resolve().name,
        recipe=config.get("recipe") or "none",
        steps=read_manifest(checkpoint).step,
        data=config.get("text", "unknown"),
    )
    return export_model(
        read_weights(checkpoint), EncoderShape.load(run), run / "tokenizer", arguments.output, card=card
    )


def main(args: list[str] | None = None) -> int:
    arguments = tyro.cli(Arguments, description=__doc__, args=args)
    try:
        difference = convert(arguments)
    except MegamaskError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(f"{arguments.output}: logits of transformers and ours differ by at most {difference:.2g}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
