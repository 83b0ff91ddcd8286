"""`megamask bench`: build the variants, let them take turns, print the conditions and a table, write the results."""

from __future__ import annotations

import json
import logging
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch

from megamask.bench import megamask_variant, objectives, overheads, table, trainer_variant
from megamask.bench.measure import Medians, Round, measure_in_turn
from megamask.bench.settings import COMPILED, BenchConfig
from megamask.data import prepare
from megamask.data.shards import Shards
from megamask.engine.ds_file import read_ds_config, resolve_auto
from megamask.errors import StorageError
from megamask.runtime import precision, ranks
from megamask.runtime.accelerator import choose_accelerator
from megamask.runtime.precision import PrecisionSupport
from megamask.storage.atomic_write import write_atomic
from megamask.training.mfu import peak_flops

BF16 = PrecisionSupport(True, "it is measured")
Results = tuple[dict[str, list[Round]], list[str]]
"""The rounds of each variant by its name, and the names of the variants that the others are compared with."""


def bench(config: BenchConfig) -> None:
    """Measure, print, write."""
    torch.set_num_threads(config.threads)
    choose_accelerator()
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)  # it logs to stdout, where the table goes
    run = {"trainer": bench_trainer, "overheads": bench_overheads, "late": bench_objectives}[config.what]
    rounds, bases = run(config)
    by_cpu = measures_cpu_time(config)
    print(f"\nVariants are compared by {'CPU seconds of the process' if by_cpu else 'seconds'}.")
    if config.json:
        report = table.speed_json(asdict(config), rounds, bases, by_cpu=by_cpu)
        try:
            write_atomic(config.json, json.dumps(report, indent=2, default=str) + "\n")
        except OSError as error:
            raise StorageError(f"{config.json} cannot be written: {error.strerror}.") from None


def measures_cpu_time(config: BenchConfig) -> bool:
    """Whether the CPU time of the process is compared, which other processes disturb less, instead of seconds."""
    return config.threads == 1 and not torch.cuda.is_available()


def bench_trainer(config: BenchConfig) -> Results:
    """megamask beside the Trainer."""
    folder = config.data or prepare.local_data(prepare.CACHE)
    raw = config.text or (None if config.data else folder.with_suffix(".jsonl"))
    shards = Shards.open(folder)
    texts = trainer_variant.text_lines(raw, shards) if raw else trainer_variant.bench_documents(shards)
    support = precision.device_support(ranks.device())
    precisions = config.measured(support)
    # the Trainer first: accelerate would take the single rank that our engine announces for one of several
    variants = trainer_variant.trainer_variants(config, shards, texts, precisions)
    names = [variant.name for variant in variants]
    bases = list(dict.fromkeys(names[:3] + [name for name in names if name.endswith(COMPILED)]))
    files = {"fp32": read_ds_config(Path("fp32")), "bf16": resolve_auto(read_ds_config(Path("zero1")), BF16)}
    builders = megamask_variant.megamask_variants(config, shards, {name: files[name] for name in precisions})
    variants += [build() for build in builders.values()]
    print(*conditions(config, shards), *sides(config, raw is not None), sep="\n")
    if "bf16" not in precisions and config.precisions is None:
        print(f"- bf16 is not measured: {support.reason}; `--precisions fp32 bf16` measures it all the same")
    print()
    rounds = measure_in_turn(variants, config.rounds, config.steps)
    by_cpu, peak = measures_cpu_time(config), peak_flops(config.peak_flops)
    medians = {name: Medians.of(of_variant) for name, of_variant in rounds.items()}
    print(*table.speed_markdown(medians, bases, by_cpu=by_cpu, peak=peak), sep="\n")
    return rounds, bases


def bench_overheads(config: BenchConfig) -> Results:
    """What entropy sources and teachers add to a step."""
    shards = Shards.open(config.data or prepare.local_data(prepare.CACHE))
    with tempfile.TemporaryDirectory() as scratch:
        builders = overheads.overhead_variants(config, shards, megamask_variant.ds_config(), Path(scratch))
        variants = [build() for build in builders.values()]
        print(*conditions(config, shards), "", sep="\n")
        rounds = measure_in_turn(variants, config.rounds, config.steps)
    medians = {name: Medians.of(of_variant) for name, of_variant in rounds.items()}
    print(*overheads.overheads_markdown(medians, by_cpu=measures_cpu_time(config)), sep="\n")
    return rounds, [overheads.PLAIN]


def bench_objectives(config: BenchConfig) -> Results:
    """What late [MASK]s save. One share of masked tokens at a time, to save memory."""
    shards = Shards.open(config.data or prepare.local_data(prepare.CACHE))
    print(*conditions(config, shards), "", *objectives.HEAD, sep="\n", flush=True)
    rounds: dict[str, list[Round]] = {}
    bases = []
    for ratio in objectives.RATIOS:
        variants = objectives.objective_variants(config, shards, megamask_variant.ds_config(), ratio)
        of_ratio = measure_in_turn(variants, config.rounds, config.steps)
        lines = objectives.objectives_markdown(of_ratio, by_cpu=measures_cpu_time(config))
        print(*lines, sep="\n", flush=True)
        bases.append(variants[0].name)
        rounds |= of_ratio
    print(f"\nGoal of measured / predicted: {objectives.GOAL}.")
    return rounds, bases


def conditions(config: BenchConfig, shards: Shards) -> list[str]:
    """Under which conditions a table was measured."""
    machine = table.machine()
    versions = ", ".join(f"{name} {version or 'absent'}" for name, version in machine["versions"].items())
    device = f"{machine['gpu']}, " if machine["gpu"] else ""
    return [
        f"- machine: {device}{machine['cpu']} ({machine['instructions']}), {machine['cores']} cores, load "
        f"{machine['load']} at the start; {machine['threads']} thread(s)",
        f"- versions: Python {machine['python']}, {versions}",
        f"- text: {shards.folder.name}, {shards.token_ids.size:,} tokens in the vocabulary",
        f"- model: {config.size}; {config.pack_tokens:,} positions a step in sequences of at most {config.length}; "
        f"{config.ratio:.0%} masked",
        f"- medians of {config.rounds} rounds of {config.steps} steps, in turn; only text counts as tokens",
    ]


def sides(config: BenchConfig, lines: bool) -> list[str]:
    """How the Trainer and megamask differ; ``lines``: whether the padded sequences are lines of a text."""
    dropout = "0.1 in the Trainer, 0 in megamask" if config.dropout is None else f"{config.dropout} in both"
    return [
        f"- dropout: {dropout}",
        "- freed memory: given back as glibc does by default in the Trainer, kept in megamask, as in its runs on a CPU",
        "- concatenated: documents one after the other, cut into full blocks; padded: "
        + ("lines of the raw text" if lines else "whole documents, truncated")
        + ", to the longest of a batch; megamask: packs of whole pieces of documents",
    ]
