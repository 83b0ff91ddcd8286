"""What `megamask prepare` prints: what was read, left out, dropped and written."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from megamask.data import validation_share
from megamask.data.lost_text.coverage import Coverage, sum_coverage
from megamask.data.manifest import text_report
from megamask.data.prepare import prepare, prepared_folders
from megamask.data.settings import PrepareConfig
from megamask.data.shards import Shards
from megamask.data.subsets import tokenizer_quotas
from megamask.errors import listed
from megamask.runtime.text_table import aligned_table

ALPHA = 0.3
"""The exponent of the printed mixture: that of XLM-R for languages (Conneau et al. 2020)."""


def prepare_and_report(config: PrepareConfig) -> None:
    """`megamask prepare`."""
    output = prepare(config)
    if config.split_by is not None:
        subsets = [Shards.open(folder) for folder in prepared_folders(output)]
        print(*subset_lines(output, subsets, config), sep="\n")
        warning = small_subsets_warning(subsets)
    else:
        shards = Shards.open(output)
        print(*preparation_lines(shards), sep="\n")
        warning = validation_share.validation_warning(shards.manifest)
    if warning:
        print(warning, file=sys.stderr)


def preparation_lines(shards: Shards) -> list[str]:
    """What was read, left out, dropped and written, a line each."""
    manifest = shards.manifest
    lines = _reading_lines(shards.folder, manifest)
    for split, counts in manifest["splits"].items():
        lines.append(f"  {split}: {counts['documents']} documents, {counts['tokens']} tokens")
        lines += [f"    {line}" for line in text_report(manifest, split)]
    lines += _switched_off(manifest)
    if tags := shards.sidecar_facts("tags"):
        lines.append("  tags: " + " ".join(tags["by"][name] for name in ("pipeline", "version") if name in tags["by"]))
    return lines


def _reading_lines(folder: Path, manifest: dict) -> list[str]:
    read, files = manifest["read"], manifest["input_files"]
    dropped = ", ".join(f"{count} {why.replace('_', ' ')}" for why, count in read.items() if why != "documents")
    lines = [f"{folder}: {read['documents']} documents read ({dropped})"]
    left_out = [f"{tally['files']} {ending} skipped" for ending, tally in files["passed_over"].items()]
    left_out += [f"{files['cut']} read only in part"] if files["cut"] else []
    left_out += [f"{files[why]} {why}" for why in ("empty", "excluded", "hidden") if files[why]]
    return lines + ([f"  files: {', '.join(left_out)}"] if left_out else [])


def _switched_off(manifest: dict) -> list[str]:
    return [
        f"  switched off in the tokenizer, because it changes or cuts texts differently at each call: {switch}"
        for switch in manifest.get("switched_off", ())
    ]


# ---- subsets


def subset_lines(output: Path, subsets: Sequence[Shards], config: PrepareConfig) -> list[str]:
    """What was read and dropped, a table of the ``subsets`` in ``output``, and how to train on them."""
    names = [shards.folder.name for shards in subsets]
    head = [str(config.split_by), "documents", "tokens", "bytes", "tokens/byte", "unknown", "longest word"]
    rows = [[name, *_row(shards)] for name, shards in zip(names, subsets, strict=True)]
    if config.trains:
        sizes = {name: _coverage(shards, ["train"]).bytes for name, shards in zip(names, subsets, strict=True)}
        quotas = tokenizer_quotas(sizes, config.tokenizer_bytes, config.tokenizer_alpha)
        head.append("read for the tokenizer")
        for row in rows:
            row.append(f"{quotas[row[0]] / sizes[row[0]]:.2f} times")
    manifest = subsets[0].manifest
    if len(subsets) > 1:
        how = [
            "Train on all of them, with more of the small ones than their size:",
            f"  megamask pretrain --data {shlex.quote(str(output))}/* --mixture.alpha {ALPHA:g}",
        ]
    else:
        how = ["Train on it:", f"  megamask pretrain --data {shlex.quote(str(subsets[0].folder))}"]
    if not config.valid_share:
        how = ["`megamask pretrain` needs a validation split too, but `valid_share` is 0."]
    return [
        *_reading_lines(output, manifest),
        *_switched_off(manifest),
        *(f"  {line}" for line in aligned_table([head, *rows])),
        "  tokens/byte: fertility of the tokenizer, in UTF-8; unknown: share of the tokens; longest word: in tokens.",
        *how,
    ]


def small_subsets_warning(subsets: Sequence[Shards]) -> str:
    """The warning for validation splits that are too small; "" if none is."""
    small = [shards for shards in subsets if validation_share.validation_warning(shards.manifest)]
    if not small:
        return ""
    names = (f"{shards.folder.name} ({shards.manifest['splits']['valid']['tokens']:,} tokens)" for shards in small)
    return (
        f"The validation split of {listed(names, 'value')} is small. {validation_share.NEEDED}. "
        f"{validation_share.validation_advice([shards.manifest for shards in small])}"
    )


def _coverage(shards: Shards, splits: Sequence[str]) -> Coverage:
    records = shards.manifest["coverage"]
    return sum_coverage(Coverage.of_record(records[split]) for split in splits if split in records)


def _row(shards: Shards) -> list[str]:
    manifest = shards.manifest
    documents = sum(split["documents"] for split in manifest["splits"].values())
    lost = _coverage(shards, list(manifest["splits"]))
    longest = max(sizes["longest"] for sizes in manifest["word_sizes"].values())
    return [
        f"{documents:,}",
        f"{lost.tokens:,}",
        f"{lost.bytes:,}",
        f"{lost.tokens / lost.bytes:.3f}",
        f"{lost.unknown_tokens / max(1, lost.tokens):.2%}",
        f"{longest:,}" if manifest["words"] != "unknown" else "not known",
    ]
