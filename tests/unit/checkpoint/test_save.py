"""A checkpoint becomes visible whole or not at all, and the older ones stay."""

from __future__ import annotations

import errno
import os
import shutil
import time

import pytest
import torch

from megamask.checkpoint import save as publishing
from megamask.checkpoint.format import read_weights, verify
from megamask.checkpoint.run_folder import RunFolder
from megamask.checkpoint.save import CheckpointSave, save_checkpoint
from megamask.errors import ConfigError, LockError, StorageError
from megamask.storage import atomic_write, lock
from megamask.storage.tensor_stream import as_stream

OPERATIONS = ["write_file", "make_folder", "rename", "sync"]


def weights(step: int) -> dict[str, torch.Tensor]:
    return {"weights/a": torch.full((5,), float(step)), "exp_avg/a": torch.full((5,), step / 3)}


def save_in_background(run: RunFolder, step: int, tensors: dict, state: dict, keep: int = 2) -> str:
    """`save_checkpoint` as a training does it that takes steps meanwhile."""
    save = CheckpointSave(run, step, tensors, state, keep, background=True)
    while (line := save.advance()) is None:
        time.sleep(0.001)
    return line


def holds(run: RunFolder, step: int) -> bool:
    return torch.equal(read_weights(run.path, step)["a"], weights(step)["weights/a"])


def test_the_checkpoints_with_the_highest_steps_stay(run):
    for step in (8, 9, 10, 99, 100):
        line = save_checkpoint(run, step, weights(step), {}, keep=2)
        assert line.startswith(f"checkpoint {step} saved")
        assert run.latest.read_text() == f"step-{step}\n"
    assert run.steps() == [100, 99]
    assert holds(run, 99) and holds(run, 100)
    assert sorted(p.name for p in run.checkpoints.iterdir()) == ["step-100", "step-99"]


def retained(run: RunFolder, monkeypatch) -> bool:
    """Whether the two newest are kept when numbers grow longer, the clock goes back and all files are of one time."""
    strange = RunFolder(run.path, run.launch)
    save_checkpoint(strange, 20_000, weights(20_000), {})  # a higher number than this launch will reach
    for number, step in enumerate((9_700, 9_800, 9_900, 10_000, 10_100)):
        monkeypatch.setattr(time, "time", lambda number=number: 1e9 - 1e6 * number)
        save_checkpoint(run, step, weights(step), {}, keep=2)
        for each in run.steps():
            os.utime(run.checkpoint(each), (1, 1) if number % 2 else (10**9 - each, 10**9 - each))
        kept = [9_700, 9_800, 9_900, 10_000, 10_100][max(0, number - 1) : number + 1]
        if not all(run.checkpoint(each).is_dir() and holds(run, each) for each in kept):
            return False
    return run.steps() == [20_000, 10_100, 10_000]


def test_clocks_and_foreign_folders_do_not_change_what_stays(run, monkeypatch):
    assert retained(run, monkeypatch)


def _by_text(run):
    return sorted(run_steps(run), key=str, reverse=True)


def _by_time(run):
    return sorted(run_steps(run), key=lambda step: run.checkpoint(step).stat().st_mtime, reverse=True)


run_steps = RunFolder.steps


@pytest.mark.parametrize("order", [_by_text, _by_time])
def test_another_order_would_delete_the_wrong_checkpoints(run, monkeypatch, order):
    monkeypatch.setattr(RunFolder, "steps", order)
    assert not retained(run, monkeypatch)


def test_a_save_succeeds_over_leftovers_of_itself(run):
    save_checkpoint(run, 1, weights(1), {})
    save_checkpoint(run, 2, weights(2), {})
    for name in (f".tmp-step-3-{run.launch}", f".trash-step-1-{run.launch}", "step-3"):
        (run.checkpoints / name).mkdir()
        (run.checkpoints / name / "rank-00000.safetensors").write_bytes(b"half")
    shutil.copy(run.checkpoint(2) / "MANIFEST.json", run.checkpoint(3))  # without the files that it names
    run.checkpoint(1).chmod(0o555)
    run.latest.write_text("")
    save_checkpoint(run, 3, weights(3), {}, keep=2)
    assert holds(run, 3) and holds(run, 2)
    save_checkpoint(run, 4, weights(4), {}, keep=2)
    assert run.steps() == [4, 3]


def test_a_lock_that_cannot_be_read_is_kept(run, monkeypatch):
    def stale(*_):
        raise OSError(errno.ESTALE, "Stale file handle")

    save_checkpoint(run, 1, weights(1), {})
    monkeypatch.setattr(lock, "names_launch", stale)
    with pytest.raises(StorageError, match="Stale file handle"):
        save_checkpoint(run, 2, weights(2), {})
    monkeypatch.undo()
    save_checkpoint(run, 2, weights(2), {})
    run.lock.unlink()
    with pytest.raises(LockError, match="Another launch took over"):
        save_checkpoint(run, 3, weights(3), {})
    assert run.steps() == [2, 1]


