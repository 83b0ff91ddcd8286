"""Metrics equal independent counts."""

from __future__ import annotations

import dataclasses
import math
import time

import pytest
import torch

from megamask.batch import Layout, Losses, MaskPlan, PackedBatch
from megamask.metrics import meters as metrics
from megamask.metrics.meters import Meters, Window

WINDOW = Window(
    steps=5, skipped=1, grad_norm=0.5, seconds=2.0, waited=0.1, ranks=2,
    nll=600.0, correct=50.0, targets=100, tokens=400, pairs=40_000,
    distill=30.0, num_teacher_tokens=100, num_scored_tokens=400, entropy=800.0, spread=100.0,
)  # fmt: skip


def pack(lengths: list[int], padding: list[int], rng: torch.Generator) -> PackedBatch:
    """Sequences that begin and end with a special token, then sequences of padding."""
    every = lengths + padding
    starts = torch.tensor([0, *every]).cumsum(0).int()
    rows = int(starts[-1])
    maskable = torch.ones(rows, dtype=torch.bool)
    maskable[starts[: len(lengths)].long()] = False
    maskable[starts[1 : len(lengths) + 1].long() - 1] = False
    maskable[sum(lengths) :] = False
    positions = torch.cat([torch.arange(n) for n in every]).int()
    tokens = torch.randint(5, 50, (rows,), generator=rng)
    return PackedBatch(0, tokens, Layout(starts, max(every), positions), maskable.clone(), maskable)


def some_losses(targets: int, rng: torch.Generator) -> tuple[MaskPlan, Losses]:
    rows = torch.arange(targets)
    nll = torch.rand(targets, generator=rng)
    plan = MaskPlan(rows, rows, rows, rows, rows[:0])
    return plan, Losses(nll.sum().requires_grad_(), nll, nll, nll > 0.5)


def test_rates_exclude_the_first_step_of_a_launch(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: clock[0])
    rng = torch.Generator().manual_seed(1)
    batch = pack([20, 30], [14], rng)
    meters = Meters()

    def step(seconds: float) -> None:
        plan, losses = some_losses(10, rng)
        meters.add(batch, plan, losses)
        clock[0] += seconds
        meters.step(1.0)

    step(60.0)  # compiles
    only = meters.take()
    assert only.steps == 1 and only.targets == 10 and only.timed.steps == 0
    assert not {"tokens_per_second", "masked_per_second", "data_wait", "mfu"} & only.metrics(1e-3).keys()
    step(2.0)
    assert meters.take().metrics(1e-3)["tokens_per_second"] == 25.0

    meters = Meters()
    for seconds in (60.0, 2.0, 2.0):
        step(seconds)
    window = meters.take()
    assert (window.steps, window.targets, window.tokens, window.seconds) == (3, 30, 150, 64.0)
    assert (window.timed.steps, window.timed.targets, window.timed.seconds) == (2, 20, 4.0)
    assert window.metrics(1e-3)["tokens_per_second"] == 25.0
    assert window.metrics(1e-3)["train/loss"] == window.nll / 30


def test_distillation_from_samples_has_its_own_name():
    computed, stored = (dataclasses.replace(WINDOW, sampled=sampled).metrics(1e-3) for sampled in (False, True))
    assert computed["train/distill"] == stored["train/distill_sampled"]
    assert "train/distill_sampled" not in computed and "train/distill" not in stored


def test_meters_count_what_is_in_the_packs(monkeypatch):
    rng = torch.Generator().manual_seed(0)
    meters = Meters()
    nlls, lengths = [], []
    for sequences, padding in (([5, 9, 3], [4, 2]), ([8], []), ([3, 3], [0, 6])):
        plan, losses = some_losses(4, rng)
        meters.add(pack(sequences, padding, rng), plan, losses)
        nlls.append(losses.nll)
        lengths += sequences
    meters.step(2.0)
    meters.step(math.inf, skipped=True)
    meters.step(4.0)
    monkeypatch.setattr("megamask.runtime.ranks.sum", lambda values: 3 * values)  # three ranks with equal values
    window = meters.take()
    monkeypatch.undo()
    nll = torch.cat(nlls).double()
    assert window.nll == pytest.approx(3 * nll.sum().item(), rel=1e-12)
    assert window.correct == 3 * (nll > 0.5).sum()
    assert (window.targets, window.tokens) == (3 * 12, 3 * sum(lengths))
    assert window.pairs == 3 * sum(n * n for n in lengths)
    assert (window.steps, window.skipped, window.ranks, window.grad_norm) == (3, 1, 3, 3.0)
    metrics = window.metrics(0.1)
    assert metrics["train/loss"] == pytest.approx(nll.mean().item())
    assert metrics["mask_ratio"] == 12 / sum(lengths)
    meters.step(1.0)
    assert meters.take().nll == 0  # and all began again


def test_pauses_and_waiting_are_distinguished():
    class Loader:
        waited = 5.0

    loader = Loader()
    meters = Meters(loader)
    began = time.perf_counter()
    with meters.paused():
        time.sleep(0.05)
    paused_at_least = 0.05
    loader.waited = 5.5
    meters.step(1.0)
    window = meters.take()
    assert 0 < window.seconds <= time.perf_counter() - began - paused_at_least
    assert window.waited == 0.5
    meters.step(1.0)
    assert meters.take().waited == 0


def test_the_spread_within_sequences_shows_flat_entropies():
    batch = pack([7, 12, 4], [9], torch.Generator().manual_seed(2))
    plan, losses = some_losses(5, torch.Generator().manual_seed(3))
    home, free = batch.layout.sequence, batch.maskable

    def window(entropy) -> Window:
        meters = Meters()
        meters.add(batch, plan, losses, entropy)
        meters.step(1.0)
        return meters.take()

    entropy = torch.rand(len(free), generator=torch.Generator().manual_seed(4)) * 5
    by_name = window(entropy).metrics(1e-3)
    inside = [entropy[(home == n) & free] for n in home[free].unique()]
    apart = torch.cat([values - values.mean() for values in inside])
    assert by_name["entropy/mean"] == pytest.approx(float(entropy[free].mean()))
    assert by_name["entropy/spread"] == pytest.approx(float(apart.square().mean().sqrt()))
    assert not window(entropy).flat
    # documents may differ as they like: masks are chosen inside each
    assert window(home.float()).flat
    assert "entropy/mean" not in WINDOW_WITHOUT.metrics(1e-3) and not WINDOW_WITHOUT.flat


WINDOW_WITHOUT = Window(1, 0, 1.0, 1.0, 0.0, 1, nll=1.0, correct=0.0, targets=1, tokens=2, pairs=4)
