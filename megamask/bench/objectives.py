"""What it saves that [MASK] enters late: the time of a step beside MLM's, and what the matrix products promise.

For each share of masked tokens an MLM run, 3ML at several depths and MAE-LM take turns on the same packs. All targets
are [MASK]. Predicted is the saving in FLOPs (`training.flops`), measured that in time: what both sides have in common,
such as the optimizer, the masks and the loader, is in the measured time alone, so large packs come nearer.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace

from megamask.bench.measure import Round
from megamask.bench.megamask_variant import DsFile, MegamaskVariant
from megamask.bench.settings import BenchConfig
from megamask.config.pretrain_config import PacksConfig, PretrainConfig
from megamask.data.shards import Shards
from megamask.masking.corrupt import Corruption
from megamask.masking.masker import MaskingConfig
from megamask.objectives.mae_lm import DecoderConfig
from megamask.objectives.objective import ObjectiveConfig
from megamask.schedules import Schedule

RATIOS = (0.15, 0.3, 0.5)
GOAL = 0.9
"""Least part of the predicted saving that shall be measured."""


def bench_objectives(layers: int) -> dict[str, ObjectiveConfig]:
    """What takes turns, by name, with an encoder of so many ``layers``; the first is what the others are held against.

    The decoder has a third of them, as the released MAE-LM's 4 behind 12.
    """
    decoder = DecoderConfig(max(1, layers // 3))
    found = {"MLM": ObjectiveConfig()}
    for depth in sorted({layers // 2, layers * 3 // 4, layers - 1}):
        found[f"3ML, depth {depth} of {layers}"] = ObjectiveConfig("three_ml", depth=depth)
    found[f"MAE-LM, {layers} + {decoder.layers}"] = ObjectiveConfig("mae_lm", decoder=decoder)
    cross = replace(decoder, attention="cross")
    found[f"MAE-LM, {layers} + {decoder.layers}, cross"] = ObjectiveConfig("mae_lm", decoder=cross)
    return found


def objective_variants(config: BenchConfig, shards: Shards, ds: DsFile, ratio: float) -> list[MegamaskVariant]:
    """All objectives at one share of masked tokens."""
    model = config.model(config.preset[0], compiled=config.compile)
    plain = PretrainConfig(
        packs=PacksConfig(tokens=config.rows, length=config.length, per_step=1),
        model=model,
        masking=MaskingConfig(Schedule(start=ratio), corruption=Corruption(1.0, 0.0, 0.0)),
        seed=0,
    )
    layers = model.shape(shards.token_ids).num_layers
    return [
        MegamaskVariant(f"{ratio:.0%} {name}", replace(plain, objective=objective), shards, ds)
        for name, objective in bench_objectives(layers).items()
    ]


def objectives_markdown(found: Mapping[str, Sequence[Round]], *, by_cpu: bool) -> list[str]:
    """The lines of one share of masked tokens; the first variant is MLM."""
    seconds = {
        name: statistics.median((r.cpu if by_cpu else r.wall) / r.tokens for r in rs) for name, rs in found.items()
    }
    flops = {name: statistics.median((r.flops or 0) / r.tokens for r in rs) for name, rs in found.items()}
    base = next(iter(found))
    lines = []
    for name in found:
        promised, kept = 1 - flops[name] / flops[base], 1 - seconds[name] / seconds[base]
        cells = [name, f"{1 / seconds[name]:,.0f}"]
        if name == base:
            cells += ["", "", ""]
        else:
            cells += [f"{promised:.1%}", f"{kept:.1%}", f"{kept / promised:.2f}" if promised > 0 else "costs more"]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


HEAD = [
    "| variant | tokens/s | saving predicted | measured | measured / predicted |",
    "| --- | ---: | ---: | ---: | ---: |",
]
