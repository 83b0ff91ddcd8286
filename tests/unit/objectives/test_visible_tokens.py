"""[MASK] that enters late, as relations: to MLM, to each other, and to what nobody may see."""

from __future__ import annotations

import copy
import dataclasses
import itertools

import pytest
import torch
from torch import nn

from megamask.batch import Layout, MaskPlan, SoftTargets
from megamask.objectives.mae_lm import MAELM, DecoderConfig
from megamask.objectives.objective import ObjectiveConfig, build_objective
from tests.batches import IDS, pack
from tests.tolerances import assert_close
from tests.unit.model.models import PRESETS, objective, plan

LENGTHS = [17, 3, 40, 9]
LOCAL = {"global_every": 2, "local_window": 4}
LATE = {
    "depth 0": ObjectiveConfig("three_ml", depth=0),
    "depth 2": ObjectiveConfig("three_ml", depth=2),
    "own vector": ObjectiveConfig("three_ml", depth=1, mask_vector="own"),
    "decoder": ObjectiveConfig("mae_lm", decoder=DecoderConfig(2)),
    "cross": ObjectiveConfig("mae_lm", decoder=DecoderConfig(2, attention="cross"), mask_vector="own"),
}
PLACED = {
    "positions": ObjectiveConfig("mae_lm", decoder=DecoderConfig(1, positions="all")),
    "cross, positions, own": ObjectiveConfig(
        "mae_lm", decoder=DecoderConfig(1, attention="cross", positions="all"), mask_vector="own"
    ),
}
KINDS = [
    *[pytest.param(preset, {}, config, id=f"{preset} {name}") for preset in PRESETS for name, config in LATE.items()],
    *[pytest.param("bert", {}, config, id=f"bert {name}") for name, config in PLACED.items()],
    *[pytest.param("modern", LOCAL, LATE[name], id=f"local {name}") for name in ("depth 2", "decoder", "cross")],
]
each_kind = pytest.mark.parametrize("preset, settings, config", KINDS)


def late(config: ObjectiveConfig, preset: str, **settings):
    """The objective in 64 bits with every parameter random, norms and biases too."""
    mlm = objective(preset, dtype=torch.float32, **settings)
    model = build_objective(config, mlm.encoder, mlm.head)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.startswith(("encoder.", "head.")) and parameter.ndim < 2:
                parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model.double()


def corrupted(batch, every: int = 4):
    """Of the targets a third is hidden, a third another token, a third itself."""
    mask_plan = plan(batch, every)
    hidden, other, same = (mask_plan.targets[first::3] for first in range(3))
    inputs = batch.tokens.clone()
    inputs[hidden] = IDS.mask
    inputs[other] = len(IDS.special) + (inputs[other] + 7) % (IDS.size - len(IDS.special))
    visible = torch.ones_like(batch.maskable).index_fill_(0, hidden, False).nonzero().squeeze(1)
    assert len(other) and len(same)
    return MaskPlan(inputs, mask_plan.targets, mask_plan.labels, hidden, visible)


def gradients(model, batch, mask_plan) -> dict[str, torch.Tensor]:
    parameters = dict(model.named_parameters())
    grads = torch.autograd.grad(model(batch, mask_plan).total, list(parameters.values()))
    return dict(zip(parameters, grads, strict=True))


@pytest.mark.parametrize("preset, settings", [("bert", {}), ("modern", {}), ("modern", LOCAL)])
def test_3ml_at_depth_0_is_mlm(preset, settings):
    model, batch = late(LATE["depth 0"], preset, **settings), pack(LENGTHS, padding=4)
    mlm = build_objective(ObjectiveConfig(), model.encoder, model.head)
    mask_plan = corrupted(batch)
    assert torch.equal(model.states(batch, mask_plan), mlm.states(batch, mask_plan))
    assert torch.equal(model(batch, mask_plan).total, mlm(batch, mask_plan).total)
    expected = gradients(mlm, batch, mask_plan)
    for name, gradient in gradients(model, batch, mask_plan).items():
        assert_close(gradient, expected[name])


@pytest.mark.parametrize("depth", [0, 1, 2])
@pytest.mark.parametrize("preset, settings", [("bert", {}), ("modern", {}), ("modern", LOCAL)])
def test_with_nothing_hidden_3ml_is_mlm(preset, settings, depth):
    model, batch = late(ObjectiveConfig("three_ml", depth=depth), preset, **settings), pack(LENGTHS, padding=4)
    mlm = build_objective(ObjectiveConfig(), model.encoder, model.head)
    mask_plan = MaskPlan.hide_nothing(batch)
    assert torch.equal(model.states(batch, mask_plan), mlm.states(batch, mask_plan))
    assert torch.equal(model.entropy(batch), mlm.entropy(batch))


