"""A launch starts from the right checkpoint or is refused with the reason; nothing in the folder is lost."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import subprocess

import pytest
import torch

from megamask.checkpoint import format
from megamask.checkpoint import resume as runs
from megamask.checkpoint.format import read_weights
from megamask.checkpoint.resume import check_space, open_run
from megamask.checkpoint.run_folder import RunFolder
from megamask.checkpoint.save import save_checkpoint
from megamask.errors import CheckpointError, ConfigError, LockError, StorageError
from megamask.storage import lock

CONFIG = {"steps": 100, "model": {"depth": 2, "width": 8}, "log": {"every": 10}, "betas": (0.9, 0.95)}


def fill(path, *steps: int, config: dict = CONFIG) -> RunFolder:
    """A run that saved at ``steps`` and ended."""
    start = open_run(path, config)
    for step in steps:
        save_checkpoint(start.run, step, {"weights/a": torch.full((3,), float(step))}, {"step": step}, keep=10)
    start.close()
    return start.run


def begin(path, **given) -> runs.RunStart:
    start = open_run(path, given.pop("config", CONFIG), **given)
    start.close()
    return start


def damage(run: RunFolder, step: int) -> None:
    file = run.checkpoint(step) / "rank-00000.safetensors"
    whole = bytearray(file.read_bytes())
    whole[-1] ^= 1
    file.write_bytes(whole)


def test_a_new_folder_starts_at_step_0_and_records_the_launch(tmp_path):
    for resume in ("auto", "never"):
        start = begin(tmp_path / resume / "deep", resume=resume)
        assert (start.checkpoint, start.step, start.notes) == (None, 0, ())
        assert json.loads(start.run.config.read_text()) == json.loads(json.dumps(CONFIG))
        (launch,) = json.loads(start.run.environment.read_text())["launches"]
        assert launch["versions"]["torch"] == torch.__version__
        assert os.uname().nodename not in json.dumps(launch["hardware"])
    with pytest.raises(CheckpointError, match="holds no checkpoint, and `resume` is 'must'"):
        begin(tmp_path / "other", resume="must")


@pytest.mark.parametrize("resume", ["auto", "must"])
def test_the_newest_is_resumed(tmp_path, resume):
    run = fill(tmp_path, 9, 10, 100)
    start = begin(tmp_path, resume=resume)
    assert (start.checkpoint, start.step) == (run.checkpoint(100), 100)
    assert len(json.loads(run.environment.read_text())["launches"]) == 2


def test_never_refuses_a_run_that_has_checkpoints(tmp_path):
    fill(tmp_path)
    begin(tmp_path, resume="never")
    fill(tmp_path, 3)
    with pytest.raises(CheckpointError, match="checkpoint of step 3, and `resume` is 'never'"):
        begin(tmp_path, resume="never")


def test_a_damaged_checkpoint_is_renamed_and_the_older_one_used(tmp_path):
    run = fill(tmp_path, 1, 2, 3)
    damage(run, 3)
    bad = (run.checkpoint(3) / "rank-00000.safetensors").read_bytes()
    start = begin(tmp_path)
    assert start.step == 2
    assert "rank-00000.safetensors is damaged" in start.notes[0] and "was renamed to .bad-step-3-" in start.notes[1]
    assert [p.read_bytes() for p in run.checkpoints.glob(".bad-step-3-*/rank*")] == [bad]
    assert begin(tmp_path).notes == ()


@pytest.mark.parametrize("resume", ["auto", "must"])
def test_without_an_intact_checkpoint_every_resume_is_refused(tmp_path, resume):
    run = fill(tmp_path, 1, 2)
    damage(run, 1)
    shutil.rmtree(run.checkpoint(2))
    run.checkpoint(2).mkdir()
    with pytest.raises(CheckpointError, match="no intact checkpoint") as caught:
        begin(tmp_path, resume=resume)
    assert "step-1/rank-00000" in str(caught.value) and "step-2 has no MANIFEST" in str(caught.value)
    with pytest.raises(CheckpointError, match="only damaged ones"):
        begin(tmp_path, resume=resume)


def test_leftovers_never_block(tmp_path):
    run = fill(tmp_path, 1, 2)
    for name in (".tmp-step-3-dead", ".trash-step-1-dead", "step-3", "step-x", "step-07"):
        (run.checkpoints / name).mkdir()
        (run.checkpoints / name / "rank-00000.safetensors").write_bytes(b"half")
    (run.path / ".tmp-latest-1").write_text("")
    (run.path / ".tmp-export-1").mkdir()
    (run.path / ".tmp-export-1" / "model.safetensors").write_bytes(b"half")
    for latest in ("", "step-77\n", None):
        run.latest.unlink() if latest is None else run.latest.write_text(latest)
        assert begin(tmp_path).step == 2
    left = {path.name for path in run.checkpoints.iterdir() if not path.name.startswith(".bad-step-3-")}
    assert left == {"step-1", "step-2", "step-x", "step-07"}
    assert not list(run.path.glob(".tmp-*"))


def test_a_newer_format_is_refused_and_nothing_is_renamed(tmp_path, monkeypatch):
    run = fill(tmp_path, 1)
    monkeypatch.setattr(format, "FORMAT", format.FORMAT + 1)
    start = open_run(tmp_path / "new", CONFIG)
    save_checkpoint(start.run, 2, {}, {})
    start.close()
    monkeypatch.undo()
    shutil.copytree(start.run.checkpoint(2), run.checkpoint(2))
    with pytest.raises(CheckpointError, match="Use a newer megamask"):
        begin(tmp_path)
    assert run.steps() == [2, 1]


def test_another_run_in_the_folder_is_refused_with_each_field(tmp_path):
    fill(tmp_path, 1)
    other = {**CONFIG, "model": {"depth": 3, "heads": 2}, "log": {"every": 1}}
    with pytest.raises(ConfigError) as caught:
        begin(tmp_path, config=other, may_differ=["log", "mod"])
    assert caught.value.problems[1:] == (
        "`model.depth` is 3 here, but 2 there.",
        "`model.heads` is 2 here, but 'absent' there.",
        "`model.width` is 'absent' here, but 8 there.",
    )
    start = begin(tmp_path, config=other, may_differ=["log.every", "model"])
    assert start.step == 1
    assert start.changes == {
        "log.every": [10, 1], "model.depth": [2, 3], "model.heads": ["absent", 2], "model.width": [8, "absent"]
    }  # fmt: skip
    assert json.loads(start.run.environment.read_text())["launches"][-1]["changes"] == start.changes
    assert begin(tmp_path, config=other).changes == {}
    assert json.loads(start.run.config.read_text())["log"] == {"every": 1}


@pytest.mark.parametrize(
    ("before", "now", "sentence"),
    [
        ("old", "new", "`data` is new here, but old there, and the texts differ. Resume with --data old."),
        (None, "new", "`data` is new here, but not given there, and the texts differ. Resume without --data."),
        ("old", "old", "`data` is old as before, but contains another text now."),
    ],
)
def test_another_text_is_reported_by_the_setting_and_both_paths(tmp_path, before, now, sentence):
    run = {**CONFIG, "data": before, "text": "a" * 64}
    fill(tmp_path, 1, config=run)
    with pytest.raises(ConfigError) as caught:
        begin(tmp_path, config={**run, "data": now, "text": "b" * 64, "steps": 7}, may_differ=["data"])
    assert sentence in str(caught.value) and "`steps` is 7 here" in str(caught.value)
    assert "a" * 16 not in str(caught.value) and "b" * 16 not in str(caught.value)


def test_a_run_that_took_no_step_does_not_occupy_its_folder(tmp_path):
    other = {**CONFIG, "steps": 7}
    for name in ("refused", "stopped before its first checkpoint", "with a damaged checkpoint"):
        folder = tmp_path / name
        start = begin(folder)
        (start.run.logs / "metrics.jsonl").write_text('{"step": 0, "valid/loss": 9.0}\n')
        assert begin(folder, config=other).changes == {}
        assert json.loads(start.run.config.read_text())["steps"] == 7
        if name == "refused":
            continue
        if name.startswith("stopped"):
            (start.run.logs / "metrics.jsonl").write_text('{"step": 10, "train/loss": 9.0}\n')
        else:
            (start.run.checkpoints / ".bad-step-1-x").mkdir()
        with pytest.raises(ConfigError, match="holds another run"):
            begin(folder)


def test_a_refused_launch_deletes_only_a_folder_that_it_made(tmp_path):
    fresh = open_run(tmp_path / "deep" / "fresh", CONFIG)
    fresh.delete_new_folder()
    fresh.close()
    assert not fresh.run.path.exists() and (tmp_path / "deep").is_dir()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    for folder in (tmp_path / "mine", fill(tmp_path / "run", 1).path):
        start = open_run(folder, CONFIG)
        start.delete_new_folder()
        start.close()
        assert folder.is_dir()
    assert (tmp_path / "mine" / "notes.txt").is_file() and RunFolder(tmp_path / "run").steps() == [1]


def test_checkpoints_of_an_unknown_run_are_refused(tmp_path):
    run = fill(tmp_path, 1)
    run.config.write_text("{")
    with pytest.raises(ConfigError, match=r"config\.json is damaged"):
        begin(tmp_path)
    run.config.unlink()
    with pytest.raises(ConfigError, match=r"checkpoints but no config\.json"):
        begin(tmp_path)


def test_a_path_starts_a_new_run_from_an_old_one(tmp_path):
    old = fill(tmp_path / "old", 1, 2)
    for name, source, step in (("a", old.path, 2), ("b", old.checkpoint(1), 1)):
        start = begin(tmp_path / name, config={"other": 1}, resume=source)
        assert (start.checkpoint, start.step) == (old.checkpoint(step), step)
    damage(old, 2)
    start = begin(tmp_path / "c", resume=str(old.path))
    assert start.step == 1 and old.steps() == [2, 1]  # what is not ours is not moved
    with pytest.raises(CheckpointError, match="rank-00000"):
        begin(tmp_path / "d", resume=old.checkpoint(2))
    with pytest.raises(CheckpointError, match="`resume` must be"):
        begin(tmp_path / "e", resume="mst")
    fill(tmp_path / "f", 5)
    with pytest.raises(CheckpointError, match="would mix two runs"):
        begin(tmp_path / "f", resume=old.path)


def test_starting_from_an_older_checkpoint_renames_newer_ones(tmp_path):
    run = fill(tmp_path, 1, 2, 3)
    start = begin(tmp_path, resume=run.checkpoint(1))
    assert start.step == 1 and run.steps() == [1] and len(start.notes) == 2
    assert len(list(run.checkpoints.glob(".newer-step-*/MANIFEST.json"))) == 2
    assert begin(tmp_path).step == 1
    assert torch.equal(read_weights(run.path)["a"], torch.ones(3))


def test_a_second_writer_is_refused_and_a_dead_one_does_not_block(tmp_path):
    first = open_run(tmp_path, CONFIG)
    with pytest.raises(LockError, match=f"is being written by process {os.getpid()}"):
        open_run(tmp_path, CONFIG)
    first.close()
    begin(tmp_path)
    process = multiprocessing.get_context("spawn").Process(target=_open_and_die, args=(tmp_path,))
    process.start(), process.join()
    assert process.exitcode == -9
    assert json.loads((tmp_path / "run.lock").read_text())["pid"] == process.pid
    begin(tmp_path)


def _open_and_die(path):
    open_run(path, CONFIG)
    os.kill(os.getpid(), 9)


def test_the_lock_on_a_file_system_without_locks(tmp_path, monkeypatch):
    def no_lock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", no_lock)
    path = tmp_path / "run.lock"
    here = {"launch": "old", "host": lock.socket.gethostname(), "job": ""}
    away = {"launch": "old", "host": "elsewhere", "pid": os.getpid(), "job": "17"}
    gone = subprocess.Popen(["true"])
    gone.wait()
    for owner, job, free in (
        (here | {"pid": gone.pid}, "", True),
        (here | {"pid": os.getpid()}, "", False),
        (away, "", False),
        (away, "18", False),
        (away, "17", True),  # the same Slurm job, requeued: its earlier self is dead
    ):
        monkeypatch.setenv("SLURM_JOB_ID", job)
        path.write_text(json.dumps(owner))
        if free:
            lock.Lock(path, "new").close()
        else:
            with pytest.raises(LockError, match="is being written"):
                lock.Lock(path, "new")


def test_free_space_is_checked_before_training(tmp_path):
    check_space(tmp_path / "new", 1000)
    assert list((tmp_path / "new").iterdir()) == []
    with pytest.raises(StorageError, match=r"bytes free, but 2 checkpoints of 1,000,000,000,000,000,000 bytes need"):
        check_space(tmp_path, 10**18, checkpoints=2)
    (tmp_path / "file").write_text("")
    for act in (lambda path: check_space(path, 1), lambda path: open_run(path, CONFIG)):
        with pytest.raises(StorageError, match="Rank 0 could not"):
            act(tmp_path / "file" / "run")
