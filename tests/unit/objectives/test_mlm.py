"""Masked language modelling as relations: nothing hidden is seen, nothing but targets is asked."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F

from megamask.batch import MaskPlan, SoftTargets
from megamask.errors import CheckpointError
from megamask.model.statistics import token_stats
from megamask.objectives.objective import ObjectiveConfig, build_objective, load_objective_weights
from tests.batches import IDS, pack
from tests.tolerances import assert_close
from tests.unit.model.models import PRESETS, objective, plan
from tests.unit.model.vocabularies import MEASURES

LENGTHS = [17, 3, 40, 9]


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("lengths", [LENGTHS, LENGTHS[2:3]])
def test_the_token_under_a_mask_changes_nothing(preset, lengths):
    model, batch = objective(preset), pack(lengths)
    hidden = plan(batch).hidden
    others = batch.tokens.clone()
    others[hidden] = len(IDS.special) + (others[hidden] + 1) % (IDS.size - len(IDS.special))
    assert (others[hidden] != batch.tokens[hidden]).all()
    changed = dataclasses.replace(batch, tokens=others)
    assert torch.equal(model.represent(batch, plan(batch)), model.represent(changed, plan(changed)))


@pytest.mark.parametrize("preset", PRESETS)
def test_the_loss_is_the_sum_of_cross_entropies_at_the_targets(preset):
    model, batch = objective(preset), pack(LENGTHS, padding=4)
    mask_plan = plan(batch)
    losses = model(batch, mask_plan)
    x = model.encoder.run(model.encoder.embed(mask_plan.inputs, batch.layout), batch.layout)
    logits = model.head.logits(x[mask_plan.targets])
    nll = F.cross_entropy(logits, mask_plan.labels, reduction="none")
    assert_close(losses.nll, nll)
    assert_close(losses.total, nll.sum())
    assert_close(losses.entropy, torch.distributions.Categorical(logits=logits).entropy())
    assert torch.equal(losses.correct, logits.argmax(-1) == mask_plan.labels)


@pytest.mark.parametrize("preset", PRESETS)
def test_entropy_is_that_of_a_plan_that_hides_nothing(preset):
    model, batch = objective(preset, dropout=0.3), pack(LENGTHS)
    entropies = model.entropy(batch)
    assert model.training and not entropies.requires_grad
    model.eval()
    assert torch.equal(entropies, model(batch, MaskPlan.hide_nothing(batch)).entropy)


def test_the_loss_of_a_pack_is_that_of_its_sequences():
    model = objective("modern")
    together = pack([12, 30])
    ends = together.layout.cu_seqlens.tolist()
    hidden = plan(together).inputs
    total = 0
    for start, end in [(0, 12), (12, 42)]:
        alone = dataclasses.replace(pack([end - start]), tokens=together.tokens[start:end])
        targets = (hidden[start:end] == IDS.mask).nonzero().squeeze(1)
        labels = alone.tokens[targets]
        total += model(alone, MaskPlan(hidden[start:end], targets, labels, targets, targets[:0])).total
    assert ends[2] == 42
    assert_close(model(together, plan(together)).total, total)


def taught(batch, mask_plan, **settings):
    """A wider teacher's say at the targets, or at ``rows`` of the pack, and its whole logits there."""
    teacher = objective("modern", seed=7, hidden_size=48)
    rows = settings.get("rows", mask_plan.targets)
    with torch.no_grad():
        hidden = teacher.head.transform(teacher.states(batch, mask_plan)[rows])
    decoder = teacher.head.decoder
    soft = SoftTargets(**settings, hidden=hidden, weight=decoder.weight.detach(), bias=decoder.bias.detach())
    return soft, hidden @ soft.weight.T + soft.bias


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("everywhere", [False, True])
def test_a_teacher_adds_its_divergence_at_the_targets_or_at_rows_of_its_own(preset, everywhere):
    model, batch = objective(preset), pack(LENGTHS)
    mask_plan = plan(batch)
    rows = {"rows": torch.arange(batch.layout.rows)} if everywhere else {}
    soft, teachers = taught(batch, mask_plan, share=0.4, temperature=2.0, scale=1.5, **rows)
    losses, plain = model(batch, mask_plan, soft), model(batch, mask_plan)
    states = model.states(batch, mask_plan)[rows.get("rows", mask_plan.targets)]
    q = (model.head.logits(states) / 2).log_softmax(-1)
    kl = F.kl_div(q, (teachers / 2).softmax(-1), reduction="sum")
    assert_close(losses.distill, kl)
    total = 0.6 * plain.total + 0.4 * 1.5 * 2**2 * kl
    assert_close(losses.total, total)
    assert plain.distill is None and torch.equal(losses.nll, plain.nll) and torch.equal(losses.entropy, plain.entropy)
    parameters = list(model.parameters())
    wanted = torch.autograd.grad(total, parameters)
    for gradient, want in zip(torch.autograd.grad(losses.total, parameters), wanted, strict=True):
        assert_close(gradient, want)


def test_a_teacher_of_all_rows_is_one_of_the_targets_where_all_rows_are_targets():
    model, batch = objective("bert"), pack(LENGTHS)
    mask_plan = MaskPlan.hide_nothing(batch)
    at_targets, _ = taught(batch, mask_plan, share=0.4, temperature=2.0)
    everywhere = dataclasses.replace(at_targets, rows=mask_plan.targets)
    one, other = model(batch, mask_plan, at_targets), model(batch, mask_plan, everywhere)
    assert_close(one.total, other.total)
    parameters = list(model.parameters())
    gradients = (torch.autograd.grad(losses.total, parameters) for losses in (one, other))
    for gradient, same in zip(*gradients, strict=True):
        assert_close(gradient, same)


@pytest.mark.parametrize("measure", MEASURES)
def test_an_objective_uses_the_measure_it_was_built_with(measure):
    model, batch = objective("modern"), pack(LENGTHS)
    built = build_objective(ObjectiveConfig("mlm"), model.encoder, model.head, measure)
    assert built.head is model.head
    rows = model.head.transform(model.states(batch, MaskPlan.hide_nothing(batch)))
    stats = token_stats(rows, model.head.decoder.weight, model.head.decoder.bias, batch.tokens)
    assert_close(built.entropy(batch), stats.of(measure))
    assert_close(built(batch, plan(batch)).nll, model(batch, plan(batch)).nll)


@pytest.mark.parametrize("preset", PRESETS)
def test_loaded_weights_make_the_same_model_or_are_named(preset):
    source, target, batch = objective(preset, seed=1), objective(preset, seed=2), pack(LENGTHS)
    weights = dict(source.named_parameters())
    before = copy.deepcopy(target)
    wrong = {name: tensor for name, tensor in weights.items() if name != "head.dense.weight"} | {
        "encoder.layers.9.qkv.weight": torch.zeros(1),
        "head.decoder.bias": torch.zeros(1),
    }
    with pytest.raises(CheckpointError) as error:
        load_objective_weights(target, wrong)
    assert error.value.problems == (
        "The weights lack the tensor head.dense.weight.",
        "The weights have the tensor encoder.layers.9.qkv.weight, which this model does not have.",
        f"`head.decoder.bias` must have the shape ({IDS.size},), but is (1,).",
    )
    assert torch.equal(target(batch, plan(batch)).nll, before(batch, plan(batch)).nll)
    load_objective_weights(target, weights)
    assert torch.equal(target(batch, plan(batch)).nll, source(batch, plan(batch)).nll)
    assert target.head.decoder.weight is target.encoder.embedding.tokens.weight