@pytest.mark.parametrize("preset", PRESETS)
def test_a_decoder_with_cross_attention_does_not_change_visible_tokens(preset):
    model, batch = late(LATE["cross"], preset), pack(LENGTHS, padding=4)
    mlm = build_objective(ObjectiveConfig(), model.encoder, model.head)
    assert torch.equal(model.entropy(batch), mlm.entropy(batch))
    mask_plan = corrupted(batch)
    alone = dataclasses.replace(batch, layout=batch.layout.keep(mask_plan.visible))
    seen = model.encoder.run(model.encoder.embed(mask_plan.inputs[mask_plan.visible], alone.layout), alone.layout)
    assert torch.equal(model.states(batch, mask_plan)[mask_plan.visible], seen)


@pytest.mark.parametrize("preset, settings", [("bert", {}), ("modern", {}), ("modern", LOCAL)])
@pytest.mark.parametrize("depth", [1, 2])
def test_mae_lm_with_the_encoders_own_top_layers_is_3ml_at_that_depth(preset, settings, depth):
    three, batch = late(ObjectiveConfig("three_ml", depth=depth), preset, **settings), pack(LENGTHS, padding=4)
    mae = late(ObjectiveConfig("mae_lm", decoder=DecoderConfig(3 - depth)), preset, **settings)
    assert isinstance(mae, MAELM)
    layers = copy.deepcopy(three.encoder.layers)
    mae.decoder.stack.layers, mae.decoder.stack.final_norm = layers[depth:], three.encoder.final_norm
    # the encoder of `modern` ends in a norm, the first layers of one do not
    mae.encoder, mae.head = copy.deepcopy(three.encoder), three.head
    mae.encoder.layers, mae.encoder.final_norm = layers[:depth], nn.Identity()
    for mask_plan in (corrupted(batch), MaskPlan.hide_nothing(batch)):
        assert_close(mae.states(batch, mask_plan), three.states(batch, mask_plan))


@each_kind
@pytest.mark.parametrize("lengths", [LENGTHS, LENGTHS[2:3]])
def test_the_token_under_a_mask_changes_nothing(preset, settings, config, lengths):
    model, batch = late(config, preset, **settings), pack(lengths)
    hidden = plan(batch).hidden
    others = batch.tokens.clone()
    others[hidden] = len(IDS.special) + (others[hidden] + 1) % (IDS.size - len(IDS.special))
    changed = dataclasses.replace(batch, tokens=others)
    assert not torch.equal(plan(batch).labels, plan(changed).labels)
    assert torch.equal(model.states(batch, plan(batch)), model.states(changed, plan(changed)))


@each_kind
@pytest.mark.parametrize("backend", ["reference", "padded"])
def test_a_sequence_alone_equals_the_sequence_in_a_pack(preset, settings, config, backend):
    model, batch = late(config, preset, attention=backend, **settings), pack(LENGTHS, padding=5)
    mask_plan = corrupted(batch)
    together = model.states(batch, mask_plan)
    for start, end in itertools.pairwise(batch.layout.cu_seqlens.unique().tolist()):
        rows = slice(start, end)
        layout = Layout(torch.tensor([0, end - start], dtype=torch.int32), 64, batch.layout.positions[rows])
        alone = dataclasses.replace(pack([end - start]), tokens=batch.tokens[rows], layout=layout)
        hidden, visible, targets = (
            each[(each >= start) & (each < end)] - start
            for each in (mask_plan.hidden, mask_plan.visible, mask_plan.targets)
        )
        part = MaskPlan(mask_plan.inputs[rows], targets, alone.tokens[targets], hidden, visible)
        assert_close(together[rows], model.states(alone, part))


@each_kind
def test_attention_back_ends_and_checkpointing_change_nothing(preset, settings, config):
    batch = pack(LENGTHS, padding=5)
    mask_plan = corrupted(batch)
    expected = gradients(late(config, preset, attention="reference", **settings), batch, mask_plan)
    for ways in ({"attention": "padded"}, {"activation_checkpointing": True}):
        grads = gradients(late(config, preset, **ways, **settings), batch, mask_plan)
        for name, gradient in grads.items():
            assert_close(gradient, expected[name])


