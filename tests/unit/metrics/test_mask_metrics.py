"""Metrics about targets: deciles have a tenth of the text each, and the effective sample is Kish's."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st

from megamask.batch import Losses, MaskPlan
from megamask.metrics.mask_metrics import DECILES, MaskMetrics, frequency_deciles
from tests.batches import IDS, pack

COUNTS = torch.cat([torch.zeros(len(IDS.special)), 1000 / torch.arange(1, IDS.size - len(IDS.special) + 1)]).long()


def losses_of(plan: MaskPlan) -> Losses:
    nll = torch.arange(len(plan.targets)).float()
    return Losses(nll.sum(), nll, nll, nll > 3)


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=40).filter(any))
@example([1, 14, 200, 223, 457, 1140, 3008, 5459, 381_011, 1_000_000, 1_000_000])
def test_each_decile_has_a_tenth_of_the_occurrences(counts: list[int]) -> None:
    table = torch.tensor(counts)
    shares = frequency_deciles(table)
    mass = (shares * table[:, None]).sum(0) / table.sum()
    torch.testing.assert_close(mass, torch.full((DECILES,), 0.1, dtype=torch.float64))
    torch.testing.assert_close(shares.sum(1), (table > 0).double())
    # a more frequent type does not stand in a later decile
    mean = shares @ torch.arange(DECILES).double()
    order = [float(mean[n]) for n in table.argsort(descending=True, stable=True) if table[n] > 0]
    assert all(one <= other + 1e-9 for one, other in itertools.pairwise(order))


def test_the_whole_text_as_targets_has_a_tenth_in_each_decile() -> None:
    batch = pack([50, 40])
    plan = MaskPlan.hide_nothing(batch)
    plan = replace(plan, targets=batch.maskable.nonzero().squeeze(1), labels=batch.tokens[batch.maskable])
    metrics = MaskMetrics(torch.bincount(plan.labels, minlength=IDS.size))
    metrics.add(batch, plan, losses_of(plan))
    values = metrics.take()
    assert list(values.values()) == pytest.approx([0.1] * 10) and next(iter(values)) == "masks/decile_1"
    assert metrics.take() == {}


def test_rare_targets_are_in_the_last_deciles() -> None:
    batch = pack([50, 40])
    rare = (batch.tokens > IDS.size * 3 // 4).nonzero().squeeze(1)
    plan = replace(MaskPlan.hide_nothing(batch), targets=rare, labels=batch.tokens[rare])
    metrics = MaskMetrics(COUNTS)
    metrics.add(batch, plan, losses_of(plan))
    values = metrics.take()
    assert values["masks/decile_1"] == 0 and values["masks/decile_10"] > 0.5
    assert sum(values.values()) == pytest.approx(1)


def test_tags_and_entropies_are_those_of_the_targets() -> None:
    batch = pack([30, 20])
    tags = (torch.arange(batch.layout.rows) % 3).to(torch.uint8)
    batch = replace(batch, tags=tags)
    targets = torch.arange(1, 19)
    plan = replace(MaskPlan.hide_nothing(batch), targets=targets, labels=batch.tokens[targets])
    metrics, entropy = MaskMetrics(COUNTS, tags=("NOUN", "VERB")), torch.rand(batch.layout.rows)
    metrics.add(batch, plan, losses_of(plan), entropy)
    values = metrics.take()
    assert values["masks/tags/NOUN"] == values["masks/tags/VERB"] == pytest.approx(1 / 3)
    assert values["entropy/targets"] == pytest.approx(float(entropy[targets].mean()))


def test_the_weights_of_a_correction_are_counted() -> None:
    batch = pack([30, 20])
    plan = replace(MaskPlan.hide_nothing(batch), targets=torch.arange(8), labels=batch.tokens[:8])
    metrics = MaskMetrics(COUNTS, max_weight=4.0)
    metrics.add(batch, plan, losses_of(plan))
    assert not any(name.startswith(("correction/", "train/")) for name in metrics.take())
    weights = torch.tensor([1.0, 1, 0.5, 4, 4, 2, 0.5, 3])
    losses = losses_of(plan)
    for part in (weights, torch.ones(8)):
        metrics.add(batch, replace(plan, weights=part), losses)
    values = metrics.take()
    both = torch.cat([weights, torch.ones(8)]).double()
    assert values["correction/mean"] == pytest.approx(float(both.mean()))
    assert values["correction/largest"] == 4 and values["correction/clipped"] == 2 / 16
    assert values["correction/effective_sample"] == pytest.approx(float(both.sum() ** 2 / both.square().sum() / 16))
    weighted = float((both * torch.cat([losses.nll, losses.nll])).mean())
    assert values["train/weighted_loss"] == pytest.approx(weighted)


def test_the_rate_of_each_source_is_its_targets_among_its_maskable_tokens() -> None:
    names = ["de", "zh", "el"]
    metrics = MaskMetrics(COUNTS, sources=names, source_of=lambda number: number % 3)
    expected = dict.fromkeys(names, (0, 0))
    for number in (0, 1, 3, 4, 6):
        batch = pack([30 + number, 20, 9], number=number)
        rows = batch.maskable.nonzero().squeeze(1)[: 4 + number]
        plan = replace(MaskPlan.hide_nothing(batch), targets=rows, labels=batch.tokens[rows])
        metrics.add(batch, plan, losses_of(plan))
        targets, free = expected[names[number % 3]]
        expected[names[number % 3]] = targets + 4 + number, free + int(batch.maskable.sum())
    values = metrics.take()
    rates = {name: values[f"masks/rate/{name}"] for name in ("de", "zh")}
    assert rates == {name: pytest.approx(expected[name][0] / expected[name][1]) for name in rates}
    assert "masks/rate/el" not in values  # no pack of it was seen
