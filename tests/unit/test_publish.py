"""A checkpoint becomes visible whole or not at all, and the older ones stay."""

from __future__ import annotations

import errno

import pytest
import torch

from megamask import files
from megamask.checkpoint import RunFolder, read_weights, verify
from megamask.errors import ConfigError, LockError, StorageError
from megamask.publish import publish

OPERATIONS = ["write", "make", "rename", "sync"]


def weights(step: int) -> dict[str, torch.Tensor]:
    return {"weights/a": torch.full((5,), float(step)), "exp_avg/a": torch.full((5,), step / 3)}


def holds(run: RunFolder, step: int) -> bool:
    return torch.equal(read_weights(run.path, step)["a"], weights(step)["weights/a"])


def test_the_newest_stay_counted_as_numbers(run):
    for step in (8, 9, 10, 99, 100):
        line = publish(run, step, weights(step), {}, keep=2)
        assert line.startswith(f"checkpoint {step} durable")
        assert run.latest.read_text() == f"step-{step}\n"
    assert run.steps() == [100, 99]
    assert holds(run, 99) and holds(run, 100)
    assert sorted(p.name for p in run.checkpoints.iterdir()) == ["step-100", "step-99"]


def test_fewer_than_two_are_refused(run):
    with pytest.raises(ConfigError, match="`keep` must be at least 2"):
        publish(run, 1, weights(1), {}, keep=1)


def test_a_damaged_folder_does_not_count_as_kept(run):
    publish(run, 1, weights(1), {}, keep=2)
    publish(run, 2, weights(2), {}, keep=2)
    (run.checkpoint(2) / "state.json").unlink()
    publish(run, 3, weights(3), {}, keep=2)
    assert holds(run, 1) and holds(run, 3)


def test_the_same_step_twice_is_saved_once(run):
    publish(run, 4, weights(4), {})
    before = (run.checkpoint(4) / "MANIFEST.json").stat().st_mtime_ns
    assert "durable already" in publish(run, 4, weights(4), {})
    assert (run.checkpoint(4) / "MANIFEST.json").stat().st_mtime_ns == before


def test_a_leftover_without_manifest_is_set_aside(run):
    run.checkpoint(4).mkdir()
    (run.checkpoint(4) / "rank-00000.safetensors").write_bytes(b"half")
    publish(run, 4, weights(4), {})
    assert holds(run, 4)
    assert [p.read_bytes() for p in run.checkpoints.glob(".bad-step-4-*/*")] == [b"half"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_storage_that_fails_costs_no_older_checkpoint(run, monkeypatch, operation, number):
    """Each operation in turn fails, the first time it is called, the second, and so on until none is left to fail."""
    publish(run, 1, weights(1), {})
    step, failed, act = 2, 0, getattr(files, operation)
    for nth in range(20):
        calls = 0

        def fail(*given, nth=nth):
            nonlocal calls
            calls += 1
            if calls == nth + 1:
                if operation == "write":
                    act(given[0], [b"half"])
                raise OSError(number, "the disk says no", str(given[0]))
            return act(*given)

        monkeypatch.setattr(files, operation, fail)
        try:
            line = publish(run, step, weights(step), {}, keep=2)
        except StorageError as error:
            failed += 1
            assert "the disk says no" in str(error) and "bytes are free" in str(error)
            assert not list(run.checkpoints.glob(".tmp-*"))
            if not run.checkpoint(step).exists():  # else the fault came after the rename and all is there
                assert holds(run, step - 1)
        else:
            assert ("the disk says no" in line) == (calls > nth)  # after the acknowledgement: a remark
        monkeypatch.undo()
        publish(run, step, weights(step), {}, keep=2)  # the next save works
        assert holds(run, step) and holds(run, step - 1)
        step += 1
        if calls <= nth:
            break
    else:
        raise AssertionError("the operation never stopped failing")
    assert failed > 0


def test_a_program_error_is_no_storage_error(run):
    with pytest.raises(RuntimeError, match="Rank 0 could not save checkpoint 1: KeyError"):
        publish(run, 1, {"weights/a": torch.zeros(2, dtype=torch.complex64)}, {})
    assert list(run.checkpoints.iterdir()) == []


def test_a_launch_that_was_taken_over_publishes_nothing(run):
    publish(run, 1, weights(1), {})
    run.lock.write_text('{"launch": "another"}')
    with pytest.raises(LockError, match="taken over by another launch"):
        publish(run, 2, weights(2), {})
    assert [p.name for p in run.checkpoints.iterdir()] == ["step-1"]
    assert verify(run.checkpoint(1)).step == 1
