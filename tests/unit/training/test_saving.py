"""A save that fails fails for all ranks, training continues while older checkpoints exist, and while one is written."""

from __future__ import annotations

import errno
import os
import threading
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megamask.checkpoint.format import read_state, read_tensors, verify
from megamask.checkpoint.run_folder import RunFolder
from megamask.config.pretrain_config import PretrainConfig
from megamask.config.settings import CheckpointConfig
from megamask.errors import NonFiniteError, StorageError
from megamask.health.loss_spikes import SpikePolicy
from megamask.health.settings import SpikesConfig
from megamask.runtime import ranks
from megamask.storage import atomic_write
from megamask.storage.tensor_stream import TensorStream
from megamask.training.components import RunComponents
from megamask.training.progress import Progress
from megamask.training.saving import RunSaver
from tests.processes.forked import Tell, fork
from tests.unit.training.stand_ins import bare

BACKGROUND = CheckpointConfig(background=True)


def fails(*_: object) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def stream_of_ranks(learned: dict[str, torch.Tensor]) -> TensorStream:
    """A tensor of each rank, for all of which the ranks wait for each other."""
    gathers = [(f"weights/{rank}", lambda: torch.tensor(ranks.gather([1.0] * 5)[0])) for rank in range(ranks.world())]
    own = {f"weights/{ranks.rank()}": torch.empty(5, device="meta")}
    return TensorStream(own, [[gather] for gather in gathers], learned)


def components(folder: RunFolder, lines: list[str]) -> RunComponents:
    """What a save uses of a run. What its probe has learned is a tensor that training changes in place."""
    config, seen = PretrainConfig(), torch.zeros(9, dtype=torch.uint8)
    learner = SimpleNamespace(state_dict=lambda: {"seen": seen})
    counted = {"tokens": 0}
    return bare(
        RunComponents, config=config, folder=folder, teacher=None, progress=Progress(config.steps),
        log=SimpleNamespace(say=lines.append), flops=SimpleNamespace(state=lambda: counted),
        engine=SimpleNamespace(
            check_replicas=lambda: None,
            owned_tensors=lambda: {f"weights/{ranks.rank()}": torch.ones(5)},
            stream_tensors=stream_of_ranks,
            steps=1,
            stage=0,
            precision="fp32",
        ),
        trainer=SimpleNamespace(
            policy=SpikePolicy(SpikesConfig()), meters=SimpleNamespace(paused=nullcontext),
            masker=SimpleNamespace(budget=lambda *_: 1), learners=lambda: {"guidance/probe/": learner},
        ),
    )  # fmt: skip


def saves(folder: Path, act) -> list[int]:
    """The exit codes of two ranks that save as ``act`` does."""

    def be(tell: Tell) -> None:
        lines: list[str] = []
        act(components(RunFolder(folder, "launch"), lines), lines)

    return fork(2, be).end()[1]


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """A disk that writes nothing before this event."""
    event, write = threading.Event(), atomic_write.write_file

    def writes(*given):
        assert event.wait(60)
        return write(*given)

    monkeypatch.setattr(atomic_write, "write_file", writes)
    return event


def published(saver: RunSaver, run: RunComponents, lines: list[str]) -> None:
    """Take steps until a checkpoint is published or fails."""
    before = len(lines)
    while len(lines) == before:
        saver.advance(run)


@pytest.mark.parametrize("guilty", [0, 1])
@pytest.mark.parametrize("background", [False, True])
def test_a_save_that_fails_on_one_rank_fails_on_all(run: RunFolder, guilty: int, background: bool) -> None:
    def act(run: RunComponents, lines: list[str]) -> None:
        saver = RunSaver(CheckpointConfig(background=background))

        def save(step: int) -> int:
            saver.save(run, step, final=False)
            saver.finish(run)
            return saver.failures

        assert save(1) == 0
        if ranks.rank() == guilty:
            atomic_write.write_file = fails
        assert [save(2), save(3)] == [1, 2]
        assert all(f"Rank {guilty} could not save" in line and "Training continues" in line for line in lines[1:])
        save(4)

    assert saves(run.path, act) == [StorageError.exit_code] * 2
    assert run.steps() == [1] and verify(run.checkpoint(1))


def test_training_changes_nothing_that_is_being_written(run: RunFolder, disk: threading.Event) -> None:
    lines: list[str] = []
    parts = components(run, lines)
    with RunSaver(BACKGROUND) as saver:
        saver.save(parts, 1, final=False)
        saver.advance(parts)
        assert lines == [] and run.steps() == []  # training went on before anything was written
        (learner,) = parts.trainer.learners().values()
        learner.state_dict()["seen"] += 1
        parts.flops.state()["tokens"] = 1
        disk.set()
        published(saver, parts, lines)
    assert lines[0].startswith("checkpoint 1 saved") and "s in the background; training waited" in lines[0]
    assert verify(run.checkpoint(1)).step == 1
    assert dict(read_tensors(run.checkpoint(1)))["guidance/probe/seen"].sum() == 0
    assert read_state(run.checkpoint(1))["flops"] == {"tokens": 0}


@pytest.mark.parametrize("final", [False, True])
def test_the_next_save_waits_for_the_one_before(run: RunFolder, disk: threading.Event, final: bool) -> None:
    lines: list[str] = []
    parts = components(run, lines)
    with RunSaver(BACKGROUND) as saver:
        saver.save(parts, 1, final=False)
        threading.Timer(0.1, disk.set).start()
        saver.save(parts, 2, final=final)
        assert run.steps()[-1] == 1 and len(lines) == 1 + final  # the last one is there at once
    assert run.steps() == [2, 1]
    assert [line[:18] for line in lines] == ["checkpoint 1 saved", "checkpoint 2 saved"]


def test_the_last_save_is_tried_though_the_one_before_failed(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    lines: list[str] = []
    parts = components(run, lines)
    saver = RunSaver(BACKGROUND)
    with monkeypatch.context() as broken:
        broken.setattr(atomic_write, "write_file", fails)
        saver.save(parts, 1, final=False)
        published(saver, parts, lines)
    assert saver.failures == 1 and "Training continues" in lines[0]
    saver.save(parts, 2, final=True)
    assert saver.failures == 0 and run.steps() == [2]


def test_an_error_of_all_ranks_does_not_lose_the_save_before(run: RunFolder) -> None:
    lines: list[str] = []
    parts = components(run, lines)
    with pytest.raises(NonFiniteError), RunSaver(BACKGROUND) as saver:
        saver.save(parts, 1, final=False)
        raise NonFiniteError("The loss is NaN.")
    assert run.steps() == [1] and len(lines) == 1


def test_a_save_that_one_rank_leaves_is_reported_as_lost(run: RunFolder) -> None:
    def act(run: RunComponents, lines: list[str]) -> None:
        with pytest.raises(ZeroDivisionError), RunSaver(BACKGROUND) as saver:
            saver.save(run, 1, final=False)
            raise ZeroDivisionError
        assert lines == ["Checkpoint 1 was still being written, so it is lost."]

    assert saves(run.path, act) == [0, 0]
    assert run.steps() == []
