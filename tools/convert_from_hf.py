#!/usr/bin/env python
"""A BERT or ModernBERT checkpoint -> first weights: ``tools/convert_from_hf.py --model DIR_OR_NAME --output DIR``."""

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
    model: str
    """Folder of a model of transformers, or its name on the Hugging Face Hub."""
    output: Path
    """New folder for weights, shape and tokenizer, which `pretrain.py --init` takes."""
    new_head: bool = False
    """Take the encoder alone: training starts with a new masked-language head."""


@entry_point.command
def main(args: list[str] | None = None) -> int:
    arguments = tyro.cli(Arguments, description=__doc__, args=args)
    from megamask.hf import save_start  # here, so that --help need not wait for torch

    model = save_start(arguments.model, arguments.output, new_head=arguments.new_head)
    for note in model.notes:
        print(note)
    shape = model.shape
    print(
        f"{arguments.output}: {shape.preset}, {shape.num_layers} layers of width {shape.hidden_size}. Go on with "
        f"megamask/pretrain.py --init {arguments.output} and text prepared with its tokenizer: tools/prepare_data.py "
        f"--tokenizer {arguments.output / 'tokenizer'}."
    )
    return 0


if __name__ == "__main__":
    entry_point.run(main)
