"""Open the run folder: for a new run, or to resume from the newest intact checkpoint.

    config.json  environment.json  run.lock  latest     settings, environment of each launch, writer, newest checkpoint
    text.json                                           the manifest of the shards
    logs/  tensorboard/  checkpoints/step-N/  export/

Nothing is overwritten, and nothing is used before it is verified. A folder that holds another run is refused. A damaged
checkpoint is named and renamed. A run with checkpoints never starts from step 0 by itself. Rank 0 looks at the folder,
for all ranks; only the bytes of a checkpoint are verified by all, each a share. Costs one reading of the checkpoint.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from megamask.checkpoint.format import MANIFEST, NewerFormat, storage_sentence, verify_on_all_ranks
from megamask.checkpoint.resume_decision import (
    CheckpointState,
    Decision,
    FolderState,
    decide,
    has_begun,
    read_folder_state,
)
from megamask.checkpoint.run_folder import RunFolder
from megamask.checkpoint.settings_changes import find_changes
from megamask.data.shards import Shards
from megamask.errors import CheckpointError, StorageError, raise_all
from megamask.runtime import ranks
from megamask.runtime.environment import describe_environment
from megamask.storage import atomic_write, strict_json
from megamask.storage.lock import Lock

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class RunStart:
    """Where a launch starts: at step 0, or from a verified checkpoint."""

    run: RunFolder
    checkpoint: Path | None
    step: int
    notes: tuple[str, ...]
    """A sentence for each checkpoint that was renamed or not used."""
    lock: Lock | None
    """On rank 0, until ``close`` or the end of the process."""
    changes: dict[str, list[object]] = field(default_factory=dict)
    """Settings that differ from those of the launch before, as [before, now]."""
    created: bool = False
    """Whether this launch made the folder. Rank 0 knows."""

    def close(self) -> None:
        """Release the lock of the folder."""
        if self.lock:
            self.lock.close()

    def delete_new_folder(self) -> None:
        """After an error before the first step: delete the folder if this launch made it.

        With several ranks it stays, since their watchdogs still read in it. A later launch can use it.
        """
        if self.created and ranks.world() == 1 and not has_begun(self.run):
            with suppress(OSError):
                atomic_write.remove(self.run.path)


@dataclass(frozen=True)
class _Candidates:
    folders: list[Path]
    """Newest first."""
    own: bool = True
    """Whether they lie in the folder of this run, so that damaged ones may be renamed."""


def open_run(
    path: Path | str,
    config: dict,
    resume: str | Path = "auto",
    may_differ: Iterable[str] = (),
    text: Shards | None = None,
    facts: dict[str, str] | None = None,
) -> RunStart:
    """Lock the run folder ``path`` and choose where to start. Collective.

    ``resume`` is ``auto`` (the newest intact checkpoint, or step 0 if there never was one), ``must`` (an error if there
    is none), ``never`` (an error if there is one), or a checkpoint or run folder to start from; starting from an older
    checkpoint of this run renames the newer ones. ``config`` must be JSON and equal to that of the run in the folder,
    except under the dotted keys ``may_differ`` (``"output"``, ``"log"`` for all of ``log.*``). Differences are recorded
    with the launch, and so are ``facts`` about it. Under ``"text"`` it has the fingerprint of ``text``.

    Raises, on all ranks alike: ConfigError for the folder of another run, with each field that differs; DataError if
    only the text differs, with the shards that changed; CheckpointError if the wanted checkpoint is missing or damaged,
    or if none of several is intact; LockError if another launch writes here; StorageError.
    """
    # rank 0's clock, working folder and random name, for all
    run = ranks.on_rank_zero(lambda: RunFolder(Path(path), f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"))
    lock: Lock | None = None
    created = False

    def take() -> None:
        nonlocal lock, created
        created = not run.path.exists()
        run.checkpoints.mkdir(parents=True, exist_ok=True)
        lock = Lock(run.lock, run.launch)

    def look() -> tuple[FolderState, dict[str, list[object]], _Candidates]:
        state = read_folder_state(run)
        comparable = state.begun and state.config == "readable"
        changes = find_changes(run, config, tuple(may_differ), text) if comparable else {}
        return state, changes, checkpoint_candidates(run, resume)

    try:
        _on_rank_zero(run, take)
        state, changes, candidates = _on_rank_zero(run, look)
        decision = decide(state, _verified(candidates.folders), str(resume))
        notes = _carry_out(run, decision, candidates.own)
        _on_rank_zero(run, lambda: _delete_leftovers(run))
        checkpoint, step = _start_of(decision)
        _on_rank_zero(run, lambda: _record(run, config, text, changes, checkpoint, step, facts or {}))
    except BaseException:
        if lock:
            lock.close()
        raise
    return RunStart(run, checkpoint, step, tuple(notes), lock, changes, created)


def go_back(run: RunFolder, step: int) -> tuple[Path | None, int, list[str]]:
    """The newest intact checkpoint of at most ``step`` steps of an open run, its step, and notes. Collective.

    Newer and damaged ones are renamed, with a sentence for each. (None, 0, []) if no checkpoint is old enough. Raises
    CheckpointError if none of them is intact, StorageError.
    """
    folders = _on_rank_zero(run, lambda: [run.checkpoint(other) for other in run.steps() if other <= step])
    if not folders:
        return None, 0, []
    decision = decide(FolderState(run.path, "readable", True, (step,)), _verified(folders))
    notes = _carry_out(run, decision, own=True)
    return *_start_of(decision), notes


def _start_of(decision: Decision) -> tuple[Path | None, int]:
    chosen = decision.checkpoint
    return (chosen.folder, chosen.step) if chosen else (None, 0)


def _verified(folders: Iterable[Path]) -> Iterator[CheckpointState]:
    """The state of each checkpoint, after every byte of it was hashed. Collective."""
    for folder in folders:
        try:
            manifest = verify_on_all_ranks(folder)
        except NewerFormat as error:
            yield CheckpointState(folder, 0, "newer", error.problems)
        except CheckpointError as error:
            yield CheckpointState(folder, 0, "damaged", error.problems)
        else:
            yield CheckpointState(folder, manifest.step, "intact")


def _carry_out(run: RunFolder, decision: Decision, own: bool) -> list[str]:
    """Rename what must not be used, and return sentences about it; raise the error of a refusal. Collective."""

    def rename() -> list[str]:
        notes: list[str] = []
        for damaged in decision.damaged:
            notes += damaged.problems
            if own:
                notes.append(f"{damaged.folder} was renamed to {run.rename_unused(damaged.folder, 'bad').name}.")
        if own and decision.checkpoint:
            for step in (step for step in run.steps() if step > decision.checkpoint.step):
                folder = run.checkpoint(step)
                name = run.rename_unused(folder, "newer").name
                notes.append(f"{folder} is newer than the start and was renamed to {name}.")
        if decision.refusal:  # raised on rank 0, so that it is printed once
            raise decision.refusal
        return notes

    return _on_rank_zero(run, rename)


def check_space(path: Path | str, checkpoint_bytes: int, checkpoints: int = 3) -> None:
    """Raise StorageError unless ``path`` can be written and has room for that many checkpoints. Collective.

    Three, since the two that are kept are deleted only after the next is durable.
    """
    folder = Path(path).absolute()

    def act() -> None:
        probe = folder / f".tmp-probe-{os.getpid()}"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            try:
                atomic_write.write_file(probe, [b"probe"])
            finally:
                probe.unlink(missing_ok=True)
            free = shutil.disk_usage(folder).free
        except OSError as error:
            raise StorageError(storage_sentence(error, "write to the output folder", folder)) from None
        raise_all(StorageError, space_problems(folder, free, checkpoint_bytes, checkpoints))

    ranks.on_rank_zero(act)


def space_problems(folder: Path, free: int, checkpoint_bytes: int, checkpoints: int = 3) -> list[str]:
    """A sentence if ``free`` bytes do not hold that many checkpoints."""
    if free >= checkpoint_bytes * checkpoints:
        return []
    return [
        f"{folder} has {free:,} bytes free, but {checkpoints} checkpoints of {checkpoint_bytes:,} bytes need "
        f"{checkpoint_bytes * checkpoints:,}. Free some space or choose another output folder."
    ]


def _on_rank_zero(run: RunFolder, act: Callable[[], Answer]) -> Answer:
    def guarded() -> Answer:
        try:
            return act()
        except OSError as error:
            raise StorageError(storage_sentence(error, "open the run folder", run.path)) from None

    return ranks.on_rank_zero(guarded)


def checkpoint_candidates(run: RunFolder, resume: str | Path) -> _Candidates:
    """The checkpoints that ``resume`` allows; CheckpointError if it is a path without one, or of another run."""
    own = [run.checkpoint(step) for step in run.steps()]
    if resume in ("auto", "must", "never"):
        return _Candidates(own)
    source = Path(resume).resolve()
    folder = RunFolder(source)
    folders = [source] if (source / MANIFEST).exists() else [folder.checkpoint(step) for step in folder.steps()]
    if not folders:
        raise CheckpointError(
            f"`resume` must be 'auto', 'must', 'never' or the path of a checkpoint or run, but {source} holds no "
            "checkpoint."
        )
    from_own = folders[0].parent.resolve() == run.checkpoints.resolve()
    if own and not from_own:
        raise CheckpointError(
            f"{run.path} already holds a run with checkpoints; starting it from {source} would mix two runs. Choose "
            "another output folder."
        )
    return _Candidates(folders, from_own)


def _delete_leftovers(run: RunFolder) -> None:
    """Delete what killed launches left unfinished; the lock shows that none still runs."""
    for leftover in run.checkpoints.iterdir():
        if leftover.name.startswith((".tmp-", ".trash-")):
            atomic_write.remove(leftover)
    for leftover in run.path.glob(".tmp-*"):  # a file, or the folder of an export
        atomic_write.remove(leftover) if leftover.is_dir() else leftover.unlink()


def _record(
    run: RunFolder,
    config: dict,
    text: Shards | None,
    changes: dict[str, list[object]],
    checkpoint: Path | None,
    step: int,
    facts: dict[str, str],
) -> None:
    for folder in (run.logs, run.tensorboard):
        folder.mkdir(exist_ok=True)
    atomic_write.write_atomic(run.config, json.dumps(config, indent=2) + "\n")
    if text:
        atomic_write.write_atomic(run.text, json.dumps(text.manifest, indent=1) + "\n")
    launches = []
    if run.environment.exists():
        try:
            launches = list(strict_json.read_json(run.environment)["launches"])
        except (ValueError, KeyError, TypeError):
            launches = []  # only people read it; its loss must not stop a run
    launch = {"launch": run.launch, "step": step, "from": checkpoint and str(checkpoint), "changes": changes}
    launches.append(launch | facts | describe_environment())
    atomic_write.write_atomic(run.environment, json.dumps({"launches": launches}, indent=2) + "\n")
