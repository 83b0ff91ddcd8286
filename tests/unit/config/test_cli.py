"""The command line: a recipe, then a file, then flags, and later ones win."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import pytest

from megamask.config.cli import parse_command, parse_target_annotation, show_config, show_recipes
from megamask.config.recipes import RECIPES, find_recipe
from megamask.errors import ConfigError


def test_without_any_argument_it_is_the_tiny_recipe() -> None:
    parsed = parse_command([])
    assert (parsed.recipe, parsed.run, parsed.deepspeed, parsed.resume) == ("tiny", find_recipe("tiny"), None, "auto")


@pytest.mark.parametrize("recipe", list(RECIPES)[::11])
def test_a_recipe_by_name_and_from_what_is_shown(recipe: str, tmp_path: Path) -> None:
    """Every recipe is shown and read back in test_config.py; a parse of the command line takes long."""
    parsed = parse_command([f"--recipe={recipe}"])
    assert (parsed.recipe, parsed.run) == (recipe, find_recipe(recipe))
    (tmp_path / "shown.json").write_text(show_config(parsed.run))
    again = parse_command(["--config", str(tmp_path / "shown.json")]).run
    assert again == parsed.run
    assert show_config(again) == show_config(parsed.run)


def test_a_file_wins_over_the_recipe_and_a_flag_over_the_file(tmp_path: Path) -> None:
    file = tmp_path / "some.toml"
    file.write_text("steps = 7\nseed = 8\n")
    parsed = parse_command(["--recipe", "span", "--config", str(file), "--seed", "9", "--data", "somewhere"])
    assert parsed.run == replace(find_recipe("span"), steps=7, seed=9, data=Path("somewhere"))


def test_a_file_may_name_its_recipe_and_the_flag_wins(tmp_path: Path) -> None:
    file = tmp_path / "some.json"
    file.write_text(json.dumps({"recipe": "span", "steps": 7}))
    assert parse_command(["--config", str(file)]).run == replace(find_recipe("span"), steps=7)
    assert parse_command(["--config", str(file)]).recipe == "span"
    assert parse_command(["--config", str(file), "--recipe", "random"]).run == replace(find_recipe("random"), steps=7)
    file.write_text('{"recipe": ["span"]}')
    with pytest.raises(ConfigError, match="is not known in the recipes"):
        parse_command(["--config", str(file)])


def test_dashes_and_underscores_are_alike() -> None:
    assert parse_command(["--packs.per-step", "4"]).run == parse_command(["--packs.per_step", "4"]).run


def test_the_usual_plain_flags() -> None:
    run = ["--output", "out", "--steps", "5", "--seed", "6", "--no-export"]
    parsed = parse_command([*run, "--resume", "must", "--deepspeed", "ds.json", "--list-recipes"])
    assert (parsed.run.output, parsed.run.steps, parsed.run.seed, parsed.run.export) == (Path("out"), 5, 6, False)
    assert (parsed.resume, parsed.deepspeed) == ("must", Path("ds.json"))
    assert (parsed.list_recipes, parsed.print_config) == (True, False)


def test_what_is_shown_is_read_back(tmp_path: Path) -> None:
    config = parse_command(["--recipe", "whole-word", "--masking.ratio.start", "0.25", "--model.num-layers", "3"]).run
    (tmp_path / "shown.json").write_text(show_config(config))
    assert parse_command(["--config", str(tmp_path / "shown.json")]).run == config


def test_the_list_covers_exactly_the_recipes() -> None:
    shown = [line.split()[0] for line in show_recipes().splitlines()]
    every = []
    for name in shown:
        # NAME[-a|-b][-c]: each bracket holds what may follow, one of it or nothing
        base, *brackets = name.replace("]", "").split("[")
        endings = [("", *bracket.split("|")) for bracket in brackets]
        every += ["".join((base, *chosen)) for chosen in itertools.product(*endings)]
    assert sorted(every) == sorted(RECIPES)


def test_a_negative_number_of_traced_steps_is_refused() -> None:
    assert parse_command(["--profile", "10"]).profile == 10
    with pytest.raises(ConfigError, match="`profile` must be 0 or more, but is -1"):
        parse_command(["--profile", "-1"])


def test_an_audit_that_never_comes_is_refused_where_it_was_typed() -> None:
    guided = ["--recipe", "entropy-self-probe-tiny"]
    assert parse_command(guided).notes == ()
    (note,) = parse_command([*guided, "--steps", "40"]).notes
    assert note == "`entropy.audit.every` must be less than `steps` (40), or there is no audit, but is 50."
    with pytest.raises(ConfigError, match=r"^`entropy.audit.every` must be less than `steps` \(150\)"):
        parse_command([*guided, "--entropy.audit.every", "150"])
    assert parse_command([*guided, "--entropy.audit.every", "149"]).run.entropy.audit.every == 149


def test_saving_in_the_background_is_refused_where_no_checkpoint_is_saved_so() -> None:
    words = ["--checkpoint.background", "--steps", "100", "--checkpoint.every"]
    assert parse_command([*words, "99"]).run.checkpoint.background
    with pytest.raises(ConfigError, match=r"^`checkpoint.background` has no effect while `checkpoint.every` \(100\)"):
        parse_command([*words, "100"])


def test_problems_of_flags_file_and_deepspeed_are_reported_together(tmp_path: Path) -> None:
    file = tmp_path / "some.toml"
    file.write_text("steps = 'many'\noptimizer.rate.peak = 'x'\noptimizer.clip = -1\n")
    with pytest.raises(ConfigError) as caught:
        parse_command(["--config", str(file), "--recipe", "smal", "--packs.views", "2", "--entropy.source", "cache"])
    for start in (
        "`packs.views` is called `packs.masks_per_text` now.",
        "`entropy.source` must not be 'cache'",
        "`smal` is not known in the recipes. Did you mean `small`?",
        f"`steps` in `{file}` must be a whole number, but is 'many'.",
        f"`optimizer.rate.peak` (now `optimizer.lr.peak`) in `{file}` must be a number, but is 'x'.",
        f"`optimizer.clip` (now `optimizer.max_grad_norm`) in `{file}` must be 0 or more, but is -1.",
    ):
        assert any(problem.startswith(start) for problem in caught.value.problems), start
    assert len(caught.value.problems) == 6
    with pytest.raises(ConfigError) as caught:
        parse_command(["--entropy.audit.fall-back=cache", "--steps", "0", "--deepspeed", "zeroo2", "--profile", "-1"])
    starts = ("`entropy.audit.fall_back` must not", "`profile` must", "The DeepSpeed file `zeroo2`", "`steps` must")
    assert len(caught.value.problems) == len(starts)
    assert all(any(problem.startswith(start) for problem in caught.value.problems) for start in starts)


def test_an_error_of_the_parser_does_not_hide_other_problems(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError, match=r"^`entropy.source` must not be 'cache'"):
        parse_command(["--entropy.source", "cache", "--masking.score", "unifrm"])
    assert "unifrm" in capsys.readouterr().err


def test_stored_samples_take_the_flags_of_the_configuration() -> None:
    flags = ["--recipe", "span", "--steps", "9"]
    command = parse_target_annotation([*flags, "--draws", "3", "--packs", "5"])
    assert command.run == parse_command(flags).run
    assert (command.samples.draws, command.samples.packs) == (3, 5)
    with pytest.raises(ConfigError) as caught:
        parse_target_annotation(["--draws", "256", "--optimizer.rate.peak", "1"])
    assert len(caught.value.problems) == 2


def test_help_names_the_other_setting(capsys: pytest.CaptureFixture[str]) -> None:
    for parse, own in ((parse_command, "--print-config"), (parse_target_annotation, "--draws")):
        with pytest.raises(SystemExit):
            parse(["--help"])
        shown = " ".join(capsys.readouterr().out.replace("│", " ").split())
        assert own in shown and "must be at least 1; only with `entropy.source`; default: 4" in shown
        assert "only for `kind` 'ramp'" in shown  # schedules are sections of several settings
        assert "The file may name the recipe too. (default: None)" in shown
