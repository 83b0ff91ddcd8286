"""What may be asked of an objective, what is refused in which words, and what of it leaves with an export."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel

from megamask.config.checks import check_config
from megamask.config.pretrain_config import PacksConfig, PretrainConfig
from megamask.data import tokenizer as tokenizers
from megamask.data import tokenizer_training
from megamask.errors import CheckpointError, ConfigError
from megamask.hf import Card, export_model
from megamask.hf.tensor_names import WEIGHTS
from megamask.masking.corrupt import Corruption
from megamask.masking.masker import MaskingConfig
from megamask.model.shape import ModelConfig
from megamask.objectives.mae_lm import DecoderConfig
from megamask.objectives.objective import ObjectiveConfig, build_objective, load_objective_weights
from megamask.objectives.visible_tokens import visible_states
from megamask.schedules import Schedule
from megamask.training.flops import forward_flops
from tests.batches import IDS, pack
from tests.tolerances import assert_close
from tests.unit.model.models import PRESETS, objective, plan
from tests.unit.objectives.test_visible_tokens import KINDS, LATE, PLACED, late

THREE = ObjectiveConfig("three_ml", depth=2)
MAE = ObjectiveConfig("mae_lm")
BASE = ModelConfig("modern", "base")
REFUSED = [
    (replace(THREE, depth=14), "`objective.depth` must lie between 0 and 11, because one of the 12 layers of `model` "
     "must see [MASK], but is 14."),
    (replace(THREE, depth=12), "`objective.depth` must lie between 0 and 11"),
    (replace(THREE, depth=-1), "`objective.depth` must lie between 0 and 11"),
    (replace(THREE, depth=None), "`objective.depth` must be given when `objective.kind` is 'three_ml'"),
    (replace(MAE, depth=2), "`objective.depth` has no effect with `objective.kind` 'mae_lm'"),
    (ObjectiveConfig(depth=0), "`objective.depth` has no effect with `objective.kind` 'mlm'"),
    (ObjectiveConfig(mask_vector="own"), "`objective.mask_vector` has no effect with `objective.kind` 'mlm'"),
    (ObjectiveConfig(decoder=DecoderConfig(2)), "`objective.decoder` has no effect with `objective.kind` 'mlm'"),
    (replace(THREE, decoder=DecoderConfig(attention="cross")), "`objective.kind` 'three_ml', only with 'mae_lm'."),
    (replace(MAE, decoder=DecoderConfig(0)), "`objective.decoder.layers` must be at least 1, but is 0."),
    (replace(MAE, decoder=DecoderConfig(dropout=1.0)), "`objective.decoder.dropout` must lie in [0, 1), but is 1.0."),
    (PLACED["positions"], "`objective.decoder.positions` must be 'masks' with the preset 'modern', but is 'all'."),
]  # fmt: skip


def problems(config: ObjectiveConfig, **parts) -> tuple[str, ...]:
    try:
        check_config(PretrainConfig(objective=config, **{"model": BASE, **parts}), None, 1)
    except ConfigError as error:
        return error.problems
    return ()


@pytest.mark.parametrize("config, sentence", REFUSED)
def test_what_cannot_be_is_one_sentence(config, sentence):
    (problem,) = problems(config)
    assert sentence in problem


@pytest.mark.parametrize("config", [ObjectiveConfig(), *LATE.values()])
def test_what_can_be_is_not_refused(config):
    assert problems(config) == ()
    assert problems(config, model=ModelConfig("bert", "base")) == ()


@pytest.mark.parametrize("config", [THREE, MAE])
def test_a_sequence_keeps_a_token_and_has_a_target(config):
    packs, all_masks = PacksConfig(tokens=256, length=32), Corruption(1.0, 0.0, 0.0)

    def found(start, end=None, mix=all_masks):
        ratio = Schedule("linear", start, end) if end else Schedule(start=start)
        return problems(config, packs=packs, masking=MaskingConfig(ratio, corruption=mix))

    # 30 of 32 rows are tokens, of which one must stay
    assert found(29 / 32) == found(1 / 32) == found(29 / 32, 1 / 32) == ()
    (high,) = found(0.5, 30 / 32)
    assert high.startswith("`masking.ratio` must leave a token visible in a sequence of `packs.length` (32) tokens")
    (low,) = found(0.5, 0.9 / 32)
    assert low.startswith("`masking.ratio` must give a sequence of `packs.length` (32) tokens a target under [MASK]")
    assert len(found(30 / 32, 0.9 / 32)) == 2
    # what is not [MASK] stays visible
    assert found(30 / 32, mix=Corruption(0.5, 0.5, 0.0)) == ()
    (none,) = found(0.5, mix=Corruption(0.0, 1.0, 0.0))
    why = f"{config.kind!r} has no effect while `masking.corruption.mask` is 0"
    assert none == f"`objective.kind` {why}. Set it to 'mlm'."


def test_dropout_of_a_decoder_needs_attention_that_can_drop():
    dropping = ObjectiveConfig("mae_lm", decoder=DecoderConfig(dropout=0.1))
    (problem,) = problems(dropping, model=ModelConfig(attention="varlen"))
    assert problem == "`objective.decoder.dropout` must be 0 when `model.attention` is 'varlen', but is 0.1."


def test_first_weights_may_have_fewer_layers_than_the_depth():
    mlm = objective("modern")
    with pytest.raises(ConfigError, match="must lie between 0 and 2"):
        build_objective(ObjectiveConfig("three_ml", depth=3), mlm.encoder, mlm.head)


@pytest.mark.parametrize("preset, settings, config", KINDS)
def test_flops_are_those_that_torch_counts(preset, settings, config):
    # local layers are counted as a bound; and in one block, where attention pads nothing
    model = late(config, preset, attention="reference", **settings)
    if settings:
        model.encoder.shape = replace(model.encoder.shape, global_every=1)
    batch = pack([40])
    mask_plan = plan(batch, every=2)
    with FlopCounterMode(display=False) as counted:
        model(batch, mask_plan).total.backward()
    flops = forward_flops(model.encoder.shape, config)
    assert counted.get_total_flops() == pytest.approx(flops.training(40, 40**2, len(mask_plan.targets)), rel=1e-12)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("name", ["depth 2", "own vector", "decoder", "cross"])
def test_an_export_drops_other_modules_and_keeps_the_encoder(preset, name, tmp_path):
    text = ["Some words that make a vocabulary."]
    tokenizer_training.train_tokenizer("wordpiece", text * 5, size=90).save(tmp_path / "tokenizer")
    ids = tokenizers.token_ids(tokenizers.load_tokenizer(tmp_path / "tokenizer"))
    assert ids.size <= IDS.size
    model = late(LATE[name], preset).float()
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    export_model(weights, model.encoder.shape, tmp_path / "tokenizer", tmp_path / "out", card=Card("", "", 1, ""))
    assert not [key for key in load_file(tmp_path / "out" / WEIGHTS) if "mask_vector" in key or "entry" in key]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == model.encoder.shape.num_layers
    # of a sequence whose end alone is hidden, the encoder sees just what transformers is given: its beginning
    theirs = AutoModel.from_pretrained(tmp_path / "out", **({"add_pooling_layer": False} if preset == "bert" else {}))
    batch = pack([20])
    mask_plan = plan(batch)
    first = mask_plan.hidden[-1]
    mask_plan = replace(mask_plan, hidden=torch.arange(first, 20), visible=torch.arange(first))
    with torch.no_grad():
        expected = theirs.eval()(input_ids=mask_plan.inputs[None, :first]).last_hidden_state[0]
        assert_close(visible_states(model.encoder, batch, mask_plan), expected)


def test_one_kind_of_run_begins_with_the_weights_of_another():
    source, batch = late(LATE["decoder"], "modern"), pack([20, 9])
    weights = dict(source.named_parameters())
    mlm = objective("modern", seed=3)
    load_objective_weights(mlm, weights)
    assert torch.equal(mlm.head.dense.weight, source.head.dense.weight)
    again = late(LATE["decoder"], "modern")
    load_objective_weights(again, weights)
    assert torch.equal(again.states(batch, plan(batch)), source.states(batch, plan(batch)))
    # from MLM a decoder starts from random weights; half a decoder is refused
    load_objective_weights(again, dict(mlm.named_parameters()))
    half = {name: tensor for name, tensor in weights.items() if not name.startswith("decoder.stack.layers.1.")}
    with pytest.raises(CheckpointError, match=r"lack 6 tensors: decoder\.stack\.layers\.1\."):
        load_objective_weights(again, half)
    shallow = build_objective(ObjectiveConfig("mae_lm", decoder=DecoderConfig(1)), mlm.encoder, mlm.head)
    with pytest.raises(CheckpointError, match=r"have 6 tensors: decoder\.stack\.layers\.1\."):
        load_objective_weights(shallow, weights)
