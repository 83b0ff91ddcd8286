"""Steps into which a number is put that is none, on one rank alone, and copies of weights in which a bit flips; whole
runs with a spike."""

from __future__ import annotations

import hashlib
import os
import random
import shutil
from collections.abc import Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn

from megamask.batch import Losses, SoftTargets
from megamask.checkpoint.format import read_state, read_tensors
from megamask.checkpoint.run_folder import RunFolder
from megamask.checkpoint.save import save_checkpoint
from megamask.engine.engine import Engine
from megamask.errors import NonFiniteError, WeightsDivergedError
from megamask.health.loss_spikes import SkippedPacks, SpikePolicy, StepDecision
from megamask.health.settings import SpikesConfig
from megamask.masking.masker import Masker, MaskingConfig
from megamask.metrics.meters import Meters
from megamask.runtime import ranks
from megamask.schedules import Schedule
from megamask.training.step import Trainer, take_step
from tests.batches import IDS
from tests.processes.launch_worker import one
from tests.processes.training_worker import PACKS, STEPS, kept, micro, objective, optimizer

PLACES = ("loss", "gradient", "activation", "teacher")
BAD = ("nan", "inf", "-inf")
GUILTY = 1
"""The rank that meets the number."""


class Faults:
    """Puts a number in a place of an objective's next pass; no more than one element is touched."""

    def __init__(self, model: nn.Module):
        self.place, self.value = "", 0.0
        layer = model.encoder.layers[0]
        layer.register_forward_hook(self._layer)
        model.register_forward_hook(self._loss)

    def _one(self, tensor: torch.Tensor) -> torch.Tensor:
        spoilt = tensor.clone()
        spoilt.view(-1)[spoilt.numel() // 2] = self.value
        return spoilt

    def _layer(self, module: nn.Module, given: object, rows: torch.Tensor) -> torch.Tensor | None:
        if self.place == "gradient":
            rows.register_hook(self._one)
        return self._one(rows) if self.place == "activation" else None

    def _loss(self, module: nn.Module, given: object, losses: Losses) -> Losses | None:
        return replace(losses, total=losses.total + self.value) if self.place == "loss" else None


class Says:
    """A teacher with an answer for every target, of which one number may be none."""

    def __init__(self, faults: Faults):
        self.faults = faults

    def targets(self, batches: Sequence, plans: Sequence, progress: float) -> list[SoftTargets | None]:
        counts = []
        for plan in plans:
            draws = torch.Generator().manual_seed(0)
            hidden = torch.randn(len(plan.targets), 6, generator=draws)
            if self.faults.place == "teacher":
                hidden = self.faults._one(hidden)
            counts.append(SoftTargets(0.5, hidden=hidden, weight=torch.randn(IDS.size, 6, generator=draws)))
        return counts


class Run:
    """A few steps under an engine with every part that learns."""

    def __init__(self, ds: dict, config: SpikesConfig | None = None):
        model = objective("modern")
        self.faults = Faults(model)
        self.engine = Engine(model, optimizer(), ds, packs_per_step=PACKS)
        policy = SpikePolicy(config or SpikesConfig(max_nonfinite_in_row=99, max_nonfinite_in_100=99))
        masker = Masker(MaskingConfig(Schedule(start=0.3)), IDS)
        self.trainer = Trainer(self.engine, masker, Meters(), policy, seed=0, distillation=Says(self.faults))
        self.rate = 1e-3

    def take(self, step: int):
        places = range(ranks.rank(), PACKS, ranks.world())
        batches = [micro(step, place)[0] for place in places]
        return take_step(self.trainer, step, batches, progress=step / STEPS, rate=self.rate)

    @contextmanager
    def fault(self, place: str, value: str):
        if ranks.rank() == GUILTY:
            self.faults.place, self.faults.value = place, float(value)
        yield
        self.faults.place = ""

    def hash(self) -> str:
        digest = hashlib.sha256()
        for name, tensor in kept(self.engine).items():
            digest.update(name.encode() + tensor.numpy().tobytes())
        return digest.hexdigest()


def poisoned(cells: list[dict]) -> list[list[dict]]:
    """In each cell, every kind of number in every place: what this rank decided, and whether anything moved."""
    dropped = []
    for ds in cells:
        run, step, answers = Run(ds), 0, []
        assert run.take(step).moves
        before = run.hash()
        for place in PLACES:
            for value in BAD:
                step += 1
                with run.fault(place, value):
                    verdict = run.take(step)
                same = (run.hash(), run.engine.steps) == (before, 1)
                answers.append({"moves": verdict.moves, "said": verdict.sentence, "same": same})
        # the step after them all is the one that a run without them would take
        assert run.take(step + 1).moves
        ended = run.hash()
        run.engine.close()
        clean = Run(ds)
        assert clean.take(0).moves and clean.take(step + 1).moves
        answers.append({"same": ended == clean.hash()})
        clean.engine.close()
        dropped.append(answers)
    return dropped


class MovesAnyway(SpikePolicy):
    """Drops no step."""

    def drop_nonfinite(self, step: int, where: str) -> StepDecision:
        return StepDecision()


def unjudged() -> dict:
    """What becomes of a step that nobody judges; and what each rank measures if it asks no other."""
    run = Run({"zero_optimization": {"stage": 0}})
    run.trainer = Trainer(
        run.engine, run.trainer.masker, Meters(), MovesAnyway(SpikesConfig()), 0, distillation=Says(run.faults)
    )
    with run.fault("activation", "nan"):
        run.take(0)
    poison = any(not tensor.isfinite().all() for tensor in kept(run.engine).values())
    run.engine.close()

    alone, agreed = Run({"zero_optimization": {"stage": 2}}), ranks.sum
    with alone.fault("loss", "nan"):
        batch, plan, targets = micro(0, ranks.rank())
        for _ in range(alone.engine.accumulate):
            loss = alone.engine.train_micro(batch, plan, targets=targets).total.detach().float()
    alone.engine._gradient_norms = lambda: []
    ranks.sum = lambda values: values
    own_finite = alone.engine.measure(loss).finite
    ranks.sum = agreed
    together = alone.engine.measure(loss).finite
    alone.engine.drop()
    alone.engine.close()
    return {"poison": poison, "mine": own_finite, "together": together}


def flipped(cells: list[dict], times: int) -> list[dict]:
    """In each cell: bits flipped on one rank and seen, and seen where none was flipped."""
    messages = []
    for ds in cells:
        if ds["zero_optimization"]["stage"] == 3:
            continue
        run = Run(ds)
        run.take(0)
        weights = [tensor for _, tensor in run.engine.local_weights()]
        draw, seen, false, named = random.Random(0), 0, 0, True
        for _ in range(times):
            tensor = draw.choice(weights)
            bits = tensor.view(-1).view(torch.uint8)
            byte, bit = draw.randrange(len(bits)), 1 << draw.randrange(8)
            if ranks.rank() == GUILTY:
                bits[byte] ^= bit
            try:
                run.engine.check_replicas()
            except WeightsDivergedError as error:
                seen += 1
                named = named and "are not the same on all ranks" in str(error)
            if ranks.rank() == GUILTY:
                bits[byte] ^= bit
            try:
                run.engine.check_replicas()
            except WeightsDivergedError:
                false += 1
        run.engine.close()
        messages.append({"seen": seen, "false": false, "named": named})
    return messages


def spoilt(cells: list[dict]) -> list[dict]:
    """In each cell, one number of one weight or moment spoilt at a time: how often it would have been published."""
    messages = []
    for ds in cells:
        run = Run(ds)
        run.take(0)
        state, published, tried = kept(run.engine), 0, 0
        assert run.engine.owned_tensors()
        for name in list(state)[:: len(state) // 4]:
            for value in BAD:
                bad = state[name].clone()
                bad.view(-1)[-1] = float(value)
                run.engine.restore(lambda requested, bad=bad, name=name: bad if requested == name else None, steps=1)
                tried += 1
                with suppress(NonFiniteError):
                    run.engine.owned_tensors()
                    published += 1
            run.engine.restore(state.get, steps=1)
        assert run.engine.owned_tensors()
        run.engine.close()
        messages.append({"tried": tried, "published": published})
    return messages


def spiked(jobs: list[dict]) -> list[dict | None]:
    """Launches of whole runs, one after another; of those with a ``begin``, `begun` is called first."""
    steps = []
    # Muon compiles its iteration for every shape, which takes longer than all the rest
    with torch.compiler.set_stance("force_eager"):
        for job in jobs:
            begin = job.pop("begin", None)
            if begin and ranks.is_main():
                begun(**begin)
            steps.append(one(job))
    return steps


def begun(source: str, target: str, step: int, ledger: list[list[int]], per_step: int) -> None:
    """A run that has a ``ledger`` from the start, at the checkpoint of ``step`` of another."""
    run, checkpoint = RunFolder(Path(target)), RunFolder(Path(source)).checkpoint(step)
    run.checkpoints.mkdir(parents=True)
    shutil.copy(Path(source) / "config.json", run.config)
    state = read_state(checkpoint)
    state["judge"] |= {"ledger": ledger, "rewinds": 1}
    state["packs"] = (step + SkippedPacks(tuple((first, shift) for first, shift in ledger)).shift(step)) * per_step
    with patch.dict(os.environ, WORLD_SIZE="1"):  # the others wait for the run to begin
        save_checkpoint(run, step, dict(read_tensors(checkpoint)), state)


def nonfinite(cells: list[dict]) -> dict:
    """Steps with NaN and Inf in each of ``cells``, and the control that nobody judges."""
    return {"poisoned": poisoned(cells), "unjudged": unjudged()}


def memory(cells: list[dict], times: int) -> dict:
    """Faults of the memory that holds weights and moments."""
    return {"spoilt": spoilt(cells), "flipped": flipped(cells, times)}