@each_kind
def test_early_layers_receive_no_row_of_a_hidden_token(preset, settings, config):
    model, batch = late(config, preset, **settings), pack(LENGTHS)
    mask_plan = corrupted(batch)
    early = model.encoder.layers if config.kind == "mae_lm" else model.encoder.layers[: config.depth]
    others = [part for part in model.modules() if type(part) is type(model.encoder.layers[0]) and part not in {*early}]
    entered, states = [], []

    def watch(part, given, came):
        entered.append(given[0])
        states.append(came)

    for layer in (*early, *others):
        layer.register_forward_hook(watch)
    total = model(batch, mask_plan).total
    rows = [len(given) for given in entered]
    assert rows == [len(mask_plan.visible)] * len(early) + [batch.layout.rows] * len(others)
    # and they are the rows of the visible tokens, in their order, at their positions
    layout = batch.layout.keep(mask_plan.visible)
    if early:
        assert torch.equal(entered[0], model.encoder.embed(mask_plan.inputs[mask_plan.visible], layout))
    assert all(gradient.abs().sum() > 0 for gradient in torch.autograd.grad(total, states))


@each_kind
def test_every_parameter_learns(preset, settings, config):
    model, batch = late(config, preset, **settings), pack(LENGTHS)
    for gradient in gradients(model, batch, corrupted(batch)).values():
        assert gradient.isfinite().all() and gradient.abs().sum() > 0


@each_kind
def test_an_empty_list_of_hidden_rows_and_one_of_all_tokens_have_gradients(preset, settings, config):
    model, batch = late(config, preset, **settings), pack([9, 3, 2])
    for mask_plan in (MaskPlan.hide_nothing(batch), plan(batch, every=1)):
        losses = model(batch, mask_plan)
        losses.total.backward()
        assert losses.nll.isfinite().all()
        assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@each_kind
def test_the_same_outputs_are_available_as_of_mlm(preset, settings, config):
    model, batch = late(config, preset, **settings), pack(LENGTHS)
    model.train()
    entropy = model.entropy(batch)
    assert entropy.shape == batch.tokens.shape and entropy.isfinite().all() and model.training
    mask_plan = corrupted(batch)
    hidden = torch.randn(batch.layout.rows, 5, dtype=torch.float64)
    weight, bias = torch.randn(IDS.size, 5, dtype=torch.float64), torch.zeros(IDS.size, dtype=torch.float64)
    everywhere = torch.arange(batch.layout.rows)
    for rows in (None, everywhere):
        of = hidden[mask_plan.targets] if rows is None else hidden
        losses = model(batch, mask_plan, SoftTargets(0.5, rows=rows, hidden=of, weight=weight, bias=bias))
        logits = model.head.logits(model.states(batch, mask_plan)[mask_plan.targets if rows is None else rows])
        kl = nn.functional.kl_div(
            logits.log_softmax(-1), (of @ weight.T).log_softmax(-1), reduction="sum", log_target=True
        )
        assert_close(losses.distill, kl)


def test_dropout_is_the_decoders_own():
    batch, mask_plan = pack(LENGTHS), corrupted(pack(LENGTHS))
    for encoders, decoders in ((0.0, 0.3), (0.3, 0.0)):
        config = ObjectiveConfig("mae_lm", decoder=DecoderConfig(2, dropout=decoders))
        model = late(config, "bert", dropout=encoders).train()
        assert not torch.equal(model.states(batch, mask_plan), model.states(batch, mask_plan))
        (model.decoder if decoders else model.encoder).eval()
        assert torch.equal(model.states(batch, mask_plan), model.states(batch, mask_plan))


def test_a_decoder_continues_the_pattern_of_the_encoders_layers():
    model = late(ObjectiveConfig("mae_lm", decoder=DecoderConfig(4)), "modern", **LOCAL)
    first, shape = len(model.encoder.layers), model.encoder.shape
    wanted = [shape.window(place) for place in range(first, first + 4)]
    assert [layer.window for layer in model.decoder.stack.layers] == wanted and len(set(wanted)) == 2
    cross = late(LATE["cross"], "modern", **LOCAL)
    assert {layer.window for layer in cross.decoder.stack.layers} == {None}


@pytest.mark.slow
def test_compilation_changes_nothing():
    batch = pack(LENGTHS, padding=4)
    mask_plan = corrupted(batch)
    model = late(LATE["cross"], "modern").float()
    wanted = gradients(model, batch, mask_plan)
    for layer in (*model.encoder.layers, *model.decoder.stack.layers):
        layer.compile_sides = True
    grads = gradients(model, batch, mask_plan)
    for name, want in wanted.items():
        assert_close(grads[name], want)
