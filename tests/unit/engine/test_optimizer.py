"""Groups of parameters: everything once, decay on matrices alone, Muon inside layers alone."""

from __future__ import annotations

import functools
import inspect

import pytest
import torch
from torch import nn

from megamask.engine.optimizer import MOMENTS, OptimizerConfig, build_optimizer, moments_of, parameter_groups
from megamask.errors.setting_rules import settings_problems
from megamask.runtime import private_api, ranks
from megamask.schedules import LearningRate
from tests.unit.model.models import PRESETS, objective

KINDS = list(MOMENTS)


def config(kind: str, **more) -> OptimizerConfig:
    return OptimizerConfig(kind=kind, weight_decay=0.1, max_grad_norm=0.0 if kind == "muon" else 1.0, **more)


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_parameter_is_in_one_group(preset: str, kind: str) -> None:
    model = objective(preset)
    grouped = [p for group in parameter_groups(model, config(kind)) for p in group["params"]]
    assert len(grouped) == len({id(p) for p in grouped})
    assert {id(p) for p in grouped} == {id(p) for p in model.parameters()}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("kind", KINDS)
def test_norms_and_biases_do_not_decay(preset: str, kind: str) -> None:
    model = objective(preset)
    names = {id(p): name for name, p in model.named_parameters()}
    for group in parameter_groups(model, config(kind)):
        for parameter in group["params"]:
            name = names[id(parameter)]
            assert group["weight_decay"] == (0.0 if "norm" in name or name.endswith("bias") else 0.1), name


@pytest.mark.parametrize("preset", PRESETS)
def test_muon_has_the_matrices_of_the_layers_and_nothing_else(preset: str) -> None:
    model = objective(preset)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = parameter_groups(model, config("muon", muon_lr_scale=7.0))
    under = {names[id(p)] for group in groups if group["use_muon"] for p in group["params"]}
    assert under == {name for name, p in model.named_parameters() if ".layers." in name and p.ndim == 2}
    assert not any("embedding" in name or "head" in name for name in under)
    assert all(group["scale"] == (7.0 if group["use_muon"] else 1.0) for group in groups)
    assert {name for name, p in model.named_parameters() if p.use_muon} == under
    for kind in ("adamw", "lamb"):
        parameter_groups(model, config(kind))
        assert not any(p.use_muon for p in model.parameters())


@pytest.mark.parametrize("kind", ["adamw", "lamb"])
def test_the_moments_are_those_that_the_optimizer_keeps(kind: str) -> None:
    model = objective("modern", dtype=torch.float32)
    made = build_optimizer(model, config(kind))
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    made.step()
    for parameter in model.parameters():
        kept = {name for name, value in made.state[parameter].items() if torch.is_tensor(value) and value.ndim}
        assert kept <= set(moments_of(kind, False)) | {"step"}
        assert set(moments_of(kind, False)) <= set(made.state[parameter])


@pytest.mark.parametrize(
    ("wrong", "names"),
    [
        ({"lr": LearningRate(peak=-1)}, ["lr.peak"]),
        ({"beta1": 1.0, "beta2": -0.1}, ["beta1", "beta2"]),
        ({"eps": 0.0}, ["eps"]),
        ({"weight_decay": -1.0, "max_grad_norm": float("inf")}, ["weight_decay", "max_grad_norm"]),
        ({"muon_lr_scale": 3.0}, ["muon_lr_scale"]),
        ({"kind": "muon"}, ["max_grad_norm"]),
    ],
)
def test_every_problem_is_named(wrong: dict, names: list[str]) -> None:
    problems = settings_problems(OptimizerConfig(**wrong), "optimizer")
    assert len(problems) == len(names)
    assert all(f"`optimizer.{name}`" in sentence for name, sentence in zip(names, problems, strict=True))
    assert settings_problems(OptimizerConfig(), "optimizer") == []


def test_muon_is_not_compiled_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from deepspeed.runtime.zero.muon import muon_optimizer, original_muon

    modules = (original_muon, muon_optimizer)
    for device, compiled in (("cuda", True), ("cpu", False)):
        monkeypatch.setattr(ranks, "device", lambda device=device: torch.device(device))
        for module in modules:
            for name in private_api.COMPILED_BY_MUON:
                if hasattr(module, name):
                    plain = inspect.unwrap(getattr(module, name))
                    monkeypatch.setattr(module, name, functools.wraps(plain)(lambda *_: None))
        build_optimizer(nn.Linear(2, 2), config("muon"))
        functions = [
            getattr(module, name)
            for module in modules
            for name in private_api.COMPILED_BY_MUON
            if hasattr(module, name)
        ]
        assert functions and all((inspect.unwrap(function) is not function) == compiled for function in functions)
