"""The exact entropy: every maskable token is hidden once, evenly over sequences, and each text is asked about once."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from megamask.batch import MaskPlan
from megamask.entropy.exact import Average, Exact, groups, measure_entropy
from megamask.entropy.frequency import Frequency
from megamask.masking.rng import PackRng
from tests.batches import IDS, pack
from tests.tolerances import assert_close
from tests.unit.entropy.models import Asked, counts, losses, plan_of, some_packs


def test_clean_is_one_question_with_nothing_hidden():
    batch, ask = some_packs()[0], Asked()
    entropies = measure_entropy(ask, batch, "clean", 4, IDS.mask, PackRng(0, 0))
    assert torch.equal(entropies, Asked()(batch, MaskPlan.hide_nothing(batch)))
    assert len(ask.plans) == 1 and torch.equal(ask.plans[0].inputs, batch.tokens)


@pytest.mark.parametrize("passes", [1, 2, 4, 100])
def test_masked_hides_each_maskable_token_once(passes):
    batch, ask = some_packs()[0], Asked()
    entropies = measure_entropy(ask, batch, "masked", passes, IDS.mask, PackRng(0, 0))
    assert len(ask.plans) == passes
    targets = torch.cat([plan.targets for plan in ask.plans])
    assert torch.equal(targets.sort().values, batch.maskable.nonzero().squeeze(1))
    for plan in ask.plans:
        assert torch.equal(plan.targets, plan.hidden) and torch.equal(plan.labels, batch.tokens[plan.targets])
        assert (plan.inputs[plan.hidden] == IDS.mask).all()
        assert torch.equal(plan.inputs[plan.visible], batch.tokens[plan.visible])
        assert torch.equal(torch.cat([plan.hidden, plan.visible]).sort().values, torch.arange(batch.layout.rows))
        assert torch.equal(entropies[plan.targets], Asked()(batch, plan))


@pytest.mark.parametrize("passes", [2, 3, 5])
def test_groups_are_even_in_each_sequence_and_altogether(passes):
    batch = pack([40, 17, 5, 64], padding=9)
    rows = batch.maskable.nonzero().squeeze(1)
    parts = groups(batch, rows, passes, PackRng(0, 0))
    for where in (torch.ones(batch.layout.rows, dtype=torch.bool), *(batch.layout.sequence == s for s in range(4))):
        sizes = [int(where[group].sum()) for group in parts]
        assert max(sizes) - min(sizes) <= 1


def test_the_groups_are_a_function_of_seed_and_text():
    batch = some_packs()[0]
    first, same, other = (
        Exact(Asked(), signal="masked", passes=3, mask_id=IDS.mask, seed=seed)([batch])[0] for seed in (1, 1, 2)
    )
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_packs_of_one_text_share_the_question():
    one, other = some_packs(2)
    views = [
        replace(batch, number=n, source_pack=text) for n, (batch, text) in enumerate([(one, 7), (other, 8), (one, 7)])
    ]
    ask = Asked()
    entropies = Exact(ask, signal="clean", passes=1, mask_id=IDS.mask, seed=0)(views)
    assert len(ask.plans) == 2
    assert torch.equal(entropies[0], entropies[2]) and not torch.equal(entropies[0], entropies[1])


@pytest.mark.parametrize("signal", ["clean", "masked"])
def test_only_candidates_are_measured_and_the_rest_is_never_preferred(signal):
    batch, ask, propose = pack([30, 50, 20], padding=4), Asked(), Frequency(counts())
    exact = Exact(ask, signal=signal, passes=2, mask_id=IDS.mask, seed=0, propose=propose, candidates=40)
    entropies, proposal = exact([batch])[0], propose([batch])[0]
    measured = torch.cat([plan.targets for plan in ask.plans]).sort().values
    assert 40 <= len(measured) <= 40 + 3 and batch.maskable[measured].all()  # rounded up in each of three sequences
    rest = torch.ones_like(batch.maskable).index_fill_(0, measured, False)
    assert (entropies[rest] == entropies[measured].min()).all()
    for sequence in range(3):  # the best by the proposer, in each sequence
        here = (batch.layout.sequence == sequence) & batch.maskable
        assert proposal[here & ~rest].min() >= proposal[here & rest].max()
    for plan in ask.plans:
        assert signal == "clean" or set(plan.hidden.tolist()) <= set(measured.tolist())


def test_all_rows_as_candidates_are_the_same_as_no_proposer():
    batch = some_packs()[0]
    plain = Exact(Asked(), signal="clean", passes=1, mask_id=IDS.mask, seed=0)
    every = Exact(
        Asked(), signal="clean", passes=1, mask_id=IDS.mask, seed=0, propose=Frequency(counts()),
        candidates=10**6,
    )  # fmt: skip
    assert torch.equal(plain([batch])[0][batch.maskable], every([batch])[0][batch.maskable])


def test_it_learns_nothing_of_its_own():
    exact = Exact(Asked(), signal="clean", passes=1, mask_id=IDS.mask, seed=0)
    batch = some_packs()[0]
    plan = plan_of(batch, batch.maskable.nonzero().squeeze(1)[:4])
    exact.update(batch, plan, losses(plan, torch.rand(4)))
    exact.sync()
    assert exact.state_dict() == {}


# ---- the moving average


def _average_of(weights: list[torch.Tensor], decay: float) -> torch.Tensor:
    """By the plainest code, in float64."""
    average = weights[0].double()
    for n, weight in enumerate(weights[1:], 1):
        past = min(decay, (1 + n) / (10 + n))
        average = past * average + (1 - past) * weight.double()
    return average


def test_average_follows_the_weights_and_does_not_change_the_module():
    module = nn.Linear(5, 3)
    average = Average(module, 0.9, lambda: {"weight": seen[-1], "bias": module.bias.detach()})
    seen = [module.weight.detach().clone()]
    for _ in range(30):
        seen.append(torch.randn(3, 5).bfloat16().float())
        average.sync()
    own = average.module.weight
    assert_close(own, _average_of(seen, 0.9))
    assert not own.requires_grad and not average.module.training and own.dtype == torch.float32
    assert torch.equal(module.weight, seen[0])


def test_average_resumes_bit_for_bit():
    module, draws = nn.Linear(5, 3), [torch.randn(3, 5) for _ in range(10)]

    def follow(average: Average | None, seen: list[torch.Tensor]) -> Average:
        weights = iter(seen)
        following = Average(module, 0.9, lambda: {"weight": next(weights), "bias": module.bias.detach()})
        if average:
            following.load_state_dict(average.state_dict())
        for _ in seen:
            following.sync()
        return following

    whole = follow(None, draws)
    second = follow(follow(None, draws[:5]), draws[5:])
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), second.state_dict().values(), strict=True)
    )
