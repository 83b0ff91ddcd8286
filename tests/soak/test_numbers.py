"""The long versions: more ranks, every stage with and without offloading, and the noise of real training."""

from __future__ import annotations

import random
from dataclasses import astuple
from pathlib import Path

import pytest
import torch

from megamask.engine.engine import Engine
from megamask.engine.optimizer import OptimizerConfig
from megamask.health.loss_spikes import SpikePolicy
from megamask.health.settings import SpikesConfig
from megamask.masking.masker import Masker, MaskingConfig
from megamask.masking.rng import PackRng
from megamask.schedules import Schedule
from tests.batches import IDS, pack
from tests.processes.conftest import RunRanks
from tests.processes.test_engine import AUTOCAST, BF16, FP32, OFFLOAD
from tests.processes.test_numbers import MUON, assert_memory_faults, assert_nonfinite_steps, assert_spikes
from tests.processes.training_worker import objective
from tests.system.test_guided import guided
from tests.system.test_replay import assert_replays
from tests.unit.health.test_loss_spikes import REGIME, decide, decisions


@pytest.mark.parametrize("world", [2, 4])
def test_nonfinite_steps_move_nothing_in_any_stage(run_ranks: RunRanks, tmp_path: Path, world: int) -> None:
    few, all_of_them = [*FP32, *BF16], [*FP32, *BF16, AUTOCAST, *OFFLOAD]
    skips = [(ds, {}) for ds in all_of_them] + [(ds, MUON) for ds in (*FP32[1:], *BF16)]
    assert_nonfinite_steps(run_ranks, all_of_them, world)
    assert_memory_faults(run_ranks, few, 1000, world)
    assert_spikes(run_ranks, tmp_path, rewinds=all_of_them, skips=skips, world=world)


@pytest.mark.parametrize("guide", ["probe", "falls back"])
def test_steps_under_guided_masks_are_the_same_again(data: Path, tmp_path: Path, guide: str) -> None:
    assert_replays(data, tmp_path / "run", *guided(guide), count=20)


def recorded(seed: int, steps: int) -> list[tuple[float, float]]:
    """Loss and gradient norm of each step of a small model, trained on packs that are drawn, at the default rate.

    At ten times that rate its gradients have spikes indeed: ten in 6,000 steps.
    """
    config = OptimizerConfig()
    engine = Engine(objective("modern", 0.1), config, {"zero_optimization": {"stage": 0}}, packs_per_step=1)
    masker, plans = Masker(MaskingConfig(Schedule(start=0.3)), IDS), []
    for step in range(steps):
        draw = random.Random(f"{seed} {step}")
        lengths = [draw.randint(40, 60) for _ in range(4)]
        batch = pack(lengths, padding=256 - sum(lengths), number=step, seed=draw.getrandbits(32))
        plan = masker(batch, progress=0.0, rng=PackRng(seed, step))
        torch.manual_seed(step)
        loss = engine.train_micro(batch, plan, targets=len(plan.targets)).total.detach().float()
        measured = engine.measure(loss)
        plans.append((measured.loss / len(plan.targets), measured.grad_norm))
        engine.step(config.lr((step + 1) / steps))
    engine.close()
    return plans


def test_training_has_no_spikes_unless_one_is_planted(steps: int = 2000) -> None:
    alarms = detected = planted = 0
    for seed in range(3):
        run = recorded(seed, steps)
        policy = SpikePolicy(SpikesConfig())
        decisions(policy, run)
        alarms += policy.spikes
        for step in range(100 + seed, steps, steps // 10):
            loss, norm = run[step]
            spike = (loss, norm * 5) if step % 2 else (loss * 2, norm)
            planted += 1
            policy = SpikePolicy(SpikesConfig(), {"past": _past(run, step), "asked": list(astuple(REGIME))})
            detected += bool(decide(policy, step, *spike).sentence)
    print(f"{3 * steps} steps of training: {alarms} alarms; {detected} of {planted} planted spikes detected at once")
    assert alarms == 0 and detected == planted >= 20


def _past(run: list[tuple[float, float]], step: int) -> dict[str, list[float]]:
    losses, norms = zip(*run[step - 128 if step > 128 else 0 : step], strict=True)
    return {"loss": list(losses), "gradient norm": list(norms)}
