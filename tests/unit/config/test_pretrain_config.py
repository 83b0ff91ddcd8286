"""The configuration: written and read back, laid over, and every problem found."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megamask.config.checks import check_config
from megamask.config.cli import show_config
from megamask.config.overrides import override_settings, read_settings
from megamask.config.pretrain_config import LogConfig, PacksConfig, PretrainConfig, as_dict, resolve_phases
from megamask.config.recipes import RECIPES, find_recipe, list_recipes
from megamask.config.settings import MixtureConfig
from megamask.engine.optimizer import OptimizerConfig
from megamask.errors import ConfigError
from megamask.model.shape import ModelConfig
from megamask.teacher.teacher import TeacherConfig

BASES = ("tiny", "bert")


def digest(shown: str) -> str:
    """A configuration as one word."""
    return hashlib.sha256(shown.encode()).hexdigest()


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_is_sound_and_read_back_from_what_is_shown(recipe: str, tmp_path: Path) -> None:
    config = resolve_phases(find_recipe(recipe))
    (tmp_path / "config.json").write_text(show_config(config))
    settings = read_settings(tmp_path / "config.json")
    for base in (*BASES, "entropy-kd-after-init-both"):
        again = resolve_phases(override_settings(find_recipe(base), settings, "file"))
        assert again == config
        assert digest(show_config(again)) == digest(show_config(config))
    # what is not shown would be that of the base
    for base in BASES:
        for name in [name for name, value in as_dict(find_recipe(base)).items() if value != settings[name]]:
            assert (
                override_settings(find_recipe(base), {key: settings[key] for key in settings if key != name}, "file")
                != config
            )
    zero1 = tmp_path / "zero1.json"
    zero1.write_text('{"zero_optimization": {"stage": 1}}')
    if config.distill.active or config.entropy.source == "teacher":
        with pytest.raises(ConfigError, match=r"needs `teacher.path`"):
            check_config(config, zero1, config.packs.per_step)
        config = replace(config, teacher=TeacherConfig("a model"))
    if config.mixture != MixtureConfig():
        with pytest.raises(ConfigError, match=r"no effect with a single folder"):
            check_config(config, zero1, config.packs.per_step)
        for name in ("de", "zh"):
            (tmp_path / name).mkdir()
        config = replace(config, data=(tmp_path / "de", tmp_path / "zh"))
    assert check_config(config, zero1, config.packs.per_step) == {"zero_optimization": {"stage": 1}}


def test_every_recipe_has_a_description() -> None:
    assert all(description.endswith(".") and len(description.split()) > 5 for description in list_recipes().values())


def test_the_document_of_the_recipes_has_every_one_and_no_other() -> None:
    document = (Path(__file__).parents[3] / "docs" / "recipes.md").read_text()
    described = set(re.findall(r"^\| `([a-z][a-z0-9-]*)` \|", document, re.MULTILINE))
    assert described == {name.partition("[")[0] for name in list_recipes()}


@settings(max_examples=20)  # each builds the whole schema
@given(st.integers(1, 10**6), st.floats(1e-6, 1), st.sampled_from(["token", "word", "span"]))
def test_a_file_overrides_its_settings_and_no_others(steps: int, peak: float, unit: str) -> None:
    values = {"steps": steps, "optimizer": {"lr": {"peak": peak}}, "masking": {"unit": unit}}
    base = find_recipe("span")
    config = override_settings(base, values, "file")
    assert (config.steps, config.optimizer.lr.peak, config.masking.unit) == (steps, peak, unit)
    back = {"steps": base.steps, "optimizer": {"lr": {"peak": base.optimizer.lr.peak}}, "masking": {"unit": "span"}}
    assert override_settings(config, back, "file") == base


def test_toml_is_read_like_json(tmp_path: Path) -> None:
    (tmp_path / "some.toml").write_text("steps = 7\n[optimizer]\nlr = {kind = 'wsd', peak = 1e-4}\n")
    (tmp_path / "some.json").write_text('{"steps": 7, "optimizer": {"lr": {"kind": "wsd", "peak": 1e-4}}}')
    toml, json_ = (read_settings(tmp_path / name) for name in ("some.toml", "some.json"))
    assert toml == json_
    assert override_settings(PretrainConfig(), toml, "some.toml").optimizer.lr.peak == 1e-4


@pytest.mark.parametrize("name", ["some.yaml", "some.yml", "some"])
def test_settings_are_toml_or_json(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("steps: 7\n")
    with pytest.raises(ConfigError, match=rf"{name}` must be a TOML or JSON file, with the ending \.toml or \.json"):
        read_settings(tmp_path / name)


def test_a_recorded_run_has_more_than_settings_and_no_other_file_may() -> None:
    base = PretrainConfig()
    recorded = as_dict(replace(base, seed=5)) | {"deepspeed": {}, "text": "hash"}
    assert override_settings(base, recorded, "config.json").seed == 5
    for name in ("deepspeed", "text"):
        with pytest.raises(ConfigError, match=f"`{name}` is not known"):
            override_settings(base, {name: "x"}, "file")


def test_every_unknown_key_and_wrong_type_is_named() -> None:
    wrong = {"stepz": 1, "model": {"widht": 2, "size": "vast"}, "packs": 3, "seed": "x"}
    with pytest.raises(ConfigError) as caught:
        override_settings(PretrainConfig(), wrong, "file")
    assert len(caught.value.problems) == 5
    for name in ("`stepz`", "`model.widht`", "`model.size`", "`packs`", "`seed`"):
        assert name in str(caught.value)
    assert all("`file`" in problem for problem in caught.value.problems)


def test_a_boolean_is_not_accepted_as_a_number() -> None:
    with pytest.raises(ConfigError, match=r"`packs.tokens` in `file` must be a whole number, but is true\."):
        override_settings(PretrainConfig(), {"packs": {"tokens": True}, "export": False}, "file")


@pytest.mark.parametrize("world", [1, 2, 3, 4, 7])
def test_packs_are_shared_evenly_or_not_at_all(world: int) -> None:
    for per_step in range(1, 13):
        config = PretrainConfig(packs=PacksConfig(256, 64, per_step))
        if per_step % world:
            fitting = ", ".join(str(ranks) for ranks in range(1, 13) if per_step % ranks == 0)
            with pytest.raises(ConfigError, match=rf"of the number of ranks .* ranks that fits \({fitting}\)\."):
                check_config(config, None, world)
        else:
            assert check_config(config, None, world) == {}


def test_sequences_must_fit_the_positions() -> None:
    fits = PretrainConfig(packs=PacksConfig(1024, 512, 1), model=ModelConfig("bert"))
    assert check_config(fits, None, 1) == {}
    with pytest.raises(ConfigError, match=r"`packs.length` must be at most .*512.*, but is 513"):
        check_config(replace(fits, packs=PacksConfig(1024, 513, 1)), None, 1)
    longer = replace(fits, packs=PacksConfig(1024, 513, 1), model=ModelConfig("bert", max_positions=513))
    assert check_config(longer, None, 1) == {}


@pytest.mark.parametrize(
    ("changed", "name"),
    [
        ({"steps": 0}, "steps"),
        ({"seed": -1}, "seed"),
        ({"seed": 2**63}, "seed"),
        ({"packs": PacksConfig(256, 4)}, "packs.length"),
        ({"packs": PacksConfig(32, 64)}, "packs.tokens"),
        ({"packs": PacksConfig(256, 64, 0)}, "packs.per_step"),
        ({"model": ModelConfig(hidden_size=100)}, "model.hidden_size"),
        ({"optimizer": OptimizerConfig(eps=0)}, "optimizer.eps"),
        ({"init": Path("nowhere")}, "init"),
    ],
)
def test_each_problem_is_found(changed: dict, name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check_config(replace(find_recipe("tiny"), **changed), None, 1)
    assert len(caught.value.problems) == 1
    assert f"`{name}`" in str(caught.value)


def test_wandb_is_accepted_only_if_it_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for spec, refused in ((None, True), (object(), False)):
        monkeypatch.setattr("megamask.config.settings.find_spec", lambda name, spec=spec: spec)
        assert not LogConfig().problems("log")
        problems = LogConfig(wandb="p").problems("log")
        assert ["pip install 'megamask[wandb]'" in problem for problem in problems] == [True] * refused
