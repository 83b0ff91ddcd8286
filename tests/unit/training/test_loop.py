"""A save that fails fails for all ranks, and training continues while older checkpoints exist."""

from __future__ import annotations

import errno
import os
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from megamask.checkpoint.format import verify
from megamask.checkpoint.run_folder import RunFolder
from megamask.config.pretrain_config import PretrainConfig
from megamask.errors import StorageError
from megamask.health.loss_spikes import SpikePolicy
from megamask.health.settings import SpikesConfig
from megamask.runtime import ranks
from megamask.storage import atomic_write
from megamask.training import loop
from megamask.training.components import RunComponents
from megamask.training.progress import Progress
from tests.processes.forked import Tell, fork
from tests.unit.training.stand_ins import bare


def fails(*_: object) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def components(folder: RunFolder, lines: list[str]) -> RunComponents:
    """What a save uses of a run."""
    config = PretrainConfig()
    learner = SimpleNamespace(state_dict=lambda: {"seen": torch.zeros(9, dtype=torch.uint8)})
    return bare(
        RunComponents, config=config, folder=folder, teacher=None, progress=Progress(config.steps),
        log=SimpleNamespace(say=lines.append), flops=SimpleNamespace(state=dict),
        engine=SimpleNamespace(
            check_replicas=lambda: None,
            owned_tensors=lambda: {f"weights/{ranks.rank()}": torch.ones(5)},
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


@pytest.mark.parametrize("guilty", [0, 1])
def test_a_save_that_fails_on_one_rank_fails_on_all(run: RunFolder, guilty: int) -> None:
    def act(run: RunComponents, lines: list[str]) -> None:
        assert loop.save(run, 1, 0, final=False) == 0
        if ranks.rank() == guilty:
            atomic_write.write_file = fails
        assert [loop.save(run, 2 + failures, failures, final=False) for failures in (0, 1)] == [1, 2]
        assert all(f"Rank {guilty} could not save" in line and "Training continues" in line for line in lines[1:])
        loop.save(run, 4, 2, final=False)

    assert saves(run.path, act) == [StorageError.exit_code] * 2
    assert run.steps() == [1] and verify(run.checkpoint(1))
