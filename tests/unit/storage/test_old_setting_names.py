"""Old names of settings: read under the new ones, in files and in what a checkpoint recorded."""

from __future__ import annotations

from pathlib import Path

import pytest

from megamask.config.cli import parse_command
from megamask.config.pretrain_config import PretrainConfig, as_dict, check_change
from megamask.errors import ConfigError
from megamask.storage.dotted import flatten, names_in
from megamask.storage.old_setting_names import RENAMED, new_name, renamed_problems, with_new_names

SETTINGS = as_dict(PretrainConfig())
NEW = {old: new_name(old) for old in RENAMED}


def with_old_names(settings: dict, section: str = "") -> dict:
    """The opposite of `with_new_names`, by its table read from right to left."""
    names = {new: old for old, new in NEW.items()}
    return {
        names.get(f"{section}{key}", key).rpartition(".")[2]: (
            with_old_names(value, f"{section}{key}.") if isinstance(value, dict) else value
        )
        for key, value in settings.items()
    }


def test_new_names_are_known_and_old_names_are_not() -> None:
    known = set(names_in(SETTINGS))
    assert set(NEW.values()) <= known
    assert not set(RENAMED) & known
    assert all(new_name(name) == name for name in known)


def test_settings_are_read_under_their_new_names() -> None:
    old = with_old_names(SETTINGS)
    assert set(RENAMED) <= set(names_in(old))
    assert with_new_names(old) == SETTINGS == with_new_names(SETTINGS)
    assert with_new_names(flatten(old)) == flatten(SETTINGS)
    assert len(renamed_problems(flatten(old))) == sum(name not in names_in(SETTINGS) for name in flatten(old))


@pytest.mark.parametrize("old", RENAMED)
def test_a_setting_with_both_names_is_refused(old: str) -> None:
    section, dot, last = old.rpartition(".")
    both = [(last, 1), (NEW[old].rpartition(".")[2], 2)]
    for table in (dict(both), dict(both[::-1])):
        with pytest.raises(ConfigError, match="is the old name of a setting that has its new name too"):
            with_new_names(table, section + dot)


def test_a_file_with_old_names_is_read_and_the_new_ones_are_named(tmp_path: Path) -> None:
    file = tmp_path / "some.toml"
    file.write_text("steps = 7\noptimizer.rate.peak = 0.002\n[hang]\nlongest = 8000.0\n")
    command = parse_command(["--config", str(file)])
    assert (command.run.optimizer.lr.peak, command.run.watchdog.rare_timeout, command.run.steps) == (0.002, 8000.0, 7)
    assert command.notes == (
        f"{file}: `hang.longest` is called `watchdog.rare_timeout` now.",
        f"{file}: `optimizer.rate.peak` is called `optimizer.lr.peak` now.",
    )


def test_flags_with_old_names_are_refused_with_the_new_ones() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_command(["--packs.views", "1", "--spikes.broken-in-row=3", "--steps", "5"])
    assert caught.value.problems == (
        "`packs.views` is called `packs.masks_per_text` now.",
        "`spikes.broken_in_row` is called `spikes.max_nonfinite_in_row` now.",
    )
    with pytest.raises(ConfigError, match=r"^`optimizer.rate` is called `optimizer.lr` now\.$"):
        check_change(PretrainConfig(), ["optimizer.rate", "steps"])
