"""Variants that take turns with a plain step: entropy sources and teachers, late [MASK]s, and the Trainer."""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch

from megamask.bench import objectives, overheads
from megamask.bench.gpu.figures import Figure
from megamask.bench.gpu.goals import BESIDE_PLAIN, BESIDE_PREDICTED
from megamask.bench.gpu.settings import GpuBenchConfig
from megamask.bench.gpu.sizes import bench_config, open_text, sizes
from megamask.bench.gpu.timing import each
from megamask.bench.measure import Round, Variant, measure_in_turn
from megamask.bench.megamask_variant import MegamaskVariant, ds_config, megamask_variants
from megamask.bench.settings import COMPILED
from megamask.engine.ds_file import read_ds_config, resolve_auto
from megamask.runtime import precision
from megamask.runtime.precision import Precision
from megamask.training.flops import PROBE_LEARNS

Rounds = Mapping[str, Sequence[Round]]


def seconds_per_token(rounds: Sequence[Round]) -> float:
    """The median over ``rounds``."""
    return statistics.median(one.wall / one.tokens for one in rounds)


# ---- entropy sources


def entropy_sources(config: GpuBenchConfig, size: str) -> Iterator[Figure]:
    """The time of a step with each source, and with teachers of the student's shape, beside a plain step."""
    settings = bench_config(config, size)
    with tempfile.TemporaryDirectory() as scratch:
        builders = overheads.overhead_variants(settings, open_text(config), ds_config(), Path(scratch))
        plain = builders.pop(overheads.PLAIN)()
        yield from each((name, partial(_beside_plain, config, plain, build)) for name, build in builders.items())
        plain.close()


def _beside_plain(
    config: GpuBenchConfig, plain: MegamaskVariant, build: Callable[[], MegamaskVariant]
) -> Iterator[Figure]:
    chosen, variant = sizes(config), build()
    try:
        if variant.name == "probe" and config.size == "full":
            variant.run(PROBE_LEARNS[0])  # in its first steps it learns more often
        rounds = measure_in_turn([plain, variant], chosen.rounds, chosen.steps)
        of_plain, of_variant = (seconds_per_token(rounds[one.name]) for one in (plain, variant))
        setting = {"tokens/s": 1 / of_variant, "plain tokens/s": 1 / of_plain}
        yield Figure(f"{variant.name}, {BESIDE_PLAIN}", of_variant / of_plain, "x", setting)
    finally:
        variant.close()


# ---- late [MASK]s


def late_masks(config: GpuBenchConfig) -> Iterator[Figure]:
    """What 3ML and MAE-LM save of a step of MLM, and of its FLOPs."""
    yield from each((f"{ratio:.0%}", partial(_savings, config, ratio)) for ratio in sizes(config).ratios)


def _savings(config: GpuBenchConfig, ratio: float) -> Iterator[Figure]:
    chosen, settings = sizes(config), bench_config(config, "base")
    variants = objectives.objective_variants(settings, open_text(config), ds_config(), ratio)
    try:
        rounds = measure_in_turn(variants, chosen.rounds, chosen.steps)
    finally:
        for variant in variants:
            variant.close()
    base = next(iter(rounds))
    seconds = {name: seconds_per_token(of_variant) for name, of_variant in rounds.items()}
    flops = {name: statistics.median((r.flops or 0.0) / r.tokens for r in rs) for name, rs in rounds.items()}
    for name in [name for name in rounds if name != base]:
        setting = {"tokens/s": 1 / seconds[name], "predicted": 1 - flops[name] / flops[base]}
        yield Figure(f"{name}, saving", 1 - seconds[name] / seconds[base], "share", setting)
        if setting["predicted"] > 0:
            measured = (1 - seconds[name] / seconds[base]) / setting["predicted"]
            yield Figure(f"{name}, {BESIDE_PREDICTED}", measured, "x")


# ---- the Trainer


def beside_trainer(config: GpuBenchConfig) -> Iterator[Figure]:
    """Tokens per second beside the Trainer's example: same text, model, precision and dropout (none).

    First both as they are, then both compiled, then padded texts in the Trainer and megamask in plain PyTorch, so that
    a cut costs the least of them. The Trainer's attention is the default of transformers: torch's, which is flash
    attention where no token is padding.
    """
    from megamask.bench import trainer_variant  # needs a transformers that works, as nothing else here does

    settings, shards = bench_config(config, "base", compiled=True), open_text(config)
    kind: Precision = "bf16" if torch.cuda.is_available() else "fp32"
    texts = trainer_variant.bench_documents(shards)
    # the Trainer first: accelerate would take the single rank that our engine announces for one of several
    trainers = {one.name: one for one in trainer_variant.trainer_variants(settings, shards, texts, [kind])}
    file = resolve_auto(read_ds_config(Path("zero1" if kind == "bf16" else "fp32")), precision.common_support())
    builders = megamask_variants(settings, shards, {kind: file})
    base, ours = f"Trainer, concatenated, {kind}", f"megamask bert, {kind}"
    pairs = [(base, ours)] + ([(base + COMPILED, ours + COMPILED)] if settings.compile else [])
    others = [name for name in trainers if name not in dict(pairs)]
    plain = [name for name in builders if name not in dict(pairs).values() and not name.endswith(COMPILED)]
    yield from each(
        [
            *((mine, partial(_beside, config, [trainers[theirs]], [builders[mine]])) for theirs, mine in pairs),
            (
                "padded, plain PyTorch",
                partial(_beside, config, [trainers[name] for name in (base, *others)], [builders[n] for n in plain], 1),
            ),
        ]
    )


def _beside(
    config: GpuBenchConfig,
    trainers: Sequence[Variant],
    builders: Sequence[Callable[[], MegamaskVariant]],
    known: int = 0,
) -> Iterator[Figure]:
    """The first of ``trainers``, the other ones and those of megamask in turn; the speeds of all but the first
    ``known``, and how many times as fast as the first the others are."""
    built: list[MegamaskVariant] = []
    try:
        for build in builders:
            built.append(build())
        rounds = measure_in_turn([*trainers, *built], sizes(config).rounds, sizes(config).steps)
    finally:
        for variant in built:
            variant.close()
    speeds = {name: 1 / seconds_per_token(of_variant) for name, of_variant in rounds.items()}
    base = next(iter(speeds))
    for name in list(speeds)[known:]:
        text = statistics.median(r.tokens / r.rows for r in rounds[name])
        yield Figure(f"{name}, tokens/s", speeds[name], "tokens/s", {"positions that are text": text})
        if name != base:
            yield Figure(f"{name}, x {base}", speeds[name] / speeds[base], "x")
