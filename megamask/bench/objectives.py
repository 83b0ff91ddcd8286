"""How much time it saves to insert [MASK] late: a step of each objective beside one of MLM.

For each share of masked tokens, MLM, 3ML at several depths and MAE-LM take turns on the same packs. All targets are
[MASK]. The prediction is the saving in FLOPs (`training.flops`), the measurement the saving in time. The
measurement also contains what all objectives share, such as the optimizer, the masks and the loader, so larger packs
come nearer to the prediction.
"""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace

from megamask.bench.measure import Round
from megamask.bench.megamask_variant import DsFile, MegamaskVariant
from megamask.bench.settings import BenchConfig
from megamask.config.pretrain_config import PretrainConfig
from megamask.config.settings import PacksConfig
from megamask.data.shards import Shards
from megamask.masking.corrupt import Corruption
from megamask.masking.masker import MaskingConfig
from megamask.objectives.mae_lm import DecoderConfig
from megamask.objectives.objective import ObjectiveConfig
from megamask.schedules import Schedule

RATIOS = (0.15, 0.3, 0.5)
GOAL = 0.9
"""The goal for measured / predicted saving."""


def objectives_to_compare(layers: int) -> dict[str, ObjectiveConfig]:
    """The objectives by name, for an encoder of so many ``layers``; the others are compared with the first.

    The decoder has a third of the layers, as the released MAE-LM has 4 after 12.
    """
    decoder = DecoderConfig(max(1, layers // 3))
    configs = {"MLM": ObjectiveConfig()}
    for depth in sorted({layers // 2, layers * 3 // 4, layers - 1}):
        configs[f"3ML, depth {depth} of {layers}"] = ObjectiveConfig("three_ml", depth=depth)
    configs[f"MAE-LM, {layers} + {decoder.layers}"] = ObjectiveConfig("mae_lm", decoder=decoder)
    cross = replace(decoder, attention="cross")
    configs[f"MAE-LM, {layers} + {decoder.layers}, cross"] = ObjectiveConfig("mae_lm", decoder=cross)
    return configs


def objective_variants(config: BenchConfig, shards: Shards, ds: DsFile, ratio: float) -> list[MegamaskVariant]:
    """All objectives at one share of masked tokens."""
    model = config.model(config.preset[0], compiled=config.compile)
    plain = PretrainConfig(
        packs=PacksConfig(tokens=config.pack_tokens, length=config.length, per_step=1),
        model=model,
        masking=MaskingConfig(Schedule(start=ratio), corruption=Corruption(1.0, 0.0, 0.0)),
        seed=0,
    )
    layers = model.shape(shards.token_ids).num_layers
    return [
        MegamaskVariant(f"{ratio:.0%} {name}", replace(plain, objective=objective), shards, ds)
        for name, objective in objectives_to_compare(layers).items()
    ]


def objectives_markdown(rounds: Mapping[str, Sequence[Round]], *, by_cpu: bool) -> list[str]:
    """The lines of one share of masked tokens; the first variant is MLM."""
    seconds = {name: statistics.median(r.seconds(by_cpu=by_cpu) / r.tokens for r in rs) for name, rs in rounds.items()}
    flops = {name: statistics.median((r.flops or 0) / r.tokens for r in rs) for name, rs in rounds.items()}
    base = next(iter(rounds))
    lines = []
    for name in rounds:
        predicted, measured = 1 - flops[name] / flops[base], 1 - seconds[name] / seconds[base]
        ratio = f"{measured / predicted:.2f}" if predicted > 0 else "costs more"
        cells = ["", "", ""] if name == base else [f"{predicted:.1%}", f"{measured:.1%}", ratio]
        lines.append(f"| {' | '.join([name, f'{1 / seconds[name]:,.0f}', *cells])} |")
    return lines


HEAD = [
    "| variant | tokens/s | saving predicted | measured | measured / predicted |",
    "| --- | ---: | ---: | ---: | ---: |",
]
