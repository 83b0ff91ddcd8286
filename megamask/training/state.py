"""What a checkpoint holds, collected and restored: `TrainState`, the engine's tensors, and those of every learner.

The only place that knows the keys of ``state.json`` and the names of the tensors in a checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from megamask.batch import Learner
from megamask.checkpoint.format import STATE, WEIGHTS, read_state, read_tensors
from megamask.config.phase_flags import phase_word, read_phase
from megamask.config.phases import run_phases
from megamask.config.pretrain_config import PretrainConfig, changeable
from megamask.engine.engine import Engine
from megamask.errors import CheckpointError, ConfigError, must, raise_all
from megamask.runtime import ranks
from megamask.storage.old_setting_names import with_added, with_new_names
from megamask.storage.tensor_stream import TensorStream
from megamask.training.components import RunComponents

KEYS = {"spikes": "judge"}
"""Fields of `TrainState` whose key in ``state.json`` has another name."""


@dataclass(frozen=True)
class TrainState:
    """What a checkpoint holds besides tensors, the content of ``state.json``. None: written before the field existed.

    Nothing random is in it: masks and dropout are functions of the seed and the pack number.
    """

    optimizer_steps: int
    """Steps in which the weights moved."""
    seconds: float = 0.0
    """Training time, over all launches."""
    settings: dict[str, Any] | None = None
    """The settings that may change between launches (`changeable`)."""
    spikes: dict[str, Any] = field(default_factory=dict)
    """The state of the spike policy."""
    flops: dict[str, Any] = field(default_factory=dict)
    """Tokens and FLOPs so far (`FlopCounter.state`)."""
    teacher: str = ""
    """The hash of the teacher, empty without one."""
    packs: int | None = None
    """The number of the next pack. A resume computes this and the next three fields and compares."""
    rate: float | None = None
    """The learning rate where the next step begins."""
    next_rate: float | None = None
    """The learning rate of the next step."""
    targets: int | None = None
    """Targets in a pack where the next step begins."""
    ranks: int | None = None
    """How many ranks wrote it. This and the next two are only reported; a run resumes under any others."""
    stage: int | None = None
    """The ZeRO stage that wrote it."""
    precision: str | None = None
    """The precision that wrote it."""

    def record(self) -> dict[str, Any]:
        """The content of ``state.json``."""
        return {KEYS.get(each.name, each.name): getattr(self, each.name) for each in fields(self)}


def read_train_state(checkpoint: Path) -> TrainState:
    """The state of a verified checkpoint. Raises CheckpointError for each field of the wrong type."""
    record = read_state(checkpoint)
    values: dict[str, Any] = {}
    problems = []
    for each in fields(TrainState):
        key = KEYS.get(each.name, each.name)
        if key not in record and each.name != "optimizer_steps":
            continue
        rule, fits = _RULES[str(each.type).removesuffix(" | None")]
        values[each.name] = record.get(key)
        if not fits(values[each.name]):
            problems.append(must(f"{checkpoint}/{STATE}: {key}", f"be {rule}", str(values[each.name])))
    raise_all(CheckpointError, problems)
    if values.get("settings"):
        known = changeable(PretrainConfig()).keys() - {"phases"}  # `check_derived` adds them
        values["settings"] = with_added(with_new_names(values["settings"]), known)
    return TrainState(**values)


_RULES = {
    "int": ("a whole number", lambda value: type(value) is int and abs(value) < 2**63),
    "float": ("a finite number", lambda value: type(value) in (int, float) and abs(value) < 1e300),
    "str": ("a text", lambda value: isinstance(value, str)),
    "dict[str, Any]": ("an object", lambda value: isinstance(value, dict)),
}
"""By the type of a field: the rule, and whether a value follows it."""


def collect(
    run: RunComponents, step: int, *, copy: bool = False
) -> tuple[TrainState, dict[str, Tensor] | TensorStream]:
    """The state after ``step`` steps, and the tensors that this rank writes. Collective.

    Each tensor of the engine is written by one rank, those of the learners by rank 0. With ``copy``, training may go on
    while they are written: no tensor is one that it changes. Without, tensors of the engine are gathered when they are
    written.
    """
    learned: dict[str, Tensor] = {}
    if ranks.is_main():
        for prefix, learner in run.trainer.learners().items():
            learned |= {prefix + name: tensor.to("cpu", copy=copy) for name, tensor in learner.state_dict().items()}
    tensors = run.engine.owned_tensors() | learned if copy else run.engine.stream_tensors(learned)
    seconds = run.progress.used
    state = TrainState(
        optimizer_steps=run.engine.steps,
        seconds=seconds,
        settings=changeable(run.config),
        spikes=run.trainer.policy.state(),
        flops=run.flops.state(),
        teacher=run.teacher.fingerprint if run.teacher else "",
        ranks=ranks.world(),
        stage=run.engine.stage,
        precision=run.engine.precision,
        **derived_fields(run, step, seconds),
    )
    return state, tensors


def restore(checkpoint: Path, state: TrainState, engine: Engine, learners: Mapping[str, Learner]) -> None:
    """Load the tensors of a verified ``checkpoint``. Collective.

    Raises CheckpointError if it is of another model or of other learners.
    """
    tensors = dict(read_tensors(checkpoint))
    shapes = {WEIGHTS + name: tuple(shape) for name, shape in engine.weight_shapes.items()}
    saved = {name: tuple(tensor.shape) for name, tensor in tensors.items() if name.startswith(WEIGHTS)}
    wrong = [name for name in sorted(shapes.keys() | saved.keys()) if shapes.get(name) != saved.get(name)]
    if wrong:
        shown = [
            f"{name} is {saved.get(name, 'absent')} there, but {shapes.get(name, 'absent')} here" for name in wrong[:10]
        ]
        raise CheckpointError(f"{checkpoint} is of another model, in {len(wrong)} tensors: {'; '.join(shown)}.")
    engine.restore(tensors.get, steps=state.optimizer_steps)
    for prefix, learner in learners.items():
        try:
            learner.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
        except KeyError as error:
            raise CheckpointError(
                f"{checkpoint} lacks {error.args[0]!r} of what a score or an entropy source has learned: it was "
                "written under other settings, or by another version of megamask."
            ) from None


def derived_fields(run: RunComponents, step: int, seconds: float) -> dict[str, Any]:
    """The fields that follow from the number of steps and the seconds of training."""
    progress, end = run.progress.then(step, seconds), run.progress.then(step + 1, seconds)
    lr = run.config.optimizer.lr
    packs = run.phases.packs_before(step + run.trainer.policy.skipped_packs.shift(step))
    return dict(
        packs=packs,
        rate=lr(progress),
        next_rate=lr.of_step(progress, min(1.0, end)),
        targets=run.trainer.masker.budget(progress, run.config.packs.tokens, packs),
    )


def check_derived(run: RunComponents, step: int, state: TrainState, checkpoint: Path) -> None:
    """CheckpointError unless the derived fields of a ``checkpoint`` are those computed here.

    If a setting was changed on purpose since, the learning rate and the number of targets may differ. ConfigError if
    the phases before ``step`` were changed.
    """
    expected, now = derived_fields(run, step, state.seconds), changeable(run.config)
    # phases of a checkpoint that does not record them are compared with config.json
    before = now if state.settings is None else {"phases": now["phases"]} | state.settings
    if before != now:
        expected = {"packs": expected["packs"]}
        _check_passed_phases(run, step, before)
    problems = [
        must(f"{checkpoint}/{STATE}: {name}", f"be {value}, as computed here", saved)
        for name, value in expected.items()
        # another machine may round a cosine differently
        if (saved := getattr(state, name)) is not None and not math.isclose(saved, value, rel_tol=1e-9)
    ]
    if problems:
        problems.append("Resume with the version of megamask that wrote it, or start a new run.")
    raise_all(CheckpointError, problems)


def _check_passed_phases(run: RunComponents, step: int, before: Mapping[str, Any]) -> None:
    """ConfigError unless the phases of ``before``, the settings of a checkpoint, are the same up to ``step``."""
    phases = tuple(read_phase(phase_word(each)) for each in before["phases"])
    passed = run_phases(replace(run.config, steps=before["steps"], phases=phases)).before(step)
    if run.phases.before(step) != passed:
        raise ConfigError(
            f"`phases` and `steps` may change only phases after step {step}, to which the run has come: up to it, "
            "sequences, packs of a step, masks and shares must stay as they were. Give the phases before it by `steps` "
            "instead of `until`, or start a new run with `init`."
        )


def check_teacher(state: TrainState, fingerprint: str, checkpoint: Path) -> None:
    """ConfigError unless the teacher with ``fingerprint`` (empty: none) is the one of the ``checkpoint``."""
    if fingerprint != state.teacher:
        raise ConfigError(
            f"{checkpoint} was written with a teacher of hash {state.teacher[:16] or 'none'}, but `teacher.path` has "
            f"{fingerprint[:16] or 'none'}. Name the same model; if it is a run that still trains, name one of its "
            "checkpoints."
        )


def resume_notes(state: TrainState, engine: Engine) -> list[str]:
    """What differs between the launch that wrote ``state`` and this one, as sentences for the log."""
    notes = []
    if state.next_rate is None:
        notes.append(
            "The checkpoint was written by an earlier megamask, which decayed the learning rate one step sooner, so "
            "that its last step had rate 0. From here on each decaying step has the rate that the step before it had."
        )
    now = (ranks.world(), engine.stage, engine.precision)
    saved = (state.ranks, state.stage, state.precision)
    before = tuple(new if old is None else old for new, old in zip(now, saved, strict=True))
    if before != now:
        here, there = (f"{n} rank{'s' * (n != 1)}, ZeRO {stage}, {precision}" for n, stage, precision in (now, before))
        rounding = " From here on its metrics round differently." if now[2] != before[2] else ""
        notes.append(f"Resumed at {here}; the checkpoint was written by {there}.{rounding}")
    return notes
