"""Phases in files, in flags and under their old names; and what cannot be done with them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamask.config.checks import config_problems, find_problems
from megamask.config.cli import parse_command
from megamask.config.overrides import override_settings
from megamask.config.phase_flags import phase_word, read_phase
from megamask.config.phases import late_phases, most_phase_targets, phase_ends, run_phases, run_tokens
from megamask.config.pretrain_config import PretrainConfig, as_dict, changeable
from megamask.config.settings import MixtureConfig, PacksConfig, PhaseConfig
from megamask.errors import ConfigError
from megamask.masking.settings import MaskingConfig
from megamask.objectives.settings import ObjectiveConfig
from megamask.schedules import Schedule

TOML = """
steps = 1000
packs.length = 512
[[phases]]
until = 0.5
length = 128
per_step = 16
mask_ratio = 0.3
[[phases]]
steps = 400
length = 256
"""
PHASES = (PhaseConfig(until=0.5, length=128, per_step=16, mask_ratio=0.3), PhaseConfig(steps=400, length=256))
LONG = replace(PretrainConfig(), steps=1000, packs=PacksConfig(tokens=8192, length=512), phases=PHASES)


def test_files_flags_and_records_give_the_same_phases(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(TOML)
    words = ["until=0.5,length=128,per_step=16,mask_ratio=0.3", "steps=400,length=256"]
    read = parse_command(["--config", str(file)]).run
    assert read.phases == parse_command(["--steps", "1000", "--packs.tokens", "8192", "--phases", *words]).run.phases
    assert read.phases == PHASES == override_settings(PretrainConfig(), as_dict(read), "config.json").phases
    # a record has only what a phase names, so it does not change when phases get more settings
    assert as_dict(read)["phases"] == [
        {"until": 0.5, "length": 128, "per_step": 16, "mask_ratio": 0.3},
        {"steps": 400, "length": 256},
    ]
    assert changeable(read)["phases"] == as_dict(read)["phases"]
    assert parse_command(["--config", str(file), "--phases"]).run.phases == ()


@given(
    st.fixed_dictionaries(
        {
            "until": st.none() | st.floats(0, 1, exclude_min=True, exclude_max=True),
            "steps": st.none() | st.integers(1, 10**9),
            "length": st.none() | st.integers(8, 10**6),
            "shares": st.none() | st.lists(st.floats(0, 1e6), max_size=3).map(tuple),
            "alpha": st.none() | st.floats(0, 1),
        }
    )
)
def test_a_word_gives_back_its_phase(settings: dict[str, Any]) -> None:
    phase = PhaseConfig(**settings)  # not in the strategy: the check of types uses Python's random numbers
    assert read_phase(phase_word(vars(phase))) == phase


@pytest.mark.parametrize(
    ("word", "sentence"),
    [
        ("until=0.5,lenght=128", "`lenght` is not known in `phases` (until=0.5,lenght=128). Did you mean `length`?"),
        ("until=1.5", "`phases` (until=1.5): `until` must lie in (0, 1), but is 1.5."),
        ("steps=2.5", "must be a whole number or null, but is 2.5."),
        ("length", "`phases` must contain names with their values"),
        ("until=2020-01-01", "`phases` must contain names with their values"),
        ("shares=[nan]", "be finite"),
    ],
)
def test_what_is_wrong_in_a_flag_is_said_with_all_other_problems(word: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_command(["--phases", word, "--optimizer.rate", "1"])
    text = str(caught.value)
    assert sentence in text and "`optimizer.rate` is called" in text


def test_what_is_wrong_in_a_file_is_said_with_its_place() -> None:
    values = {"phases": [{"until": 0.5}, {"until": 3, "lenght": 7, "length": "long"}]}
    with pytest.raises(ConfigError) as caught:
        override_settings(PretrainConfig(), values, "run.toml")
    text = str(caught.value)
    assert "`phases.1.until` in `run.toml` must lie in (0, 1), but is 3." in text
    assert "`phases.1.length` in `run.toml` must be a whole number or null" in text
    assert "`lenght` is not known in `phases.1` in `run.toml`. Did you mean `length`?" in text


@pytest.mark.parametrize("table", [True, False])
def test_a_length_and_steps_of_the_beginning_are_a_phase(table: bool) -> None:
    old = {"start_length": 128, "start_steps": 900}
    values = {"packs": old | {"length": 512}} if table else {f"packs.{name}": value for name, value in old.items()}
    if table:
        config = override_settings(PretrainConfig(), values, "config.json")
        assert config.phases == (PhaseConfig(steps=900, length=128),) and config.packs.length == 512
        without = override_settings(PretrainConfig(), {"packs": dict.fromkeys(old)}, "config.json")
        assert without == PretrainConfig()
    with pytest.raises(ConfigError, match=r"`packs.start_steps` is part of a phase now: --phases steps=N,length=L\."):
        parse_command(["--packs.start-length", "128", "--packs.start-steps", "900"])


def test_steps_and_tokens_are_those_of_the_phases() -> None:
    phases = run_phases(LONG)
    assert phase_ends(LONG) == phases.first_steps[1:] == [500, 900]
    assert [(phase.per_step, phase.length) for phase in phases.phases] == [(16, 128), (8, 256), (8, 512)]
    assert run_tokens(LONG) == (500 * 16 + 500 * 8) * 8192
    assert most_phase_targets(LONG) == round(0.3 * 8192)
    assert late_phases(LONG) == {}
    # a short run keeps those that it reaches
    short = replace(LONG, steps=1)
    assert "must each have a step and end before `steps` (1)" in late_phases(short)["phases"]
    assert [phase.first_step for phase in run_phases(short).phases] == [0, 400]


def problems_of(config: PretrainConfig) -> str:
    return " ".join(config_problems(config))


@pytest.mark.parametrize(
    ("phases", "sentence"),
    [
        ((PhaseConfig(length=128),), "`phases.0` must have either `until` or `steps`"),
        ((PhaseConfig(until=0.5, steps=3, length=128),), "`phases.0` must have either `until` or `steps`"),
        (
            (PhaseConfig(until=0.5, length=64), PhaseConfig(until=0.5, length=128)),
            "`phases.1.until` must be above `phases.0.until` (0.5), but is 0.5.",
        ),
        ((PhaseConfig(until=0.5),), "`phases.0` has no effect: the rest of the run has the same settings."),
        ((PhaseConfig(until=0.5, length=512),), "`phases.0` has no effect"),
        ((PhaseConfig(until=0.5, mask_ratio=0.3),), "`phases.0` has no effect"),
        (
            (PhaseConfig(until=0.2, length=64), PhaseConfig(until=0.5, length=64)),
            "`phases.0` has no effect: `phases.1` has the same settings.",
        ),
        (
            (PhaseConfig(until=0.5, length=9000),),
            "`phases.0.length` must be at most `packs.tokens` (8192), but is 9000.",
        ),
        (
            (PhaseConfig(until=0.5, shares=(1.0, 2.0)),),
            "`phases.0.shares` has no effect with a single folder in `data`.",
        ),
        ((PhaseConfig(until=0.5, alpha=0.3),), "`phases.0.alpha` has no effect with a single folder in `data`."),
        ((PhaseConfig(until=2.0, length=128),), "`phases.0.until` must lie in (0, 1), but is 2.0."),
    ],
)
def test_phases_that_do_not_fit_are_refused(phases: tuple[PhaseConfig, ...], sentence: str) -> None:
    config = replace(LONG, phases=phases, masking=MaskingConfig(Schedule(start=0.3)))
    assert sentence in problems_of(config)


def test_a_pause_between_two_phases_is_a_phase() -> None:
    phases = (PhaseConfig(until=0.2, length=64), PhaseConfig(until=0.8), PhaseConfig(until=0.9, length=64))
    assert config_problems(replace(LONG, phases=phases)) == []


def test_shares_of_a_phase_are_those_of_a_mixture(tmp_path: Path) -> None:
    folders = (tmp_path / "a", tmp_path / "b")
    for folder in folders:
        folder.mkdir()
    mixed = replace(LONG, data=folders, mixture=MixtureConfig(shares=(1.0, 3.0)))

    def problems(mixture: MixtureConfig = mixed.mixture, **phase: object) -> str:
        return problems_of(replace(mixed, mixture=mixture, phases=(PhaseConfig(until=0.5, **phase),)))  # type: ignore[arg-type]

    assert problems(shares=(1.0, 1.0)) == problems(alpha=0.3) == ""
    assert "`phases.0` has no effect" in problems(shares=(2.0, 6.0))
    assert "`phases.0.shares` must have a share for each of the 2 folders" in problems(shares=(1.0,))
    assert "`phases.0.shares` must have a sum above 0" in problems(shares=(0.0, 0.0))
    assert "`phases.0.alpha` has no effect with `phases.0.shares`" in problems(shares=(1.0, 1.0), alpha=0.5)
    moving = MixtureConfig(alpha=1.0, alpha_end=0.3)
    assert "`mixture.alpha_end` moves over the whole run, but `phases.0.alpha`" in problems(moving, alpha=0.5)


def test_what_must_be_known_before_the_run_is_refused(tmp_path: Path) -> None:
    timed = problems_of(replace(LONG, time_budget="2h"))
    assert "`phases.0.until` is a share of the steps, but `time_budget` ends the run by the clock." in timed
    assert "phases.1" not in timed
    stored = replace(LONG, distill=replace(LONG.distill, stored=tmp_path))
    assert "`phases` has no masks for `distill.stored`" in problems_of(stored)
    sidecar = replace(LONG, entropy=replace(LONG.entropy, source="sidecar"))
    assert "`phases` has sequences of several lengths, but `entropy.source` 'sidecar'" in problems_of(sidecar)


def test_every_phase_is_shared_evenly_by_the_ranks() -> None:
    phases = (PhaseConfig(until=0.3, per_step=6), PhaseConfig(until=0.6, per_step=12))
    config = replace(LONG, packs=replace(LONG.packs, per_step=8), phases=phases)
    for world in (1, 2):
        assert find_problems(config, None, world)[1] == []
    (problem,) = find_problems(config, None, 4)[1]
    assert "`phases.0.per_step` must be a multiple of the number of ranks (4), but is 6." in problem
    assert "a number of ranks that fits (1, 2)" in problem
    several = replace(config, packs=replace(config.packs, masks_per_text=4))
    assert any(
        "divide `phases.0.per_step` (6) evenly among the ranks (1)" in p for p in find_problems(several, None, 1)[1]
    )


def test_objectives_with_late_masks_fit_every_phase() -> None:
    objective = ObjectiveConfig("three_ml", depth=1)
    phases = (PhaseConfig(until=0.5, length=8, mask_ratio=0.9), PhaseConfig(until=0.8, length=16, mask_ratio=0.02))
    text = problems_of(replace(LONG, objective=objective, phases=phases))
    assert "`phases.0.mask_ratio` must leave a token visible in a sequence of `phases.0.length` (8) tokens" in text
    assert "`phases.1.mask_ratio` must give a sequence of `phases.1.length` (16) tokens a target" in text
