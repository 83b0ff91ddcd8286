"""What a launch does with a run folder: one decision, which a resume carries out and an inspection reports."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from megamask.checkpoint.format import NewerFormat
from megamask.checkpoint.run_folder import RunFolder
from megamask.errors import CheckpointError, ConfigError, MegamaskError
from megamask.metrics.metrics_file import read_metrics
from megamask.storage import strict_json


@dataclass(frozen=True)
class FolderState:
    """What a decision depends on, besides the content of the checkpoints."""

    path: Path
    config: Literal["readable", "damaged", "missing"]
    begun: bool
    """Whether steps were taken, see `has_begun`."""
    steps: tuple[int, ...]
    """The steps that have a checkpoint folder, newest first."""
    damaged: tuple[str, ...] = ()
    """Names of checkpoints that an earlier launch found damaged and renamed."""


@dataclass(frozen=True)
class CheckpointState:
    """Whether a checkpoint can be used."""

    folder: Path
    step: int
    """0 if unknown."""
    state: Literal["intact", "damaged", "newer"]
    """``newer``: of a format that this version of megamask does not know."""
    problems: tuple[str, ...] = ()


@dataclass(frozen=True)
class Decision:
    """Start from ``checkpoint``, or at step 0 without one, or not at all."""

    checkpoint: CheckpointState | None = None
    damaged: tuple[CheckpointState, ...] = ()
    """Checkpoints to rename, so that nothing uses them; newest first."""
    refusal: MegamaskError | None = None
    """The error to raise instead of starting."""


def decide(folder: FolderState, checkpoints: Iterable[CheckpointState], resume: str = "auto") -> Decision:
    """Choose the newest intact checkpoint, or refuse. Depends only on its arguments.

    ``checkpoints`` are the candidates, newest first; no more of them are read than needed. ``resume`` is ``auto``,
    ``must``, ``never``, or anything else if the candidates were named.
    """
    if folder.steps and folder.config == "missing":
        return _refuse(ConfigError(f"{folder.path} holds checkpoints but no config.json, so the run is unknown."))
    if folder.begun and folder.config == "damaged":
        path = folder.path / "config.json"
        return _refuse(ConfigError(f"{path} is damaged: it is not a JSON object. Restore it from a copy."))
    if resume == "never":
        return _never(folder)
    if resume in ("auto", "must") and not folder.steps:
        return _without_checkpoint(folder, resume)
    damaged: list[CheckpointState] = []
    for checkpoint in checkpoints:
        if checkpoint.state == "newer":  # intact, and newer than any that we could read
            return _refuse(NewerFormat(*checkpoint.problems))
        if checkpoint.state == "intact":
            return Decision(checkpoint, tuple(damaged))
        damaged.append(checkpoint)
    if not damaged:
        return Decision()
    problems = [problem for checkpoint in damaged for problem in checkpoint.problems]
    sentence = "There is no intact checkpoint, so nothing was started:"
    return Decision(None, tuple(damaged), CheckpointError(sentence, *problems))


def _refuse(error: MegamaskError) -> Decision:
    return Decision(refusal=error)


def _never(folder: FolderState) -> Decision:
    if not folder.steps:
        return Decision()
    return _refuse(
        CheckpointError(
            f"{folder.path} holds a run with a checkpoint of step {folder.steps[0]}, and `resume` is 'never'. Choose "
            "another output folder, or resume it with 'auto'."
        )
    )


def _without_checkpoint(folder: FolderState, resume: str) -> Decision:
    if folder.damaged:
        return _refuse(
            CheckpointError(
                f"{folder.path} holds no intact checkpoint, only damaged ones ({', '.join(folder.damaged)}). "
                "Restore one from a copy, or choose another output folder for a new run."
            )
        )
    if resume == "must":
        problem = f"{folder.path} holds no checkpoint, and `resume` is 'must'. Use 'auto' to start a new run."
        return _refuse(CheckpointError(problem))
    return Decision()


def read_folder_state(run: RunFolder) -> FolderState:
    """Look at a run folder, without the content of its checkpoints. Raises OSError."""
    damaged = sorted(path.name for path in run.checkpoints.glob(".bad-step-*"))
    return FolderState(run.path, _config_state(run.config), has_begun(run), tuple(run.steps()), tuple(damaged))


def _config_state(path: Path) -> Literal["readable", "damaged", "missing"]:
    if not path.exists():
        return "missing"
    try:
        return "readable" if isinstance(strict_json.read_json(path), dict) else "damaged"
    except ValueError:
        return "damaged"


def has_begun(run: RunFolder) -> bool:
    """Whether ``run`` has taken steps that left something: a checkpoint, intact or not, or a metric.

    Otherwise its launch failed before the first step, and another run may use the folder.
    """
    checkpoints = run.checkpoints.iterdir() if run.checkpoints.is_dir() else ()
    saved = any(not path.name.startswith(".tmp-") for path in checkpoints)
    return saved or any(line["step"] > 0 for line in read_metrics(run.logs / "metrics.jsonl"))