def test_keeping_fewer_than_two_is_refused(run):
    with pytest.raises(ConfigError, match="`keep` must be at least 2"):
        save_checkpoint(run, 1, weights(1), {}, keep=1)


def test_a_damaged_folder_does_not_count_as_kept(run):
    save_checkpoint(run, 1, weights(1), {}, keep=2)
    save_checkpoint(run, 2, weights(2), {}, keep=2)
    (run.checkpoint(2) / "state.json").unlink()
    save_checkpoint(run, 3, weights(3), {}, keep=2)
    assert holds(run, 1) and holds(run, 3)


@pytest.mark.parametrize("save", [save_checkpoint, save_in_background])
def test_the_same_step_twice_is_saved_once(run, save):
    save_checkpoint(run, 4, weights(4), {})
    before = (run.checkpoint(4) / "MANIFEST.json").stat().st_mtime_ns
    assert "saved already" in save(run, 4, weights(4), {})
    assert (run.checkpoint(4) / "MANIFEST.json").stat().st_mtime_ns == before


def test_a_rank_without_tensors_writes_no_file(tmp_path, monkeypatch):
    """Of a thousand ranks most have none."""
    monkeypatch.setenv("RANK", "70")
    monkeypatch.setenv("WORLD_SIZE", "1000")
    assert publishing._write_share(tmp_path / "not seen yet", as_stream({}), b"{}") == ({}, [])
    files, names = publishing._write_share(tmp_path, as_stream(weights(1)), b"{}")
    assert [*files] == ["rank-00070.safetensors"] and names == [*weights(1)]


def test_a_leftover_without_manifest_is_renamed(run):
    run.checkpoint(4).mkdir()
    (run.checkpoint(4) / "rank-00000.safetensors").write_bytes(b"half")
    save_checkpoint(run, 4, weights(4), {})
    assert holds(run, 4)
    assert [p.read_bytes() for p in run.checkpoints.glob(".bad-step-4-*/*")] == [b"half"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("save", [save_checkpoint, save_in_background])
def test_a_storage_error_keeps_the_older_checkpoints(run, monkeypatch, save, operation, number):
    """Each operation in turn fails, the first time it is called, the second, and so on until none is left to fail."""
    save_checkpoint(run, 1, weights(1), {})
    step, failed, act = 2, 0, getattr(atomic_write, operation)
    for nth in range(20):
        calls = 0

        def fail(*given, nth=nth):
            nonlocal calls
            calls += 1
            if calls == nth + 1:
                if operation == "write_file":
                    act(given[0], [b"half"])
                raise OSError(number, "the disk says no", str(given[0]))
            return act(*given)

        monkeypatch.setattr(atomic_write, operation, fail)
        try:
            line = save(run, step, weights(step), {}, keep=2)
        except StorageError as error:
            failed += 1
            assert "the disk says no" in str(error) and "bytes are free" in str(error)
            assert not list(run.checkpoints.glob(".tmp-*"))
            if not run.checkpoint(step).exists():  # else the fault came after the rename and all is there
                assert holds(run, step - 1)
        else:
            assert ("the disk says no" in line) == (calls > nth)  # after the acknowledgement: a remark
        monkeypatch.undo()
        save_checkpoint(run, step, weights(step), {}, keep=2)  # the next save works
        assert holds(run, step) and holds(run, step - 1)
        step += 1
        if calls <= nth:
            break
    else:
        raise AssertionError("the operation never stopped failing")
    assert failed > 0


@pytest.mark.parametrize("save", [save_checkpoint, save_in_background])
def test_a_program_error_is_not_a_storage_error(run, save):
    with pytest.raises(RuntimeError, match="Rank 0 could not save checkpoint 1: KeyError"):
        save(run, 1, {"weights/a": torch.zeros(2, dtype=torch.complex64)}, {})
    assert list(run.checkpoints.iterdir()) == []


@pytest.mark.parametrize("save", [save_checkpoint, save_in_background])
def test_a_launch_that_lost_the_lock_saves_nothing(run, save):
    save_checkpoint(run, 1, weights(1), {})
    run.lock.write_text('{"launch": "another"}')
    with pytest.raises(LockError, match="Another launch took over"):
        save(run, 2, weights(2), {})
    assert [p.name for p in run.checkpoints.iterdir()] == ["step-1"]
    assert verify(run.checkpoint(1)).step == 1


def test_a_launch_that_loses_the_lock_while_it_writes_publishes_nothing(run):
    save = CheckpointSave(run, 1, weights(1), {}, background=True)
    run.lock.write_text('{"launch": "another"}')
    for leftover in run.checkpoints.iterdir():
        shutil.rmtree(leftover, ignore_errors=True)  # as a launch that takes over does
    with pytest.raises(LockError, match="Another launch took over"):
        save.finish()
    assert run.steps() == []
