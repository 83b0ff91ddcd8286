"""The joints of the story: whose packs are whose, the seeds of dropout, saves that fail, and when to stop."""

from __future__ import annotations

import errno
import itertools
import os
import signal
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megamask import pretrain
from megamask.checkpoint.format import RunFolder, verify
from megamask.config.pretrain_config import PacksConfig, PretrainConfig
from megamask.errors import CheckpointError, DataError, StorageError
from megamask.health.loss_spikes import SkippedPacks, SpikePolicy, SpikesConfig
from megamask.health.stop_signals import StopRequest
from megamask.masking.masker import Masker
from megamask.runtime import ranks
from megamask.storage import durable
from megamask.training import loop
from megamask.training.components import RunComponents
from megamask.training.progress import Progress
from megamask.training.setup import pack_numbers
from megamask.training.state import TrainState, check_derived, derived_fields, read_train_state
from megamask.training.step import dropout_seed
from tests.batches import IDS
from tests.processes.forked import Tell, fork
from tests.unit.training.test_summary import bare

ledgers = st.one_of(st.just(SkippedPacks()), st.just(SkippedPacks(((2, 3), (4, 9)))))


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 5), st.integers(1, 6), ledgers)
def test_the_packs_of_all_ranks_are_all_packs_in_order_but_for_those_left_out(
    world: int, accumulate: int, start: int, more: int, ledger: SkippedPacks
) -> None:
    per_step, steps = world * accumulate, start + more
    config = replace(PretrainConfig(), steps=steps, packs=PacksConfig(256, 64, per_step))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ranks, "world", lambda: world)
        each = []
        for rank in range(world):
            patch.setattr(ranks, "rank", lambda rank=rank: rank)
            each.append(list(pack_numbers(config, start, accumulate, ledger)))
    # micro-step by micro-step, rank by rank
    found = list(itertools.chain(*zip(*each, strict=True)))
    first = [(step + ledger.shift(step)) * per_step for step in range(start, steps)]
    assert found == [number for begin in first for number in range(begin, begin + per_step)]
    assert found == sorted(set(found)) and (ledger.entries or found == list(range(start * per_step, steps * per_step)))


def test_dropout_has_a_seed_of_its_own_for_each_pack_of_each_run() -> None:
    seeds = [dropout_seed(seed, number) for seed in range(100) for number in range(1000)]
    assert len(set(seeds)) == len(seeds)
    assert all(0 <= seed < 2**63 for seed in (*seeds, dropout_seed(2**63 - 1, 10**12)))


@pytest.mark.parametrize("name", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_is_noted_inside_and_means_what_it_meant_outside(name: signal.Signals) -> None:
    before = signal.getsignal(name)
    with StopRequest() as stop:
        assert not stop.any_rank()
        os.kill(os.getpid(), name)
        assert stop.any_rank()
        assert stop.any_rank()
    assert signal.getsignal(name) == before
    with StopRequest() as again:
        assert not again.any_rank()


# ---- saves that fail


def fails(*_: object) -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO))


def parts_of(run: RunFolder, said: list[str]) -> RunComponents:
    """All that a save needs of a run."""
    config = PretrainConfig()
    learner = SimpleNamespace(state_dict=lambda: {"seen": torch.zeros(9, dtype=torch.uint8)})
    return bare(
        RunComponents, config=config, folder=run, teacher=None, progress=Progress(config.steps),
        log=SimpleNamespace(say=said.append),
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
    """How two ranks end that save as ``act`` says; rank 0 holds the run folder."""

    def be(tell: Tell) -> None:
        said: list[str] = []
        act(parts_of(RunFolder(folder, "launch"), said), said)

    return fork(2, be).end()[1]


@pytest.mark.parametrize("guilty", [0, 1])
def test_storage_that_fails_one_rank_in_a_save_fails_it_for_all(run: RunFolder, guilty: int) -> None:
    def act(parts: RunComponents, said: list[str]) -> None:
        assert loop.save(parts, 1, 0, final=False) == 0
        if ranks.rank() == guilty:
            durable.write_file = fails
        assert [loop.save(parts, 2 + failures, failures, final=False) for failures in (0, 1)] == [1, 2]
        assert all(f"Rank {guilty} could not save" in line and "Training continues" in line for line in said[1:])
        loop.save(parts, 4, 2, final=False)

    assert saves(run.path, act) == [StorageError.exit_code] * 2
    assert run.steps() == [1] and verify(run.checkpoint(1))


# ---- what a checkpoint says although it follows from its step


@given(st.integers(1, 200), st.floats(0, 4e5), st.sampled_from([None, "90h"]), ledgers)
def test_what_follows_from_a_step_is_found_again(
    step: int, used: float, budget: str | None, ledger: SkippedPacks
) -> None:
    config = replace(PretrainConfig(), steps=200, time_budget=budget)
    trainer = SimpleNamespace(policy=SimpleNamespace(ledger=ledger), masker=Masker(config.masking, IDS))
    saved = bare(RunComponents, config=config, progress=Progress(200, budget), trainer=trainer)
    state = TrainState(7, used, **derived_fields(saved, step, used))
    resumed = bare(RunComponents, **vars(saved) | {"progress": Progress(200, budget, used)})
    check_derived(resumed, step, state, Path("step"))
    # the batches that follow are those that the number of packs says
    first = next(pack_numbers(replace(config, steps=step + 1), step, config.packs.per_step, ledger))
    assert first == state.packs
    for name, other in (("packs", 1), ("rate", 1e-6), ("targets", 1)):
        wrong = replace(state, **{name: getattr(state, name) + other})
        with pytest.raises(CheckpointError, match=f"state.json: {name}` must be .* as computed here, but is"):
            check_derived(resumed, step, wrong, Path("step"))


WRONG = {
    "optimizer_steps": (None, "many", 1.5, True), "seconds": ("many", float("nan"), 10**400), "judge": ([],),
    "packs": ("many", None, [3], float("nan")), "rate": (None, [0.1], float("inf")), "teacher": (7,),
}  # fmt: skip


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG.items() for value in values])
def test_a_state_of_the_wrong_type_is_named(key: str, value: object, monkeypatch: pytest.MonkeyPatch) -> None:
    record = TrainState(7).record() | {"packs": 1, "rate": 0.1, "next_rate": 0.1, "targets": 2}
    record = {name: each for name, each in record.items() if each is not None}
    monkeypatch.setattr("megamask.training.state.read_state", lambda checkpoint: record)
    assert read_train_state(Path("step")).record().items() >= record.items()
    monkeypatch.setattr("megamask.training.state.read_state", lambda checkpoint: record | {key: value})
    with pytest.raises(CheckpointError, match=f"state.json: {key}` must be "):
        read_train_state(Path("step"))


def test_an_older_state_lacks_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("megamask.training.state.read_state", lambda checkpoint: {"optimizer_steps": 3})
    assert read_train_state(Path("step")) == TrainState(3)


def test_print_config_looks_for_the_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert pretrain.main(["--print-config", "--data", str(tmp_path / "absent")]) == DataError.exit_code
    assert "absent is no folder" in capsys.readouterr().err
