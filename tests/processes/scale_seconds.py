"""The CPU seconds of a step on one rank and on two, beside what `bench/scale.py` predicts for two from one:

    torchrun --nproc-per-node 1 -m tests.processes.scale_seconds one.json
    torchrun --nproc-per-node 2 -m tests.processes.scale_seconds one.json

CPU seconds of a rank, since ranks on one machine may share a core. The bandwidth is that of an all-reduce of as many
bytes, in the same seconds.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from megamask.bench.scale import STAGES, Links, ScaledRun, StepSeconds
from megamask.engine.engine import Engine
from megamask.masking.masker import Masker, MaskingConfig
from megamask.masking.rng import PackRng
from megamask.model.encoder import Encoder
from megamask.model.head import MaskedLMHead
from megamask.model.shape import ModelConfig
from megamask.objectives.mlm import MLM
from megamask.runtime import ranks
from megamask.schedules import Schedule
from tests.batches import IDS, pack
from tests.processes.test_volume import KEPT
from tests.processes.training_worker import optimizer

ACCUMULATE, WARM, STEPS = 2, 3, 10


def cpu_seconds(work: Callable[[], object]) -> float:
    begin = time.process_time()
    work()
    return time.process_time() - begin


def measure(stage: int) -> dict[str, float]:
    """Medians over steps, in seconds of this rank."""
    torch.manual_seed(0)
    config = ModelConfig("bert", size="tiny", dropout=0.0)
    encoder = Encoder(config.shape(IDS), config)
    zero = {"zero_optimization": {"stage": stage} | (KEPT if stage == 3 else {})}
    world = ranks.world()
    engine = Engine(MLM(encoder, MaskedLMHead(encoder, config)), optimizer(), zero, packs_per_step=ACCUMULATE * world)
    batch = pack([64] * 4)
    plan = Masker(MaskingConfig(Schedule(start=0.15)), IDS)(batch, progress=0.5, rng=PackRng(0, 0))
    targets = ACCUMULATE * world * len(plan.targets)
    parts: dict[str, list[float]] = {"passes": [], "norm": [], "optimizer": []}
    for _ in range(WARM + STEPS):
        losses = []

        def passes(kept: list = losses) -> None:
            kept += [engine.train_micro(batch, plan, targets=targets).total.detach() for _ in range(ACCUMULATE)]

        parts["passes"].append(cpu_seconds(passes))
        parts["norm"].append(cpu_seconds(lambda kept=losses: engine.measure(sum(kept))))
        parts["optimizer"].append(cpu_seconds(lambda: engine.step(1e-4)))
    weights = engine.num_weights
    engine.close()
    return {name: statistics.median(each[WARM:]) for name, each in parts.items()} | {"weights": weights}


def main(path: Path) -> None:
    """Write the seconds of one rank, or print those of several beside the prediction."""
    ranks.init_process_group()
    found = {str(stage): measure(stage) for stage in STAGES}
    if ranks.world() == 1:
        path.write_text(json.dumps(found))
        return
    one = json.loads(path.read_text())
    weights = int(one["0"]["weights"])
    numbers = torch.zeros(weights)
    bytes_sent = 2 * 4 * weights * (ranks.world() - 1) / ranks.world()
    taken = statistics.median([cpu_seconds(lambda: ranks.sum(numbers)) for _ in range(9)][2:])
    links = Links(bytes_sent / taken, bytes_sent / taken, latency=0.0)
    lines = []
    for stage in STAGES:
        alone = one[str(stage)]
        seconds = StepSeconds(0.0, alone["passes"] / ACCUMULATE, alone["optimizer"], alone["norm"])
        run = ScaledRun(seconds, weights, bytes=4, accumulate=ACCUMULATE, releases=False)
        here = sum(value for name, value in found[str(stage)].items() if name != "weights")
        measured = statistics.mean(ranks.gather(here))
        predicted, compute = run.step_seconds(stage, ranks.world(), links), run.step_seconds(stage, 1, links)
        lines.append(
            f"| {stage} | {compute:.3f} | {predicted:.3f} | {measured:.3f} | {predicted / measured - 1:+.0%} |"
        )
    if ranks.is_main():
        print(f"{weights:,} weights, {links.inside / 1e9:.2f} GB/s", *lines, sep="\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
