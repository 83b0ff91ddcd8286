"""megamask's own side: the loop of ``pretrain`` with one pack a step, from the loader to the meters.

Under DeepSpeed's engine as users run it (ZeRO 1; weights in bf16 with masters in fp32, or all in fp32), and once in
plain PyTorch, which shows what the engine costs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import count
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from megamask import ranks, report
from megamask.batch import Losses, MaskPlan, PackedBatch
from megamask.bench.measure import BenchConfig, Clock, Round, Variant, is_text
from megamask.data.loader import Loader
from megamask.data.packs import Packs
from megamask.data.shards import Shards
from megamask.engine.engine import Engine, StepStats
from megamask.engine.optimizer import OptimizerConfig, optimizer
from megamask.masking.masker import Masker, MaskingConfig
from megamask.masking.rng import PackRng
from megamask.metrics import Meters
from megamask.model.encoder import Encoder
from megamask.model.head import Head
from megamask.model.shape import ModelConfig
from megamask.objectives.mlm import MLM
from megamask.schedules import Schedule

LONG = 10**6
"""Steps of the run of which the first are measured."""
DsFile = dict[str, Any]
"""What a file of ds_configs/ holds."""


def variants(config: BenchConfig, shards: Shards, *, fp32: DsFile, bf16: DsFile) -> list[Variant]:
    """Every preset in bf16; `bert` also in fp32 and in plain PyTorch; each compiled too if that is asked for."""
    packs = Packs(shards, tokens=config.rows, length=config.length, seed=0)
    engines: dict[str, DsFile | None] = {"fp32": fp32, "bf16": bf16, "bf16, plain PyTorch": None}
    return [
        Ours(f"megamask {preset}, {kind}" + ", compiled" * compiled, model, packs, config.ratio, engines[kind])
        for preset in config.preset
        for compiled in ((False, True) if config.compile else (False,))
        for model in (config.model(preset, compiled=compiled),)
        for kind in (engines if preset == "bert" else ("bf16",))
    ]


@runtime_checkable
class Steps(Protocol):
    """What the loop needs of an engine."""

    def train_micro(self, batch: PackedBatch, plan: MaskPlan, *, targets: int) -> Losses: ...
    def step(self, step: int, steps: int, loss: Float[Tensor, ""]) -> StepStats: ...


class Ours:
    """A variant that goes on from round to round."""

    def __init__(self, name: str, model: ModelConfig, packs: Packs, ratio: float, ds: DsFile | None):
        """``ds``: DeepSpeed's file, None for plain PyTorch."""
        self.name, self._packs, self._step = name, packs, 0
        ids = packs.token_ids
        encoder = Encoder(model.shape(ids), model)
        objective, config = MLM(encoder, Head(encoder, model)), OptimizerConfig()
        self._engine: Steps = (
            Plain(objective, config) if ds is None else Engine(objective, config, ds, packs_per_step=1)
        )
        self._masker = Masker(MaskingConfig(Schedule(start=ratio)), ids)
        self._is_text = torch.from_numpy(is_text(ids))
        self._cost = report.cost(encoder.shape)
        loader = Loader(packs, ranks.device())
        self._batches: Iterator[PackedBatch] = loader.batches(count())
        self._meters = Meters(loader)

    def run(self, steps: int) -> Round:
        clock, first = Clock(), self._step
        self._one()
        self._meters.take()
        clock.start()
        for _ in range(steps):
            self._one()
        seen = self._meters.take()
        clock.stop()
        words = sum(int(self._is_text[self._packs.batch(n).tokens].sum()) for n in range(first + 1, self._step))
        flops = self._cost.training(seen.tokens, seen.pairs, seen.targets)
        return Round(words, steps * self._packs.tokens, seen.targets, clock.wall, clock.cpu, flops)

    def _one(self) -> None:
        batch = next(self._batches)
        plan = self._masker(batch, progress=0.0, rng=PackRng(0, batch.number))
        losses = self._engine.train_micro(batch, plan, targets=len(plan.targets))
        self._masker.observe(batch, plan, losses.nll)
        self._meters.add(batch, plan, losses)
        stats = self._engine.step(self._step, LONG, self._meters.loss)
        self._masker.settle(ranks.sum)
        self._meters.step(stats.grad_norm, stats.skipped)
        self._step += 1


class Plain:
    """The engine's step without it: weights in bf16, masters and AdamW in fp32."""

    def __init__(self, objective: nn.Module, config: OptimizerConfig):
        self._config = config
        masters = objective.to(ranks.device())
        self._optimizer = optimizer(masters, config)
        self._objective = copy.deepcopy(masters).to(torch.bfloat16)
        self._masters, self._weights = list(masters.parameters()), list(self._objective.parameters())

    def train_micro(self, batch: PackedBatch, plan: MaskPlan, *, targets: int) -> Losses:
        losses = self._objective(batch, plan)
        (losses.total / targets).backward()
        return losses

    def step(self, step: int, steps: int, loss: Float[Tensor, ""]) -> StepStats:
        assert torch.isfinite(loss)
        for group in self._optimizer.param_groups:
            group["lr"] = self._config.rate(step, steps) * group["scale"]
        for master, weight in zip(self._masters, self._weights, strict=True):
            assert weight.grad is not None
            master.grad, weight.grad = weight.grad.float(), None
        norm = nn.utils.clip_grad_norm_(self._masters, self._config.clip)
        self._optimizer.step()
        torch._foreach_copy_([weight.detach() for weight in self._weights], [m.detach() for m in self._masters])
        return StepStats(float(norm), False)
