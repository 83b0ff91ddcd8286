"""A run that commit af542c6 began, under the names that settings had then, goes on and can be exported."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from megamask import pretrain
from megamask.config.cli import parse_command
from megamask.config.pretrain_config import as_dict
from megamask.storage.dotted import names_in
from megamask.training.export import export_checkpoint
from tests.system.commands import Ended, run

OLD_RUN = Path(__file__).parent.parent / "data" / "old_run"
"""Four of eight steps; tests/data/make_old_run.py makes it."""


@pytest.fixture
def old(tmp_path: Path) -> Path:
    return Path(shutil.copytree(OLD_RUN, tmp_path / "old"))


def resume(old: Path, *more: str) -> Ended:
    """Go on with the run by its own config.json."""
    place = ["--data", old / "shards", "--output", old / "run", "--resume", "must"]
    return run(pretrain.main, "--config", old / "run" / "config.json", *place, *more)


def figures(lines: Path, names: tuple[str, ...]) -> dict[tuple[int, str], float]:
    """The figures ``names`` of a metrics.jsonl by step and name."""
    read = map(json.loads, lines.read_text().splitlines())
    return {(line["step"], name): line[name] for line in read for name in names if name in line}


def test_a_run_with_old_names_resumes_as_its_own_commit_did(old: Path) -> None:
    """Not bit for bit: other processors, and a later commit in how it lays out logits, round losses differently.

    The entropies of this run differ by 1e-4 nats. From its second audit on, after step 6, rounding decides which tokens
    are masked: on a Xeon with AMX some are others. From there on, only what does not depend on them is compared, and
    the validation loss, whose masks are fixed, as that of a run with other training masks.
    """
    ended = resume(old)
    assert ended.code == 0, ended.err
    assert "resuming after step 4 of 8" in ended.out and "is called" not in ended.err
    names = ("train/loss", "valid/loss", "grad_norm", "mask_ratio", "lr", "skipped_steps")
    expected = figures(old / "continuation.jsonl", names)
    assert {step for step, _ in expected} == {5, 6, 7, 8}
    resumed = figures(old / "run" / "logs" / "metrics.jsonl", names)
    of_masks = {(step, name) for step in (7, 8) for name in ("train/loss", "grad_norm", "valid/loss")}
    same = {key: value for key, value in expected.items() if key not in of_masks}
    assert {key: resumed[key] for key in same} == pytest.approx(same, rel=1e-5)
    assert resumed[8, "valid/loss"] == pytest.approx(expected[8, "valid/loss"], rel=1e-3)
    recorded = json.loads((old / "run" / "config.json").read_text())
    assert set(names_in(as_dict(parse_command([]).run))) <= set(names_in(recorded))
    assert (old / "run" / "export" / "model.safetensors").is_file()


def test_a_run_with_old_names_is_exported(old: Path, tmp_path: Path) -> None:
    export_checkpoint(old / "run", tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("flag", "value", "name"),
    [
        ("--packs.masks-per-text", "1", "packs.masks_per_text"),
        ("--masking.entropy.skip-top", "0.0", "masking.entropy.skip_top"),
        ("--optimizer.lr.peak", "2e-3", "optimizer.lr.peak"),
    ],
)
def test_another_value_is_refused_by_the_new_name(old: Path, flag: str, value: str, name: str) -> None:
    before = (old / "run" / "config.json").read_text()
    ended = resume(old, flag, value)
    assert ended.code == 2
    refused = [line for line in ended.err.splitlines() if " is " in line and " there." in line]
    assert [line.split("`")[1] for line in refused] == [name]
    assert (old / "run" / "config.json").read_text() == before


def test_a_setting_may_be_changed_by_its_new_name(old: Path) -> None:
    ended = resume(old, "--optimizer.lr.peak", "2e-3", "--change", "optimizer.lr.peak", "--no-export")
    assert ended.code == 0, ended.err
    assert "`optimizer.lr.peak` is 0.002 from step 4 on; it was 0.003." in ended.out
