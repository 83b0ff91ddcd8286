"""A shape on disk is the shape, or a sentence."""

from __future__ import annotations

import json

import pytest

from megamask.errors import CheckpointError
from megamask.model.shape import EncoderShape, ModelConfig
from tests.batches import IDS
from tests.unit.model.models import PRESETS


@pytest.mark.parametrize("preset", PRESETS)
def test_a_shape_comes_back_as_it_was(preset, tmp_path):
    shape = ModelConfig(preset=preset).shape(IDS)
    shape.save(tmp_path)
    assert EncoderShape.load(tmp_path) == shape


def test_a_shape_that_is_missing_damaged_or_of_another_version_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no shape\.json"):
        EncoderShape.load(tmp_path)
    shape = ModelConfig().shape(IDS)
    shape.save(tmp_path)
    path = tmp_path / "shape.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"experts": 8}))
    with pytest.raises(CheckpointError, match=r"must hold .* but holds .*experts"):
        EncoderShape.load(tmp_path)
    for damaged in ("{", "[]", "7"):
        path.write_text(damaged)
        with pytest.raises(CheckpointError, match=r"shape\.json"):
            EncoderShape.load(tmp_path)


def test_overrides_win_over_the_size():
    config = ModelConfig("bert", "base", num_layers=2, hidden_size=128, max_positions=77)
    shape = config.shape(IDS)
    assert (shape.num_layers, shape.hidden_size, shape.max_positions) == (2, 128, 77)
    assert (shape.num_heads, shape.intermediate_size, shape.vocab_size, shape.pad_id) == (2, 512, IDS.size, IDS.pad)


def test_layers_of_a_group_are_consecutive():
    shape = ModelConfig("bert", num_layers=6, layer_groups=3).shape(IDS)
    assert [shape.weights_of(layer) for layer in range(6)] == [0, 0, 1, 1, 2, 2]
    assert ModelConfig("bert", num_layers=6, layer_groups=4).problems("model")
    shape = ModelConfig("bert", num_layers=3).shape(IDS)
    assert [shape.weights_of(layer) for layer in range(3)] == [0, 1, 2]


def test_both_presets_of_a_size_cost_about_the_same():
    for size in ("tiny", "small", "base", "large", "xl", "xxl"):
        bert, modern = (ModelConfig(preset, size).shape(IDS) for preset in PRESETS)
        # a gate makes three matrices of the feed-forward block's two
        assert 3 * modern.intermediate_size == pytest.approx(2 * bert.intermediate_size, rel=0.05)
