"""The probe: a sequence alone is the sequence in a pack, it learns, ranks agree, and a resume is bit for bit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from megamask.batch import PackedBatch
from megamask.entropy import probe as probing
from megamask.entropy.frequency import unigram_surprisal
from megamask.entropy.probe import Probe, convolve, weights
from tests.batches import IDS, pack
from tests.tolerances import assert_close
from tests.unit.entropy.models import counts, losses, plan_of, settle_together, some_packs

WIDTH = 12
EMBEDDING = torch.randn(IDS.size, WIDTH, generator=torch.Generator().manual_seed(9))


def embed(batch: PackedBatch) -> torch.Tensor:
    return EMBEDDING[batch.tokens]


def make(**options) -> Probe:
    return Probe(embed, WIDTH, counts(), seed=1, channels=8, **options)


def say(batch: PackedBatch, step: int):
    """Targets of a step, and entropies that hang on the token and its left neighbour."""
    rows = batch.maskable.nonzero().squeeze(1)
    targets = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(step))[:15]].sort().values
    plan = plan_of(batch, targets, torch.linspace(0.1, 0.9, len(targets)))
    return plan, losses(plan, truth(batch)[targets])


def truth(batch: PackedBatch) -> torch.Tensor:
    value = embed(batch)[:, :3].sum(1)
    return 2 + value + 0.5 * torch.cat([value[:1], value[:-1]])


def train(probe: Probe, first: int, last: int) -> Probe:
    for step in range(first, last):
        for number in (2 * step, 2 * step + 1):
            batch = pack([20, 7, 3, 33, 12], padding=5, number=number, seed=number)
            probe.update(batch, *say(batch, step))
        probe.sync()
    return probe


def one_of(batch: PackedBatch, sequence: int) -> PackedBatch:
    """One sequence of a pack, as a pack."""
    rows = (batch.layout.sequence == sequence).nonzero().squeeze(1)
    layout = batch.layout.keep(rows)
    return PackedBatch(0, batch.tokens[rows], layout, batch.starts_word[rows], batch.maskable[rows])


@pytest.mark.parametrize("lengths", [[1, 2, 3, 4, 7, 20], [50], [3, 3, 3]])
def test_convolution_is_torch_s_in_each_sequence(lengths):
    layout = pack([n for n in lengths if n > 1] or lengths, padding=4).layout
    x, taps = torch.randn(layout.rows, 5, dtype=torch.float64), torch.randn(7, 5, dtype=torch.float64)
    outputs = convolve(x, taps, layout)
    for sequence, length in enumerate(layout.lengths.tolist()):
        if length:
            rows = layout.sequence == sequence
            expected = F.conv1d(x[rows].t()[None], taps.t()[:, None], padding=3, groups=5)[0].t()
            assert_close(outputs[rows], expected)


def test_a_packed_sequence_equals_the_sequence_alone():
    probe = train(make(), 0, 20)
    batch = some_packs()[0]
    together = probe([batch])[0]
    for sequence in range(5):
        rows = batch.layout.sequence == sequence
        assert_close(together[rows], probe([one_of(batch, sequence)])[0])


def test_it_learns_what_frequency_cannot_know():
    probe, unseen = train(make(rate=0.02), 0, 300), pack([40, 25, 60], number=9, seed=77)
    predicted, expected = probe([unseen])[0][unseen.maskable], truth(unseen)[unseen.maskable]
    left = (predicted - expected).square().mean() / expected.var()
    rarity = unigram_surprisal(counts()).float()[unseen.tokens[unseen.maskable]]
    by_rarity = 1 - torch.corrcoef(torch.stack([rarity, expected]))[0, 1] ** 2  # of the best line
    assert left < by_rarity / 2


def test_its_gradient_is_that_of_the_weighted_squared_error():
    probe = train(make(), 0, 5)
    batch = some_packs()[1]
    plan, losses = say(batch, 99)
    probe.update(batch, plan, losses)
    flat = probe._weights.clone().requires_grad_()
    _, mean, scale = probe._record
    error = probe._predict(flat, batch)[plan.targets] - (losses.entropy - mean) / scale
    inverse = 1 / plan.probability
    (inverse / inverse.mean() * error**2 / 2).sum().backward()
    assert_close(probe._gradient, flat.grad)


def test_weights_are_clipped_inverse_probabilities_or_one():
    batch = some_packs()[0]
    rows = batch.maskable.nonzero().squeeze(1)[:50]
    chance = torch.full((len(rows),), 0.5)
    chance[0] = 1e-4
    actual = weights(plan_of(batch, rows, chance))
    assert actual[0] == probing.CLIP and actual[1:].unique().numel() == 1
    even = weights(plan_of(batch, rows, torch.full((len(rows),), 0.3)))
    assert_close(even, torch.ones(len(rows)))
    assert torch.equal(weights(plan_of(batch, rows)), torch.ones(len(rows)))


def test_two_ranks_are_one():
    one, parts = make(), [make(), make()]
    for step in range(8):
        for batch, part in zip(some_packs(2), parts, strict=True):
            observed = say(batch, step)
            one.update(batch, *observed)
            part.update(batch, *observed)
        settle_together(parts, [torch.cat([part._gradient, part._sums]) for part in parts])
        one.sync()
    for name, expected in one.state_dict().items():
        assert torch.equal(parts[0].state_dict()[name], parts[1].state_dict()[name])
        if expected.is_floating_point():
            assert_close(parts[0].state_dict()[name], expected)


def test_a_step_without_observations_changes_nothing():
    probe = train(make(), 0, 5)
    before = {name: value.clone() for name, value in probe.state_dict().items()}
    probe.sync()
    after = probe.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in ("weights", "moments", "record"))


def test_a_nonfinite_loss_changes_nothing():
    probe, batch = train(make(), 0, 5), some_packs()[0]
    before = probe.state_dict()["weights"].clone()
    plan, measured = say(batch, 0)
    probe.update(batch, plan, losses(plan, measured.entropy.fill_(torch.nan)))
    probe.sync()
    assert torch.equal(before, probe.state_dict()["weights"])


@pytest.mark.parametrize("at", [1, 7])
def test_it_resumes_bit_for_bit(at, monkeypatch):
    monkeypatch.setattr(probing, "EAGER", 5)  # so that steps are left out, too
    whole, resumed = train(make(), 0, 16), make()
    resumed.load_state_dict({name: value.clone() for name, value in train(make(), 0, at).state_dict().items()})
    train(resumed, at, 16)
    assert all(torch.equal(value, resumed.state_dict()[name]) for name, value in whole.state_dict().items())
    batch = some_packs()[0]
    assert torch.equal(whole([batch])[0], resumed([batch])[0])


def test_the_first_weights_are_a_function_of_the_seed():
    torch.manual_seed(1)
    first = make().state_dict()["weights"]
    torch.manual_seed(2)
    drawn = torch.rand(1)
    torch.manual_seed(2)
    assert torch.equal(first, make().state_dict()["weights"]) and torch.equal(drawn, torch.rand(1))
    other = Probe(embed, WIDTH, counts(), seed=2, channels=8).state_dict()["weights"]
    assert not torch.equal(first, other)


def test_late_steps_are_mostly_left_out_by_all_ranks_alike(monkeypatch):
    monkeypatch.setattr(probing, "EAGER", 2)
    probe, steps = make(every=4), []
    for step in range(10):
        batch = some_packs(1)[0]
        probe.update(batch, *say(batch, step))
        monkeypatch.setattr(
            "megamask.runtime.ranks.sum", lambda values, step=step: steps.append(step) or values.clone()
        )
        probe.sync()
    assert steps == [0, 1, 4, 8]
