"""What follows upon bad input: what was there is not lost, and what was mended goes on. Its list is the catalogue."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megamask import pretrain
from megamask.__main__ import main
from megamask.checkpoint import save
from megamask.checkpoint.format import read_tensors
from megamask.checkpoint.run_folder import RunFolder
from megamask.config import cli
from megamask.hf import weights
from megamask.metrics.logger import SummaryWriter
from megamask.objectives.mlm import MLM
from megamask.storage import atomic_write
from tests.system.commands import Ended, content, metrics, run, train, training
from tests.system.conftest import STEPS

CONFIG, DATA, NUMBERS, STORAGE = 2, 3, 5, 7


def said(ended: Ended, code: int, *culprits: str) -> None:
    """It ended with ``code``, and the sentence names every culprit."""
    output = " ".join((ended.out + ended.err).replace("│", " ").split())  # the parser draws boxes and breaks lines
    assert ended.code == code, output
    assert "Traceback" not in output
    for culprit in culprits:
        assert culprit in output


# ---- settings


def test_all_problems_are_reported_at_once(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    (tmp_path / "wrong.json").write_text('{"train_batch_size": 8, "zero_optimization": {"stage": 2}, "bf17": {}}')
    wrong = {
        "steps": 0,
        "packs__per_step": 3,
        "packs__length": 2048,
        "packs__tokens": 4096,
        "model__dropout": 1.5,
        "masking__ratio__start": 1.5,
        "optimizer__kind": "lamb",
        "optimizer__lr__peak": 0,
        "validation__every": 0,
        "checkpoint__keep": 1,
        "log__every": 0,
    }
    ended = train(data, tmp_path / "run", "--deepspeed", tmp_path / "wrong.json", **wrong)
    names = [f"`{name.replace('__', '.')}`" for name in wrong if name != "packs__tokens"]
    said(ended, CONFIG, *names, "`train_batch_size`", "`bf17`", "use 4")
    assert len(ended.err.splitlines()) == len(names) + 2
    assert not (tmp_path / "run").exists()


def test_print_config_prints_what_can_run_and_refuses_the_rest() -> None:
    refused = run(pretrain.main, "--print-config", "--packs.tokens", 0, "--seed", -1)
    assert (refused.code, refused.out) == (2, "")
    assert "`packs.tokens`" in refused.err and "`seed`" in refused.err
    shown = run(pretrain.main, "--print-config", "--recipe", "small", "--optimizer.kind", "adamw")
    assert shown.code == 0 and json.loads(shown.out)["optimizer"]["kind"] == "adamw"
    assert shown.err.startswith("`optimizer.muon_lr_scale` 10.0 of the recipe 'small' is left out")


def test_what_a_run_or_print_config_wrote_is_read_back(finished: Path, data: Path) -> None:
    again = cli.parse_command(["--config", str(finished / "config.json")])
    command = cli.parse_command(training(data, finished, steps=STEPS, checkpoint__every=4, validation__every=4))
    assert again.run == command.run
    assert again.recipe == command.recipe
    shown = run(pretrain.main, *training(data, finished, steps=STEPS), "--recipe", "span", "--print-config")
    (finished.parent / "shown.json").write_text(shown.out)
    assert run(pretrain.main, "--config", finished.parent / "shown.json", "--print-config").out == shown.out


def test_a_run_resumes_with_its_own_config_file(copy: Path) -> None:
    ended = run(pretrain.main, "--config", copy / "config.json", "--output", copy, "--resume", "must")
    assert ended.code == 0, ended.err
    assert f"resuming after step {STEPS}" in ended.out


# ---- text


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_text_that_may_not_be_read(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("text")
    (tmp_path / "secret.txt").chmod(0)
    ended = run(main, "prepare", "--input", tmp_path / "secret.txt", "--output", tmp_path / "data")
    said(ended, DATA, "secret.txt cannot be read: Permission denied")


# ---- teachers


def test_a_refused_teacher_leaves_nothing_that_a_sound_one_would_stumble_over(
    data: Path, finished: Path, tmp_path: Path
) -> None:
    spoilt = Path(shutil.copytree(finished, tmp_path / "spoilt"))
    (spoilt / "tokenizer" / "tokenizer.json").unlink()
    for teacher, code in ((spoilt, DATA), (finished, 0)):
        said(train(data, tmp_path / "run", "--teacher.path", teacher, "--distill.weight.start", 0.5), code)


# ---- run folders and checkpoints


def resumed(copy: Path, data: Path, *arguments: object, **more: object) -> Ended:
    same = {"steps": STEPS, "checkpoint__every": 4, "validation__every": 4}
    return train(data, copy, *arguments, **(same | more))


def test_going_back_to_an_older_checkpoint(copy: Path, data: Path, finished: Path) -> None:
    ended = resumed(copy, data, "--resume", RunFolder(copy).checkpoint(4))
    said(ended, 0, "resuming after step 4", "step-12 is newer than the start and was renamed")
    tensors, expected = (dict(read_tensors(RunFolder(run).checkpoint(STEPS))) for run in (copy, finished))
    assert all(torch.equal(tensors[name], expected[name]) for name in expected)
    assert metrics(copy) == metrics(finished)


# ---- storage


def full_disk(monkeypatch: pytest.MonkeyPatch, steps: set[int]) -> None:
    """Let the disk be full whenever the checkpoint of one of ``steps`` is written."""
    write = atomic_write.write_file

    def failing(path, chunks):
        if any(path.parent.name.startswith(f".tmp-step-{step}-") for step in steps):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
        return write(path, chunks)

    monkeypatch.setattr(save.atomic_write, "write_file", failing)


def test_a_full_disk_does_not_stop_training(
    data: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_disk(monkeypatch, {8})
    ended = resumed(tmp_path / "run", data)
    said(ended, 0, "could not save checkpoint 8: No space left on device", "Training continues")
    assert RunFolder(tmp_path / "run").steps() == [12, 4]
    assert metrics(tmp_path / "run") == metrics(finished)


@pytest.mark.parametrize(
    ("full", "kept"), [({6, 8, 10}, [4, 2]), ({12}, [10, 8, 6])], ids=["thrice in a row", "the last"]
)
def test_a_disk_that_stays_full(
    full: set[int], kept: list[int], data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_disk(monkeypatch, full)
    ended = resumed(tmp_path / "run", data, checkpoint__every=2)
    said(ended, STORAGE, f"could not save checkpoint {max(full)}: No space left on device")
    assert RunFolder(tmp_path / "run").steps() == kept
    monkeypatch.undo()
    said(resumed(tmp_path / "run", data, checkpoint__every=2), 0, f"resuming after step {kept[0]}")


def test_figures_that_cannot_be_written_do_not_stop_training(
    data: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = SummaryWriter.add_scalar

    def failing(self, name, value, step):
        if step == 6:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        add(self, name, value, step)

    monkeypatch.setattr(SummaryWriter, "add_scalar", failing)
    said(resumed(tmp_path / "run", data), 0, "The metrics of step 6 could not be written: No space left on device.")
    assert metrics(tmp_path / "run") == metrics(finished)


def test_an_export_that_cannot_be_written_leaves_the_older_one(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "exported"
    said(run(main, "export", "--run", finished, "--output", output), 0)
    before = content(tmp_path)

    def failing(*given, **more):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(weights, "save_file", failing)
    ended = run(main, "export", "--run", finished, "--output", output)
    said(ended, STORAGE, f"{output} cannot be written: No space left on device")
    assert content(tmp_path) == before


# ---- numbers that are none


def poison(monkeypatch: pytest.MonkeyPatch, what: str, first: int, last: int) -> None:
    """Let the losses of some steps, from 0, or only their gradients, be NaN."""
    forward = MLM.forward

    def poisoned(self, batch, plan, soft=None):
        losses = forward(self, batch, plan, soft)
        if first <= batch.number / 2 <= last and losses.total.requires_grad:  # two packs a step; not a validation
            if what == "loss":
                return replace(losses, total=losses.total * math.nan)
            losses.total.register_hook(lambda gradient: gradient * math.nan)
        return losses

    monkeypatch.setattr(MLM, "forward", poisoned)


@pytest.mark.parametrize(
    ("what", "ds"),
    [("loss", "zero0"), ("loss", "zero2"), ("loss", "zero3"), ("gradient", "zero0"), ("gradient", "zero2")],
)
def test_nonfinite_weights_are_never_saved(
    what: str, ds: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, what, 5, 99)
    arguments = {"deepspeed": f"ds_configs/{ds}.json", "steps": 12, "checkpoint__every": 5}
    ended = train(data, tmp_path / "run", **arguments)
    said(ended, NUMBERS, "Step 10 was dropped", what, "the last of 5 such steps in a row", "`optimizer.lr.peak`")
    assert RunFolder(tmp_path / "run").steps()[0] == 5
    assert all(torch.isfinite(tensor).all() for _, tensor in read_tensors(RunFolder(tmp_path / "run").checkpoint(5)))
    monkeypatch.undo()
    said(train(data, tmp_path / "run", **arguments), 0, "resuming after step 5")


def test_a_step_that_deepspeed_skips_is_counted(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp32 DeepSpeed skips the step of a gradient with NaN or Inf."""
    poison(monkeypatch, "gradient", 2, 2)
    said(train(data, tmp_path / "run", deepspeed="ds_configs/fp32.json", checkpoint__every=1), 0)
    skipped = metrics(tmp_path / "run", "skipped_steps")
    assert skipped == {(step, "skipped_steps"): float(step == 3) for step in range(1, 5)}
    before, after = (dict(read_tensors(RunFolder(tmp_path / "run").checkpoint(step))) for step in (2, 3))
    assert all(torch.equal(before[name], after[name]) for name in before)
