"""`megamask bench`: make the variants, let them take turns, print what was done and the table, write the figures."""

from __future__ import annotations

import json
import logging
import os
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

from megamask.bench import megamask_variant, objectives, overheads, table, trainer_variant
from megamask.bench.measure import Figures, Round, in_turn
from megamask.bench.settings import BenchConfig
from megamask.data import prepare
from megamask.data.shards import Shards
from megamask.engine.ds_file import read_ds_config, resolve_auto
from megamask.runtime import precision, ranks
from megamask.runtime.precision import Support
from megamask.training.flops import peak_flops

BF16 = Support(True, "it is measured")


def bench(config: BenchConfig) -> None:
    """Measure, print, write."""
    torch.set_num_threads(config.threads)
    # DeepSpeed prints to where the table goes
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    folder = config.data or prepare.local_data(prepare.CACHE)
    raw = config.text or (None if config.data else folder.with_suffix(".jsonl"))
    shards = Shards.open(folder)
    trainer = table.version("accelerate") is not None

    if config.what == "overheads":
        return bench_overheads(config, shards)
    if config.what == "late":
        return bench_late(config, shards)
    # theirs first: accelerate would take the single rank that our engine announces for one of several
    lines = trainer_variant.text_lines(raw, shards) if raw else trainer_variant.bench_documents(shards)
    support = precision.device_support(ranks.device())
    precisions = config.measured(support)
    variants = trainer_variant.trainer_variants(config, shards, lines, precisions, trainer=trainer)
    bases = [variant.name for variant in variants[:3]]
    files = {"fp32": read_ds_config(Path("fp32")), "bf16": resolve_auto(read_ds_config(Path("zero1")), BF16)}
    variants += megamask_variant.megamask_variants(config, shards, {name: files[name] for name in precisions})
    print(*bench_header(config, shards), *beside(config, raw is not None, trainer), sep="\n")
    if "bf16" not in precisions and config.precisions is None:
        print(f"- no bf16: {support.reason}; `--precisions fp32 bf16` measures it all the same")
    print()
    rounds = in_turn(variants, config.rounds, config.steps, lambda line: print(line, file=sys.stderr, flush=True))

    by_cpu = config.threads == 1 and not torch.cuda.is_available()
    found = {name: Figures.of(some) for name, some in rounds.items()}
    print(*table.speed_markdown(found, bases, by_cpu=by_cpu, peak=peak_flops(config.peak_flops)), sep="\n")
    print(f"\nRatios are of {'tokens per CPU second' if by_cpu else 'tokens/s'}.")
    if config.json:
        report = table.speed_json(asdict(config), rounds, bases, by_cpu=by_cpu)
        config.json.write_text(json.dumps(report, indent=2, default=str) + "\n")


def bench_overheads(config: BenchConfig, shards: Shards) -> None:
    """Measure and print what guidance adds to a step."""
    ds = read_ds_config(Path("zero1" if torch.cuda.is_available() else "fp32"))
    ds = resolve_auto(ds, precision.common_support())
    with tempfile.TemporaryDirectory() as scratch:
        variants = overheads.overhead_variants(config, shards, ds, Path(scratch))
        print(*bench_header(config, shards), "", sep="\n")
        rounds = in_turn(variants, config.rounds, config.steps, lambda line: print(line, file=sys.stderr, flush=True))
    by_cpu = config.threads == 1 and not torch.cuda.is_available()
    found = {name: Figures.of(some) for name, some in rounds.items()}
    print(*overheads.overheads_markdown(found, by_cpu=by_cpu), sep="\n")
    print(f"\nTimes are {'CPU seconds of the process' if by_cpu else 'seconds'}.")
    if config.json:
        report = table.speed_json(asdict(config), rounds, [overheads.PLAIN], by_cpu=by_cpu)
        config.json.write_text(json.dumps(report, indent=2, default=str) + "\n")


def bench_late(config: BenchConfig, shards: Shards) -> None:
    """Measure and print what it saves that [MASK] enters late; a share of masked tokens at a time, to save memory."""
    ds = read_ds_config(Path("zero1" if torch.cuda.is_available() else "fp32"))
    ds = resolve_auto(ds, precision.common_support())
    by_cpu = config.threads == 1 and not torch.cuda.is_available()
    print(*bench_header(config, shards), "", *objectives.HEAD, sep="\n", flush=True)
    rounds: dict[str, list[Round]] = {}
    bases = []
    for ratio in objectives.RATIOS:
        variants = objectives.objective_variants(config, shards, ds, ratio)
        some = in_turn(variants, config.rounds, config.steps, lambda line: print(line, file=sys.stderr, flush=True))
        print(*objectives.objectives_markdown(some, by_cpu=by_cpu), sep="\n", flush=True)
        bases.append(variants[0].name)
        rounds |= some
    print(f"\nTimes are {'CPU seconds of the process' if by_cpu else 'seconds'}; goal: {objectives.GOAL}.")
    if config.json:
        report = table.speed_json(asdict(config), rounds, bases, by_cpu=by_cpu)
        config.json.write_text(json.dumps(report, indent=2, default=str) + "\n")


def bench_header(config: BenchConfig, shards: Shards) -> list[str]:
    """What the table below is of."""
    here = table.machine()
    versions = ", ".join(f"{name} {said or 'absent'}" for name, said in here["versions"].items())
    return [
        f"- machine: {here['gpu'] or ''}{', ' if here['gpu'] else ''}{here['cpu']} ({here['instructions']}), "
        f"{here['cores']} cores, load {here['load']} at the start; {here['threads']} thread(s)",
        f"- versions: Python {here['python']}, {versions}",
        f"- text: {shards.folder.name}, {shards.token_ids.size:,} tokens in the vocabulary",
        f"- model: {config.size}; {config.rows:,} rows a step in sequences of at most {config.length}; "
        f"{config.ratio:.0%} masked",
        f"- medians of {config.rounds} rounds of {config.steps} steps, in turn; only text counts as tokens",
    ]


def beside(config: BenchConfig, lines: bool, trainer: bool) -> list[str]:
    """What the two sides are."""
    padded = "lines of the raw text" if lines else "whole documents, cut off"
    return [
        "- dropout: "
        + ("0.1 in the Trainer, 0 in megamask" if config.dropout is None else f"{config.dropout} in both"),
        f"- concatenated: documents one behind the other, cut into full blocks; padded: {padded}, "
        "to the longest of a batch; megamask: packs of whole pieces of documents",
        "- theirs: " + ("transformers.Trainer" if trainer else "the Trainer's step by hand, for want of accelerate"),
    ]
