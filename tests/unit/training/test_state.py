"""The record of a checkpoint: what it derives is computed again, and what is wrong in it is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megamask.config.pretrain_config import PretrainConfig
from megamask.errors import CheckpointError
from megamask.health.loss_spikes import SkippedPacks
from megamask.masking.masker import Masker
from megamask.training.components import RunComponents
from megamask.training.progress import Progress
from megamask.training.setup import pack_numbers
from megamask.training.state import TrainState, check_derived, derived_fields, read_train_state
from tests.batches import IDS
from tests.unit.training.stand_ins import bare

skipped_packs_of_runs = st.one_of(st.just(SkippedPacks()), st.just(SkippedPacks(((2, 3), (4, 9)))))


@given(st.integers(1, 200), st.floats(0, 4e5), st.sampled_from([None, "90h"]), skipped_packs_of_runs)
def test_a_resume_computes_the_derived_fields_of_the_checkpoint(
    step: int, used: float, budget: str | None, skipped_packs: SkippedPacks
) -> None:
    config = replace(PretrainConfig(), steps=200, time_budget=budget)
    trainer = SimpleNamespace(policy=SimpleNamespace(skipped_packs=skipped_packs), masker=Masker(config.masking, IDS))
    saved = bare(RunComponents, config=config, progress=Progress(200, budget), trainer=trainer)
    state = TrainState(7, used, **derived_fields(saved, step, used))
    resumed = bare(RunComponents, **vars(saved) | {"progress": Progress(200, budget, used)})
    check_derived(resumed, step, state, Path("step"))
    # the batches that follow are those that the number of packs says
    first = next(pack_numbers(replace(config, steps=step + 1), step, skipped_packs))
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
