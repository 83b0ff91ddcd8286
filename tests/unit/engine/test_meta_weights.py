"""Parameters that are replaced one by one are freed one by one, and shared ones stay shared."""

from __future__ import annotations

import gc
import weakref

import torch
from torch import Tensor, nn

from megamask.engine.meta_weights import materialise


def test_each_parameter_is_freed_before_the_next_but_one_is_made() -> None:
    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(4)))
    model[3].weight = model[0].weight
    expected = {name: value.double() for name, value in model.state_dict().items()}
    alive = {name: weakref.ref(parameter) for name, parameter in model.named_parameters()}
    values, given = dict(model.named_parameters()), list[str]()

    def value_of(name: str) -> Tensor:
        gc.collect()
        assert [earlier for earlier in given[:-1] if alive[earlier]() is not None] == []
        given.append(name)
        return values.pop(name).detach()

    materialise(model, value_of, {}, torch.float64, torch.device("cpu"))
    assert given == [*alive] and not values
    assert model[3].weight is model[0].weight
    assert {name: value.dtype for name, value in model.state_dict().items()} == dict.fromkeys(expected, torch.float64)
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
