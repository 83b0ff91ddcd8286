"""A small MLM trained under the engine, and the same in plain PyTorch, on packs made up from their number."""

from __future__ import annotations

from collections.abc import Callable

import torch

from megamask.batch import MaskPlan
from megamask.checkpoint.format import read_tensors
from megamask.checkpoint.resume import open_run
from megamask.checkpoint.save import CheckpointSave
from megamask.engine.engine import Engine
from megamask.engine.optimizer import OptimizerConfig, parameter_groups
from megamask.masking.masker import Masker, MaskingConfig
from megamask.masking.rng import PackRng
from megamask.model.encoder import Encoder
from megamask.model.head import MaskedLMHead
from megamask.model.shape import ModelConfig
from megamask.objectives import objective as objectives
from megamask.objectives.mae_lm import DecoderConfig
from megamask.objectives.mlm import MLM
from megamask.objectives.objective import ObjectiveConfig
from megamask.runtime import ranks
from megamask.schedules import LearningRate, Schedule
from tests.batches import IDS, pack

PACKS = 4
STEPS = 20
GROWING = [2] * 3 + [4] * 4 + [8] * 2 + [2] * 5 + [4] * 6
"""Packs of each step of a run in phases."""


KINDS = {
    "mlm": ObjectiveConfig(),
    "three_ml": ObjectiveConfig("three_ml", depth=1, mask_vector="own"),
    "mae_lm": ObjectiveConfig("mae_lm", decoder=DecoderConfig(1)),
    "cross": ObjectiveConfig("mae_lm", decoder=DecoderConfig(2, attention="cross"), mask_vector="own"),
    "placed": ObjectiveConfig("mae_lm", decoder=DecoderConfig(1, positions="all", dropout=0.1)),
}
"""Objectives by names of this file."""


def objective(preset: str, dropout: float = 0.0, learns: str = "mlm") -> MLM:
    torch.manual_seed(0)
    # 21 is not a multiple of any number of ranks: parts of ZeRO 3 end in padding
    config = ModelConfig(preset, num_layers=2, hidden_size=12, num_heads=2, intermediate_size=21, dropout=dropout)
    encoder = Encoder(config.shape(IDS), config)
    return objectives.build_objective(KINDS[learns], encoder, MaskedLMHead(encoder, config))


def optimizer(kind: str = "adamw", clip: float = 1.0) -> OptimizerConfig:
    return OptimizerConfig(kind=kind, lr=LearningRate(peak=1e-2, warmup=0.2), max_grad_norm=clip)


def micro(step: int, place: int, packs: int = PACKS):
    """Pack and plan at a place of a step of ``packs``: uneven sequences, another layout in each."""
    number = step * PACKS + place
    lengths = [9 + number % 5, 20 - number % 5, 11, 3 + number % 3]
    batch = pack(lengths, padding=50 - sum(lengths), number=number, seed=number)
    masker = Masker(MaskingConfig(Schedule("linear", 0.3, 0.15)), IDS)
    progress = step / STEPS
    plan = masker(batch, progress=progress, rng=PackRng(0, number))
    return batch, plan, packs * masker.budget(progress, batch.layout.rows)


def train(engine: Engine, start: int, end: int, sizes: list[int] | None = None) -> list[float]:
    """The mean loss of each step. ``sizes``: the packs of each step of the run, if they differ."""
    losses = []
    for step in range(start, end):
        total, packs = torch.zeros(()), sizes[step] if sizes else PACKS
        engine.set_packs_per_step(packs)
        for index in range(engine.accumulate):
            batch, plan, targets = micro(step, index * ranks.world() + ranks.rank(), packs)
            torch.manual_seed(batch.number)
            total += engine.train_micro(batch, plan, targets=targets).total.detach().float()
        assert engine.measure(total).finite
        engine.step(optimizer().lr((step + 1) / STEPS))
        losses.append(float(ranks.sum(total) / targets))
    return losses


def kept(engine: Engine) -> dict[str, torch.Tensor]:
    return {name: get().clone().cpu() for name, get in engine.tensors()}


def entropy(engine: Engine) -> torch.Tensor:
    """Of a pack of which nothing is hidden."""
    batch = micro(0, 0)[0]
    return engine.evaluate(batch, MaskPlan.hide_nothing(batch)).entropy


def runs(cases: list[dict]) -> list[dict]:
    """`run` of each case in turn: starting the processes takes longer than a run."""
    results = [run(**case) for case in cases]
    ranks.destroy_process_group()
    return results


def run(
    ds: dict,
    preset: str = "modern",
    kind: str = "adamw",
    clip: float = 1.0,
    dropout: float = 0.0,
    learns: str = "mlm",
    sizes: list[int] | None = None,
) -> dict:
    """20 steps in one go; then 10, a restore into a fresh engine, and 10 more; whether all that is kept is the same.

    The second and third engine get their weights one by one; the third gets zeros, before the restore.
    """

    def engine(first_value: Callable[[str], torch.Tensor | None]) -> Engine:
        with torch.device("meta"):
            model = objective(preset, dropout, learns)
        return Engine(model, optimizer(kind, clip), ds, packs_per_step=PACKS, first_value=first_value)

    model = objective(preset, dropout, learns)
    values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    whole = Engine(model, optimizer(kind, clip), ds, packs_per_step=PACKS)
    losses = train(whole, 0, STEPS, sizes)
    weights = kept(whole)
    clean = entropy(whole)
    whole.close()

    first = engine(values.get)
    halves = train(first, 0, STEPS // 2, sizes)
    state, steps = kept(first), first.steps
    first.close()
    second = engine(lambda name: None)
    second.restore(state.get, steps=steps)
    halves += train(second, STEPS // 2, STEPS, sizes)
    again = kept(second)
    same = all(torch.equal(weights[name], again[name]) for name in weights)
    same = same and torch.equal(clean, entropy(second))
    second.close()
    return {"losses": losses, "halves": halves, "same": same, "moments": sorted({n.split("/")[0] for n in weights})}


def plain(
    preset: str, clip: float, dtype: str = "float32", learns: str = "mlm", sizes: list[int] | None = None
) -> list[float]:
    """The same 20 steps by one process of plain PyTorch."""
    model = objective(preset, learns=learns).to(getattr(torch, dtype))
    config = optimizer(clip=clip)
    groups = parameter_groups(model, config)
    adam = torch.optim.AdamW(groups, betas=(config.beta1, config.beta2), eps=config.eps)
    losses = []
    for step in range(STEPS):
        for group in adam.param_groups:
            group["lr"] = config.lr((step + 1) / STEPS)
        total, packs = 0.0, sizes[step] if sizes else PACKS
        for place in range(packs):
            batch, plan, targets = micro(step, place, packs)
            logits = model.head.logits(model.represent(batch, plan))
            loss = torch.nn.functional.cross_entropy(logits, plan.labels, reduction="sum") / targets
            loss.backward()
            total += loss.item()
        if clip:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        adam.step()
        adam.zero_grad()
        losses.append(total)
    return losses


def elastic(folder: str, ds: dict, end: int) -> list[float]:
    """Steps up to ``end`` from the newest checkpoint in ``folder``, if there is one; then one is made."""
    ranks.init_process_group()
    start = open_run(folder, {})
    engine = Engine(objective("modern"), optimizer(), ds, packs_per_step=PACKS)
    if start.checkpoint:
        engine.restore(dict(read_tensors(start.checkpoint)).get, steps=start.step)
    losses = train(engine, start.step, end)
    CheckpointSave(start.run, end, engine.stream_tensors({}), {}).finish()
    start.close()
    engine.close()
    ranks.destroy_process_group()
    return losses
