"""The steps of `pretrain`, from the loader to the meters, in one process.

Under DeepSpeed as users run it (ZeRO 1, weights in bf16 with masters in fp32; or all in fp32), and in plain PyTorch,
which shows what DeepSpeed costs.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Generator, Mapping
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from megamask.batch import Losses, MaskPlan, PackedBatch, SoftTargets
from megamask.bench.measure import Clock, Round, text_token_mask
from megamask.bench.settings import COMPILED, BenchConfig
from megamask.config.pretrain_config import PretrainConfig
from megamask.config.settings import PacksConfig
from megamask.data.loader import Loader
from megamask.data.packs import Packs
from megamask.data.shards import Shards
from megamask.engine.ds_file import read_ds_config, resolve_auto
from megamask.engine.engine import Engine, Measured
from megamask.engine.optimizer import OptimizerConfig, build_optimizer
from megamask.health.loss_spikes import SpikePolicy
from megamask.health.settings import SpikesConfig
from megamask.masking.masker import Masker, MaskingConfig
from megamask.metrics.meters import Meters
from megamask.model.encoder import Encoder
from megamask.model.head import MaskedLMHead
from megamask.objectives import objective as objectives
from megamask.runtime import precision, private_api, ranks
from megamask.runtime.cpu_memory import keep_freed_memory
from megamask.runtime.precision import Precision
from megamask.schedules import Schedule
from megamask.teacher.teacher import Teacher
from megamask.training.entropy_sources import EntropySources, build_entropy_sources
from megamask.training.flops import forward_flops
from megamask.training.step import Trainer, take_step

NUM_STEPS = 10**6
"""Steps of the run whose first ones are measured."""
DsFile = dict[str, Any]
"""The content of a file of ds_configs/."""


def ds_config() -> DsFile:
    """The DeepSpeed file under which only variants of megamask are compared."""
    name = "zero1" if torch.cuda.is_available() else "fp32"
    return resolve_auto(read_ds_config(Path(name)), precision.common_support())


def megamask_variants(
    config: BenchConfig, shards: Shards, files: Mapping[Precision, DsFile]
) -> dict[str, Callable[[], MegamaskVariant]]:
    """What builds every preset in the precisions of ``files``, by its name.

    `bert` in bf16 also in plain PyTorch; if set, each compiled as well.
    """
    packs = PacksConfig(tokens=config.pack_tokens, length=config.length, per_step=1)
    masking = MaskingConfig(Schedule(start=config.ratio))
    engines: dict[str, DsFile | None] = {str(name): ds for name, ds in files.items()}
    plain: dict[str, DsFile | None] = {"bf16, plain PyTorch": None} if "bf16" in files else {}
    builders: dict[str, Callable[[], MegamaskVariant]] = {}
    for preset in config.preset:
        for compiled in (False, True) if config.compile else (False,):
            model = config.model(preset, compiled=compiled)
            run = PretrainConfig(packs=packs, masking=masking, model=model, seed=0)
            for kind, ds in (engines | plain if preset == "bert" else engines).items():
                name = f"megamask {preset}, {kind}" + COMPILED * compiled
                builders[name] = partial(MegamaskVariant, name, run, shards, ds)
    return builders


class MegamaskVariant:
    """A run of megamask that continues from round to round."""

    def __init__(
        self, name: str, config: PretrainConfig, shards: Shards, ds: DsFile | None, teacher: Teacher | None = None
    ):
        """``ds`` is the content of a DeepSpeed file; None means plain PyTorch."""
        self.name, self._config, self._taken = name, config, 0
        sizes = config.packs
        self._packs = Packs(
            shards, tokens=sizes.tokens, length=sizes.length, seed=0, per_step=sizes.per_step,
            masks_per_text=sizes.masks_per_text,
            targets=config.masking.most_targets(sizes.tokens),
        )  # fmt: skip
        ids = self._packs.token_ids
        encoder = Encoder(config.model.shape(ids), config.model)
        objective = objectives.build_objective(config.objective, encoder, MaskedLMHead(encoder, config.model))
        settings = OptimizerConfig()
        self._lr = settings.lr
        self.engine: Engine | Plain
        if ds is None:
            self.engine, sources = Plain(objective, settings), EntropySources()
        else:
            self.engine = engine = Engine(objective, settings, ds, packs_per_step=sizes.per_step)
            sources = build_entropy_sources(config, engine, self._packs, teacher)
        self._is_text = torch.from_numpy(text_token_mask(ids))
        self._flops = forward_flops(encoder.shape, config.objective, config.masking.corruption.mask)
        loader = Loader(self._packs, ranks.device())
        self._batches: Generator[PackedBatch, None, None] = loader.batches(count())
        self._meters = Meters(loader)
        self.trainer = Trainer(
            self.engine, Masker(config.masking, ids), self._meters, SpikePolicy(SpikesConfig()), 0, sources,
            teacher if config.distill.active else None,
        )  # fmt: skip

    def run(self, steps: int) -> Round:
        if ranks.device().type == "cpu":
            keep_freed_memory()
        clock, first = Clock(), self._taken
        self.step()
        self._meters.take()
        clock.start()
        for _ in range(steps):
            self.step()
        window = self._meters.take()
        clock.stop()
        sizes = self._config.packs
        numbers = range((first + 1) * sizes.per_step, self._taken * sizes.per_step)
        tokens = sum(int(self._is_text[self._packs.batch(number).tokens].sum()) for number in numbers)
        flops = self._flops.training(window.tokens, window.pairs, window.targets)
        return Round(tokens, len(numbers) * sizes.tokens, window.targets, clock.wall, clock.cpu, flops)

    def step(self) -> None:
        """Take the next step."""
        batches = [next(self._batches) for _ in range(self._config.packs.per_step)]
        rate = self._lr((self._taken + 1) / NUM_STEPS)
        take_step(self.trainer, self._taken, batches, progress=self._taken / NUM_STEPS, rate=rate)
        self._taken += 1

    def close(self) -> None:
        """Release the memory of the engine, and the thread of the loader."""
        self._batches.close()
        if isinstance(self.engine, Engine):
            self.engine.close()


class Plain:
    """The same step in plain PyTorch: weights in bf16, masters and AdamW in fp32."""

    def __init__(self, objective: nn.Module, config: OptimizerConfig):
        self._config = config
        masters = objective.to(ranks.device())
        self._optimizer = build_optimizer(masters, config)
        self._objective = copy.deepcopy(masters).to(torch.bfloat16)
        self._masters, self._weights = list(masters.parameters()), list(self._objective.parameters())

    def train_micro(
        self, batch: PackedBatch, plan: MaskPlan, soft: SoftTargets | None = None, *, targets: int
    ) -> Losses:
        losses = self._objective(batch, plan, soft)
        (losses.total / targets).backward()
        return losses

    def measure(self, loss: Float[Tensor, ""]) -> Measured:
        for master, weight in zip(self._masters, self._weights, strict=True):
            assert weight.grad is not None
            master.grad, weight.grad = weight.grad.float(), None
        norm = nn.utils.clip_grad_norm_(self._masters, self._config.max_grad_norm)
        return Measured(*torch.stack([loss, norm]).tolist())

    def step(self, rate: float) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        self._optimizer.step()
        private_api.copy_all([weight.detach() for weight in self._weights], [m.detach() for m in self._masters])

    def drop(self) -> None:
        self._optimizer.zero_grad()

    def nonfinite_gradients(self) -> list[str]:
        return []
