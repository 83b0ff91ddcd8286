"""Training steps of megamask on one device: speed, the parts of a step, memory, and the ZeRO stages."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from megamask.batch import Losses, MaskPlan, PackedBatch, SoftTargets
from megamask.bench.gpu.figures import NEEDS_CUDA, Figure
from megamask.bench.gpu.goals import SHARE_OF_MATMUL, WAITS
from megamask.bench.gpu.kernels import matmul_rate
from megamask.bench.gpu.settings import GpuBenchConfig
from megamask.bench.gpu.sizes import model_size, open_text, sizes
from megamask.bench.gpu.timing import Measurement, PeakMemory, count_waits, each
from megamask.bench.measure import Round
from megamask.bench.megamask_variant import DsFile, MegamaskVariant, Plain, ds_config
from megamask.config.pretrain_config import PretrainConfig
from megamask.config.settings import PacksConfig
from megamask.data.shards import Shards
from megamask.engine.ds_file import read_ds_config, resolve_auto
from megamask.engine.engine import Engine, Measured
from megamask.engine.stopwatch import Stopwatch
from megamask.masking.masker import MaskingConfig
from megamask.model.shape import ModelConfig
from megamask.runtime import precision, ranks
from megamask.schedules import Schedule
from megamask.training.mfu import peak_flops

MASKED = 0.15


class TimedEngine:
    """An engine whose calls are timed on the device."""

    def __init__(self, engine: Engine | Plain):
        self._engine = engine
        self._watches = {name: Stopwatch(ranks.device()) for name in ("micro-steps", "gradient norm", "optimizer")}

    def train_micro(
        self, batch: PackedBatch, plan: MaskPlan, soft: SoftTargets | None = None, *, targets: int
    ) -> Losses:
        with self._watches["micro-steps"]:
            return self._engine.train_micro(batch, plan, soft, targets=targets)

    def measure(self, loss: Float[Tensor, ""]) -> Measured:
        with self._watches["gradient norm"]:
            return self._engine.measure(loss)

    def step(self, rate: float) -> None:
        with self._watches["optimizer"]:
            self._engine.step(rate)

    def drop(self) -> None:
        self._engine.drop()

    def nonfinite_gradients(self) -> list[str]:
        return self._engine.nonfinite_gradients()

    def seconds(self) -> dict[str, float]:
        """Seconds of each part since the last call, the forward passes apart."""
        taken = {name: watch.take() for name, watch in self._watches.items()}
        if isinstance(self._engine, Engine):
            forward = self._engine.forward_seconds()
            taken = {"forward": forward, "backward": taken.pop("micro-steps") - forward} | taken
        return taken


def step_config(config: GpuBenchConfig, size: str, model: ModelConfig) -> PretrainConfig:
    """A run whose step is one pack."""
    chosen = sizes(config)
    return PretrainConfig(
        packs=PacksConfig(tokens=chosen.packs[size], length=chosen.length, per_step=1),
        masking=MaskingConfig(Schedule(start=MASKED)),
        model=replace(model, size=model_size(config, size), max_positions=max(512, chosen.length)),
        seed=0,
    )


def training_steps(config: GpuBenchConfig, size: str) -> Iterator[Figure]:
    """Speed, parts and memory of steps of a model, as it is and compiled, beside the rate of a large product."""
    shards, chosen, ds = open_text(config), sizes(config), ds_config()
    on_gpu = torch.cuda.is_available()
    n = chosen.matrix
    rate = matmul_rate(n, n, n, torch.bfloat16 if on_gpu else torch.float32)
    yield Figure("matmul", rate, "FLOP/s", {"rows": n})
    models = {"bert": ModelConfig("bert")}
    if chosen.compile:
        models["bert, compiled"] = ModelConfig("bert", compile=True)
    if size == "base":
        models["modern"] = ModelConfig("modern")

    def build(name: str) -> MegamaskVariant:
        return MegamaskVariant(name, step_config(config, size, models[name]), shards, ds)

    yield from each((name, partial(_step_figures, config, partial(build, name), rate)) for name in models)


def _step_figures(config: GpuBenchConfig, build: Callable[[], MegamaskVariant], rate: float) -> Iterator[Figure]:
    chosen = sizes(config)
    with PeakMemory() as peak:
        variant = build()
        variant.run(chosen.steps)  # compiles, and fills caches
        rounds = [variant.run(chosen.steps) for _ in range(chosen.rounds)]
    try:
        yield from _speed_figures(variant.name, rounds, rate)
        yield peak.figure(f"{variant.name}, peak memory")
        timed = TimedEngine(variant.engine)
        variant.trainer = replace(variant.trainer, engine=timed)
        timed.seconds()
        whole = variant.run(chosen.steps).wall / chosen.steps
        seconds = {name: each / (chosen.steps + 1) for name, each in timed.seconds().items()}
        seconds["masks, figures and data"] = max(0.0, whole - sum(seconds.values()))
        for name, each_part in seconds.items():
            yield Figure(f"{variant.name}, part: {name}", each_part, "s", {"share of the step": each_part / whole})
        if torch.cuda.is_available():
            waits = count_waits(variant.step, chosen.steps) / chosen.steps
            yield Figure(f"{variant.name}, {WAITS}", waits, "per step")
        else:
            yield Figure(f"{variant.name}, {WAITS}", error=NEEDS_CUDA)
    finally:
        variant.close()


def _speed_figures(name: str, rounds: list[Round], rate: float | None = None) -> Iterator[Figure]:
    """Medians over ``rounds``; ``rate`` is that of a large matrix product in FLOP/s."""
    first = rounds[0]
    setting = {"rows": first.rows, "targets": first.targets, "rounds": len(rounds)}
    yield Figure(f"{name}, tokens/s", statistics.median(r.tokens / r.wall for r in rounds), "tokens/s", setting)
    if first.flops is not None and rate is not None:
        achieved = statistics.median((r.flops or 0.0) / r.wall for r in rounds)
        yield Figure(f"{name}, {SHARE_OF_MATMUL}", achieved / rate, "share", {"FLOP/s": achieved})
        if peak := peak_flops():
            yield Figure(f"{name}, MFU", achieved / peak, "share", {"peak FLOP/s": peak})
    yield Figure(f"{name}, host busy", statistics.median(r.cpu / r.wall for r in rounds), "share")


# ---- ZeRO


def zero_stages(config: GpuBenchConfig) -> Iterator[Figure]:
    """Each stage alone on the device: what its bookkeeping costs, with nothing to send."""
    shards = open_text(config)
    measurements: list[Measurement] = [
        (f"ZeRO {stage}", partial(_zero_figures, config, partial(_zero_variant, config, shards, stage)))
        for stage in range(4)
    ]
    yield from each(measurements)


def _zero_variant(config: GpuBenchConfig, shards: Shards, stage: int) -> MegamaskVariant:
    ds: DsFile = resolve_auto(read_ds_config(Path(f"zero{stage}")), precision.common_support())
    return MegamaskVariant(f"ZeRO {stage}", step_config(config, "base", ModelConfig("bert")), shards, ds)


def _zero_figures(config: GpuBenchConfig, build: Callable[[], MegamaskVariant]) -> Iterator[Figure]:
    chosen = sizes(config)
    with PeakMemory() as peak:
        variant = build()
        variant.run(chosen.steps)
        rounds = [variant.run(chosen.steps) for _ in range(chosen.rounds)]
    try:
        yield from _speed_figures(variant.name, rounds)
        yield peak.figure(f"{variant.name}, peak memory")
    finally:
        variant.close()
