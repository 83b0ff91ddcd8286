"""First values of weights by name: the distribution is that of a built model, and no other draw matters."""

from __future__ import annotations

import pytest
import torch
from scipy import stats
from torch import nn

from megamask.model.encoder import Encoder
from megamask.model.head import MaskedLMHead
from megamask.model.initialisation import initial_value
from megamask.model.shape import ModelConfig
from megamask.objectives import objective as objectives
from megamask.objectives.mae_lm import DecoderConfig
from megamask.objectives.objective import ObjectiveConfig
from tests.batches import IDS


def build(preset: str, layers: int = 2, **objective: object) -> nn.Module:
    config = ModelConfig(preset, num_layers=layers, hidden_size=48, num_heads=2, intermediate_size=64)
    encoder = Encoder(config.shape(IDS), config)
    return objectives.build_objective(ObjectiveConfig(**objective), encoder, MaskedLMHead(encoder, config))


def on_meta(*arguments, **settings) -> dict[str, nn.Parameter]:
    with torch.device("meta"):
        return dict(build(*arguments, **settings).named_parameters())


OBJECTIVES = [
    ("modern", {"kind": "mae_lm", "decoder": DecoderConfig(1), "mask_vector": "own"}),
    ("bert", {"kind": "mlm"}),
]


@pytest.mark.parametrize(("preset", "objective"), OBJECTIVES, ids=["modern", "bert"])
def test_values_have_the_distribution_of_a_built_model(preset: str, objective: dict) -> None:
    torch.manual_seed(0)
    built, metas = dict(build(preset, **objective).named_parameters()), on_meta(preset, **objective)
    assert built.keys() == metas.keys()
    for name, parameter in built.items():
        value = initial_value(name, metas[name], seed=0)
        assert value.shape == parameter.shape and value.device.type == "cpu" and value.dtype == torch.float32
        if parameter.ndim < 2:
            assert torch.equal(value, parameter)
        else:
            assert not torch.equal(value, parameter)
            same = stats.ks_2samp(value.flatten().numpy(), parameter.detach().flatten().numpy())
            assert same.pvalue > 1e-4, name


def test_a_value_depends_on_seed_and_name_alone() -> None:
    two, three = on_meta("bert", layers=2), on_meta("bert", layers=3)
    for name in two:
        torch.manual_seed(len(name))
        torch.rand(len(name))
        assert torch.equal(initial_value(name, two[name], seed=1), initial_value(name, three[name], seed=1))
    matrices = [name for name in two if name.startswith("encoder.layers.") and name.endswith("qkv.weight")]
    draws = [initial_value(name, two[name], seed) for name in matrices for seed in (1, 2)]
    assert len(draws) == len({tuple(draw.flatten().tolist()) for draw in draws}) == 4
    state = torch.get_rng_state()
    initial_value(matrices[0], two[matrices[0]], seed=1)
    assert torch.equal(torch.get_rng_state(), state)
