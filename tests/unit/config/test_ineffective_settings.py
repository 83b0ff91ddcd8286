"""Settings that have no effect: refused where somebody typed them, left out with a line where a recipe made them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from megamask.basic_types import TokenIds
from megamask.config.checks import check_config, config_problems
from megamask.config.cli import parse_command
from megamask.config.ineffective_settings import leave_out, typed
from megamask.config.overrides import override_settings
from megamask.config.pretrain_config import PretrainConfig, as_dict, resolve_phases
from megamask.config.recipes import find_recipe
from megamask.errors import ConfigError, Removable
from megamask.model.shape import ModelConfig
from megamask.storage.dotted import flatten

CHANGES = [  # a recipe, what is typed on top, and what the recipe made that then has no effect
    ("small", {"optimizer.kind": "adamw"}, {"optimizer.muon_lr_scale"}),
    ("bert", {"optimizer.kind": "muon"}, {"optimizer.max_grad_norm"}),
    ("tiny", {"model.preset": "bert"}, {"model.global_every", "model.local_window"}),
    ("tiny", {"model.global_every": 1}, {"model.local_window"}),
    ("mrd-linear", {"masking.ratio.kind": "constant", "masking.ratio.start": 0.2}, {"masking.ratio.end"}),
    ("frequency", {"masking.random_share.kind": "linear"}, {"masking.random_share.at", "masking.random_share.until"}),
    (
        "entropy-self-probe", {"masking.score": "uniform"},
        {"entropy.source", "entropy.audit.every"} | {f"masking.random_share.{part}" for part in ("end", "at", "until")},
    ),
    ("entropy-self-probe", {"entropy.source": "exact"}, {"entropy.audit.every"}),
    ("mae-lm", {"objective.kind": "mlm"}, {"objective.decoder.positions"}),
    ("entropy-kd-after-init", {"distill.weight.end": 0.0}, set()),
]  # fmt: skip


def laid_over(recipe: str, values: dict) -> PretrainConfig:
    """``recipe`` with values by their dotted names."""
    nested: dict = {}
    for name, value in values.items():
        *sections, last = name.split(".")
        table = nested
        for section in sections:
            table = table.setdefault(section, {})
        table[last] = value
    return override_settings(find_recipe(recipe), nested, "test")


def removable(config: PretrainConfig) -> list[str]:
    return [problem.name for problem in config_problems(config) if isinstance(problem, Removable)]


@pytest.mark.parametrize(("recipe", "values", "expected"), CHANGES)
def test_what_a_recipe_made_without_effect_is_left_out_with_a_line_and_nothing_else(recipe, values, expected) -> None:
    config = laid_over(recipe, values)
    left, lines = leave_out(config, set(values), recipe)
    before, after = flatten(as_dict(config)), flatten(as_dict(left))
    changed = {name for name in before if before[name] != after[name]}
    assert expected <= changed and (expected or not changed)
    assert not changed & set(values)
    assert not removable(left)
    for name in changed:
        (line,) = (line for line in lines if line.startswith(f"`{name}` "))
        assert repr(before[name]) in line and repr(recipe) in line
    assert leave_out(left, set(values), recipe) == (left, [])


@pytest.mark.parametrize(("recipe", "values", "expected"), CHANGES)
def test_what_somebody_typed_stays_and_is_refused(recipe, values, expected) -> None:
    config = laid_over(recipe, values)
    left, lines = leave_out(config, set(flatten(as_dict(config))), recipe)
    assert left == config and lines == []
    assert bool(removable(config)) == bool(expected)


def test_init_overrides_sizes_of_a_recipe_and_refuses_typed_ones(tmp_path: Path) -> None:
    shape = ModelConfig("roberta", "tiny", num_layers=2, hidden_size=128).shape(TokenIds(100, 0, 1, 2, 3, ()))
    (tmp_path / "start").mkdir()
    shape.save(tmp_path / "start")
    (tmp_path / "start" / "model.safetensors").touch()
    flags = ["--recipe", "albert-tiny", "--init", str(tmp_path / "start")]
    command = parse_command(flags)
    assert command.run.model.shape(TokenIds(100, 0, 1, 2, 3, ())).layer_groups is None
    sizes = ("num_layers", "hidden_size", "num_heads", "layer_groups", "embedding_size")
    assert [line.split()[0] for line in command.notes] == [f"`model.{size}`" for size in sizes]
    assert not removable(command.run)
    typed_groups = config_problems(parse_command([*flags, "--model.layer-groups", "2"]).run)
    assert "`model.layer_groups` contradicts the weights of `init`, which have none, not 2. Remove it." in typed_groups
    assert removable(parse_command([*flags, "--model.num-layers", "2"]).run) == []
    cut = parse_command([*flags, "--init-layers", "0", "--model.num-layers", "1"]).run
    assert removable(cut) == []


@pytest.mark.parametrize(
    ("preset", "flags", "sentence"),
    [
        ("roberta", ["--model.preset", "bert"], "`model.preset` contradicts the weights of `init`, which have roberta"),
        ("modern", ["--model.preset", "bert"], "`model.preset` contradicts the weights of `init`, which have modern"),
        ("bert", ["--model.size", "base"], "`model.size` contradicts the weights of `init`, which have 2x128, not 12x"),
        ("modern", ["--model.global-every", "2"], "`model.global_every` contradicts the weights of `init`, which have"),
        ("modern", ["--model.local-window", "8"], "`model.local_window` contradicts the weights of `init`, which have"),
    ],
)  # fmt: skip
def test_a_typed_setting_that_init_decides_is_refused_if_it_contradicts_init(
    tmp_path: Path, preset: str, flags: list[str], sentence: str
) -> None:
    local = {"global_every": 3, "local_window": 16} if preset == "modern" else {}
    shape = ModelConfig(preset, num_layers=2, hidden_size=128, **local).shape(TokenIds(100, 0, 1, 2, 3, ()))
    shape.save(tmp_path)
    (tmp_path / "model.safetensors").touch()
    start = ["--recipe", "small", "--init", str(tmp_path)]
    with pytest.raises(ConfigError) as error:
        parse_command([*start, *flags])
    assert sum(sentence in problem for problem in error.value.problems) == 1
    own = [f"--model.{name.replace('_', '-')}={value}" for name, value in ({"preset": preset} | local).items()]
    for accepted in ([], own):
        check_config(parse_command([*start, *accepted]).run, None, 1)


def test_sequences_longer_than_init_reads_are_a_problem_of_the_settings(tmp_path: Path) -> None:
    ModelConfig("bert", max_positions=64).shape(TokenIds(100, 0, 1, 2, 3, ())).save(tmp_path)
    (tmp_path / "model.safetensors").touch()
    config = parse_command(["--recipe", "small", "--init", str(tmp_path)]).run
    with pytest.raises(ConfigError, match=r"^`packs.length` must be at most 64, the positions of the weights of"):
        check_config(config, None, 1)


def test_every_recipe_is_as_it_was() -> None:
    for recipe in ("tiny", "bert", "mrd-ptw", "entropy-kd-after-init", "mae-lm"):
        assert leave_out(find_recipe(recipe), set(), recipe) == (find_recipe(recipe), [])


def test_flags_and_files_are_typed_and_what_a_run_recorded_is_not(tmp_path: Path) -> None:
    config = find_recipe("small")
    flags = [
        "--optimizer.kind",
        "adamw",
        "--optimizer.muon-lr-scale=10",
        "--no-export",
        "--masking.entropy.no-standardise",
    ]
    names = {"optimizer.kind", "optimizer.muon_lr_scale", "export", "masking.entropy.standardise"}
    assert typed(config, flags, {}) == names
    assert typed(config, [], {"optimizer": {"muon_lr_scale": 3.0}, "steps": 4}) == {"optimizer.muon_lr_scale", "steps"}
    record = as_dict(config) | {"deepspeed": {}, "text": "hash"}
    assert typed(config, [], record) == set()
    adamw = ["--optimizer.kind", "adamw"]
    (tmp_path / "run.json").write_text(json.dumps(record))
    (tmp_path / "mine.json").write_text('{"optimizer": {"muon_lr_scale": 3.0}}')
    command = parse_command(["--recipe", "small", *adamw])
    assert check_config(command.run, None, 1) == {}
    (line,) = command.notes
    assert line.startswith("`optimizer.muon_lr_scale` 10.0 of the recipe 'small' is left out")
    assert parse_command(["--config", str(tmp_path / "run.json"), *adamw]).run.optimizer == command.run.optimizer
    for more in (["--config", str(tmp_path / "mine.json")], ["--optimizer.muon-lr-scale", "3"]):
        refused = parse_command(["--recipe", "small", *adamw, *more])
        assert refused.notes == ()
        with pytest.raises(
            ConfigError, match=r"^`optimizer.muon_lr_scale` has no effect with `optimizer.kind` 'adamw', only"
        ):
            check_config(refused.run, None, 1)


def test_what_is_left_out_of_a_run_is_read_back_from_its_record() -> None:
    left, _ = leave_out(laid_over("small", {"optimizer.kind": "adamw"}), {"optimizer.kind"}, "small")
    record = as_dict(resolve_phases(left)) | {"deepspeed": {}, "text": "hash"}
    assert resolve_phases(override_settings(find_recipe("small"), record, "config.json")) == resolve_phases(left)
