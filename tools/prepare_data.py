#!/usr/bin/env python
"""Raw text -> tokenizer -> shards: ``tools/prepare_data.py --input FILE_OR_DIR_OR_DATASET... --output DIR``."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the megamask of this clone, installed or not
from megamask.runtime import entry_point

if __name__ == "__main__":
    entry_point.begin()

import tyro

from megamask.data import validation_share
from megamask.data.manifest import text_report
from megamask.data.prepare import PrepareConfig, prepare
from megamask.data.shards import Shards


@entry_point.command
def main(args: list[str] | None = None) -> int:
    config = tyro.cli(PrepareConfig, description=__doc__, args=args)
    folder = prepare(config)
    train = Shards.open(folder)
    read = train.manifest["read"]
    dropped = ", ".join(f"{count} {why.replace('_', ' ')}" for why, count in read.items() if why != "documents")
    print(f"{folder}: {read['documents']} documents read ({dropped})")
    files = train.manifest["input_files"]
    left_out = [f"{tally['files']} {ending} passed over" for ending, tally in files["passed_over"].items()]
    left_out += [f"{files['cut']} read only in part"] if files["cut"] else []
    left_out += [f"{files[why]} {why}" for why in ("empty", "excluded", "hidden") if files[why]]
    if left_out:
        print(f"  files: {', '.join(left_out)}")
    for split, found in train.manifest["splits"].items():
        print(f"  {split}: {found['documents']} documents, {found['tokens']} tokens")
        for line in text_report(train.manifest, split):
            print(f"    {line}")
    for switch in train.manifest.get("switched_off", ()):
        print(f"  switched off in the tokenizer, as it changes or cuts texts from call to call: {switch}")
    if warning := validation_share.warning(train.manifest):
        print(warning, file=sys.stderr)
    tags = train.sidecar_facts("tags")
    if tags:
        print("  tags: " + " ".join(tags["by"][part] for part in ("pipeline", "version") if part in tags["by"]))
    return 0


if __name__ == "__main__":
    entry_point.run(main)
