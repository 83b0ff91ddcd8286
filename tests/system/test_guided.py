"""Runs whose masks follow an entropy, and that learn from a teacher: killed and gone on with, on one rank and two."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch

from megamask.__main__ import main
from megamask.checkpoint.run_folder import RunFolder
from tests.system.commands import TINY, free_port, metrics, run, shell, train, training
from tests.system.test_story import tensors
from tests.tolerances import assert_close

STEPS = 12
ENTROPY = {"masking.score": "entropy", "masking.random_share.start": 0.2, "masking.random_share.end": 0.2}
AUDIT = {"entropy.audit.every": 2}
GUIDES: dict[str, dict[str, object]] = {
    "frequency": {"entropy.source": "frequency"},
    "probe": {"entropy.source": "probe", "optimizer.weight-decay": 0.0} | AUDIT,
    "exact": {"entropy.source": "exact", "entropy.signal": "clean", "masking.unit": "word"},
    "masked": {"entropy.source": "exact", "entropy.num_passes": 2, "packs.masks_per_text": 2, "packs.per-step": 4},
    "average": {"entropy.source": "exact", "entropy.signal": "clean", "entropy.ema_decay": 0.9} | AUDIT,
    "candidates": {"entropy.source": "exact", "entropy.candidates": 2.0, "entropy.num_passes": 2},
    "falls back": {"entropy.source": "frequency", "entropy.audit.fall-back": "probe", "entropy.audit.patience": 1}
    | {"entropy.audit.threshold": 0.99}
    | AUDIT,
}
FIGURES = ("train/loss", "valid/loss", "train/distill", "entropy/mean", "entropy/spread", "audit/gain", "audit/overlap")


def words(settings: dict[str, object]) -> list[str]:
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def guided(guide: str) -> list[str]:
    return words(ENTROPY | GUIDES[guide])


@pytest.fixture(scope="module")
def taught(finished: Path) -> list[str]:
    """Settings of a run that has a finished one as its teacher."""
    settings = {"teacher.path": finished, "teacher.precision": "fp32"}
    settings |= {"distill.weight.kind": "step", "distill.weight.start": 0.0, "distill.weight.end": 0.5}
    settings |= {"distill.weight.at": 0.3, "distill.temperature": 2.0, "entropy.source": "teacher"}
    return words(ENTROPY | settings)


def assert_resumes(data: Path, folder: Path, settings: list[str]) -> Path:
    """A run that lost all after its first checkpoint, but for what it keeps beside, ends as it did before."""
    whole, again = folder / "whole", folder / "again"
    more = {"steps": STEPS, "checkpoint__every": 5, "checkpoint__keep": 9, "validation__every": 4}
    ended = train(data, whole, *settings, **more)
    assert ended.code == 0, ended.err
    shutil.copytree(whole, again)
    kept = RunFolder(again)
    for step in kept.steps():
        if step > 5:
            shutil.rmtree(kept.checkpoint(step))
    ended = train(data, again, *settings, **more)
    assert ended.code == 0, ended.err
    assert f"resuming after step 5 of {STEPS}" in ended.out
    ours, theirs = tensors(again, STEPS), tensors(whole, STEPS)
    assert ours.keys() == theirs.keys()
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []
    assert metrics(again, *FIGURES) == metrics(whole, *FIGURES)
    return whole


def test_a_checkpoint_without_the_state_of_a_source_is_refused(data: Path, finished: Path, tmp_path: Path) -> None:
    ended = train(data, tmp_path / "run", *guided("probe"), "--resume", finished, steps=STEPS)
    assert ended.code == 4, ended.err
    assert "of what a score or an entropy source has learned" in ended.err


@pytest.mark.parametrize("guide", GUIDES)
def test_a_guided_run_resumes_bit_for_bit(guide: str, data: Path, tmp_path: Path) -> None:
    whole = assert_resumes(data, tmp_path, guided(guide))
    figures = metrics(whole, "entropy/spread", "audit/gain")
    assert all((step, "entropy/spread") in figures for step in range(1, STEPS + 1))
    assert ((4, "audit/gain") in figures) == ("entropy.audit.every" in GUIDES[guide])


def test_a_run_with_a_teacher_resumes_and_distils_from_its_phase_on(
    data: Path, taught: list[str], tmp_path: Path
) -> None:
    whole = assert_resumes(data, tmp_path, taught)
    steps = [step for step, _ in metrics(whole, "train/distill")]
    assert steps == [step + 1 for step in range(STEPS) if step / STEPS >= 0.3]


def test_the_next_source_takes_over_and_it_is_logged(data: Path, tmp_path: Path) -> None:
    ended = train(data, tmp_path / "run", *guided("falls back"), steps=STEPS)
    assert "From now on 'probe' is used." in ended.out


@pytest.mark.parametrize(("name", "stage"), [("probe", 3), ("exact", 0), ("teacher", 3)])
def test_two_ranks_are_one(
    name: str, stage: int, data: Path, finished: Path, taught: list[str], tmp_path: Path
) -> None:
    # of a model that has learnt something: at first entropies differ by little more than rounding
    more = {"init": finished, "steps": 4, "optimizer__lr__peak": 1e-4}
    (tmp_path / "zero.json").write_text(json.dumps({"zero_optimization": {"stage": stage}}))
    zero = ["--deepspeed", tmp_path / "zero.json"]
    settings = taught if name == "teacher" else guided(name)
    alone, together = tmp_path / "alone", tmp_path / "together"
    ended = train(data, alone, *settings, *zero, **more)
    assert ended.code == 0, ended.err
    command = ["torchrun", "--nproc_per_node", 2, "--master-port", free_port(), "--rdzv-backend", "static"]
    ended = shell(*command, "megamask/pretrain.py", *training(data, together, **more), *settings, *zero)
    assert ended.code == 0, ended.out + ended.err
    actual, expected = metrics(together, *FIGURES), metrics(alone, *FIGURES)
    assert actual.keys() == expected.keys()
    for key, value in expected.items():
        assert_close(torch.tensor(actual[key]), torch.tensor(value))


def test_help_names_every_source() -> None:
    output = shell(sys.executable, "megamask/pretrain.py", "--help").out
    assert all(source in output for source in ("frequency", "probe", "sidecar", "exact", "teacher"))


# ---- what was written down once


def test_a_run_by_a_sidecar_resumes_bit_for_bit(data: Path, finished: Path, tmp_path: Path) -> None:
    shards = shutil.copytree(data, tmp_path / "shards", ignore=shutil.ignore_patterns("packs"))
    # a young model is equally unsure of every token, but not equally wrong
    length = TINY["packs.length"]
    ended = run(
        main, "annotate", "entropy", "--data", shards, "--teacher", finished, "--length", length, "--num-passes", 2,
        "--measure", "loss", "--workers", 1,
    )  # fmt: skip
    assert ended.code == 0, ended.err
    flags = "--entropy.source sidecar --entropy.signal masked --entropy.measure loss"
    assert f"Train with {flags} --packs.length {length}." in ended.out
    whole = assert_resumes(shards, tmp_path, words(ENTROPY) + flags.split())
    figures = metrics(whole, "entropy/spread")
    assert len(figures) == STEPS
    assert min(figures.values()) > 0


def test_a_run_with_stored_samples_resumes_bit_for_bit_without_a_teacher(
    data: Path, finished: Path, tmp_path: Path
) -> None:
    settings = words({"distill.weight.start": 0.5, "distill.temperature": 2.0})
    teacher, kept = words({"teacher.path": finished, "teacher.precision": "fp32"}), tmp_path / "samples"
    ended = run(
        main, "annotate", "targets", *training(data, tmp_path / "none", steps=STEPS), *settings, *teacher,
        "--distill.stored", kept, "--draws", 200, "--workers", 1,
    )  # fmt: skip
    assert ended.code == 0, ended.err
    whole = assert_resumes(data, tmp_path, [*settings, "--distill.stored", str(kept)])
    ended = train(data, tmp_path / "taught", *settings, *teacher, steps=STEPS, validation__every=4)
    assert ended.code == 0, ended.err
    stored = {step: value for (step, _), value in metrics(whole, "train/distill_sampled").items()}
    by_step = {step: value for (step, _), value in metrics(tmp_path / "taught", "train/distill").items()}
    assert stored.keys() == by_step.keys() == {step + 1 for step in range(STEPS)}
    assert not metrics(whole, "train/distill") and not metrics(tmp_path / "taught", "train/distill_sampled")
    # of samples the log has a cross-entropy, which is the divergence and the teacher's entropy
    assert all(stored[step] > by_step[step] for step in stored)


def test_first_weights_may_be_some_layers_of_a_run(data: Path, finished: Path, tmp_path: Path) -> None:
    still = {"steps": 1, "model__num_layers": 1, "optimizer__lr__peak": 1e-12}
    ended = train(data, tmp_path / "run", "--init-layers", "0", init=finished, **still)
    assert ended.code == 0, ended.err
    ours, theirs = tensors(tmp_path / "run", 1), tensors(finished, STEPS)
    kept = {name for name in theirs if name.startswith("weights/") and ".layers.1." not in name}
    assert kept == {name for name in ours if name.startswith("weights/")}
    for name in kept:
        assert_close(ours[name], theirs[name])
