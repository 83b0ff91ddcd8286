"""What `megamask prepare` prints: what was read, left out, dropped and written."""

from __future__ import annotations

import sys

from megamask.data import validation_share
from megamask.data.manifest import text_report
from megamask.data.prepare import prepare
from megamask.data.settings import PrepareConfig
from megamask.data.shards import Shards


def prepare_and_report(config: PrepareConfig) -> None:
    """`megamask prepare`."""
    shards = Shards.open(prepare(config))
    print(*preparation_lines(shards), sep="\n")
    if warning := validation_share.validation_warning(shards.manifest):
        print(warning, file=sys.stderr)


def preparation_lines(shards: Shards) -> list[str]:
    """What was read, left out, dropped and written, a line each."""
    manifest = shards.manifest
    read, files = manifest["read"], manifest["input_files"]
    dropped = ", ".join(f"{count} {why.replace('_', ' ')}" for why, count in read.items() if why != "documents")
    lines = [f"{shards.folder}: {read['documents']} documents read ({dropped})"]
    left_out = [f"{tally['files']} {ending} skipped" for ending, tally in files["passed_over"].items()]
    left_out += [f"{files['cut']} read only in part"] if files["cut"] else []
    left_out += [f"{files[why]} {why}" for why in ("empty", "excluded", "hidden") if files[why]]
    lines += [f"  files: {', '.join(left_out)}"] if left_out else []
    for split, counts in manifest["splits"].items():
        lines.append(f"  {split}: {counts['documents']} documents, {counts['tokens']} tokens")
        lines += [f"    {line}" for line in text_report(manifest, split)]
    lines += [
        f"  switched off in the tokenizer, because it changes or cuts texts differently at each call: {switch}"
        for switch in manifest.get("switched_off", ())
    ]
    if tags := shards.sidecar_facts("tags"):
        lines.append("  tags: " + " ".join(tags["by"][name] for name in ("pipeline", "version") if name in tags["by"]))
    return lines
