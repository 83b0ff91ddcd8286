"""Some layers of a model as initial weights compute what they computed in it."""

from __future__ import annotations

import pytest
import torch

from megamask.errors import ConfigError
from megamask.hf.layer_subset import pick_layers
from megamask.model.encoder import Encoder
from megamask.model.head import MaskedLMHead
from megamask.objectives.mlm import MLM
from tests.tolerances import assert_close


@pytest.mark.parametrize("preset", ["bert", "modern"])
@torch.no_grad()
def test_picked_layers_compute_what_they_did(student, packs, preset):
    deep = student(preset, num_layers=6)
    weights = {n: p.detach() for n, p in deep.named_parameters()}
    shape, picked = pick_layers(weights, deep.encoder.shape, (0, 2, 5))
    encoder = Encoder(shape)
    shallow = MLM(encoder, MaskedLMHead(encoder)).eval()
    assert not shallow.load_state_dict(picked, strict=False).unexpected_keys
    assert picked.keys() == dict(shallow.named_parameters()).keys()
    batch = packs[0][0]
    x = deep.encoder.embed(batch.tokens, batch.layout)
    for layer in (0, 2, 5):
        rows = slice(layer, layer + 1)
        final, deep.encoder.final_norm = deep.encoder.final_norm, torch.nn.Identity()
        x = deep.encoder.run(x, batch.layout, rows)
        deep.encoder.final_norm = final
    expected = deep.head.logits(deep.encoder.final_norm(x))
    assert_close(shallow.head.logits(encoder.run(encoder.embed(batch.tokens, batch.layout), batch.layout)), expected)


def test_a_layer_that_becomes_the_first_loses_its_attention_norm(student):
    model = student("modern")
    weights = {n: p.detach() for n, p in model.named_parameters()}
    shape, picked = pick_layers(weights, model.encoder.shape, (0, 1, 2))
    assert shape == model.encoder.shape and picked.keys() == weights.keys()
    shape, picked = pick_layers(weights, shape, (1, 2))
    encoder = Encoder(shape)
    assert picked.keys() == dict(MLM(encoder, MaskedLMHead(encoder)).named_parameters()).keys()


@pytest.mark.parametrize(
    ("layers", "sentence"),
    [
        ((), "`init_layers` must name at least one layer"),
        ((0, 6), r"`init_layers` must name layers from 0 to 5, but is \(0, 6\)"),
        ((-1,), "must name layers from 0 to 5"),
        ((0, 2, 1), "must be in ascending order"),
        ((1, 1), "must be in ascending order"),
        ((0, 2, 3), "puts layer 3, which has global attention, at position 2, which has local attention"),
        ((1,), "puts layer 1, which has local attention, at position 0, which has global attention"),
    ],
)
def test_layers_that_do_not_fit_are_refused(student, layers, sentence):
    model = student("modern", num_layers=6, global_every=3, local_window=8)
    weights = dict(model.named_parameters())
    with pytest.raises(ConfigError, match=sentence):
        pick_layers(weights, model.encoder.shape, layers)
    assert pick_layers(weights, model.encoder.shape, (0, 1, 5, 3)[:3])[0].num_layers == 3
