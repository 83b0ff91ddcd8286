"""The run folder, opened: fresh, or to go on from the newest checkpoint that is whole.

    config.json  environment.json  run.lock  latest     what was asked for, on what, by whom, the newest checkpoint
    text.json                                           the manifest of the shards
    logs/  tensorboard/  checkpoints/step-N/  export/

Nothing is ever overwritten or believed unread: a folder that holds another run is refused, a damaged checkpoint is
named and set aside, and a run with checkpoints never starts afresh by itself. Rank 0 decides and tells the others;
no rank looks for itself. Costs one reading of the checkpoint, shared out among the ranks.
"""

from __future__ import annotations

import json
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeVar

from megamask.checkpoint.format import MANIFEST, NewerFormat, RunFolder, storage_sentence, verify_on_all_ranks
from megamask.data.compare_tokenizers import tokenizer_differences
from megamask.data.manifest import manifest_changes
from megamask.data.shards import Shards
from megamask.data.tokenizer import TOKENIZER
from megamask.errors import CheckpointError, ConfigError, DataError, StorageError
from megamask.metrics.logger import read_metrics
from megamask.runtime import ranks
from megamask.runtime.environment import describe_environment
from megamask.storage import durable, strict_json
from megamask.storage.dotted import flatten, is_under
from megamask.storage.lock import Lock
from megamask.storage.old_names import with_new_names

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class RunStart:
    """Where a launch begins: fresh at step 0, or from a verified checkpoint."""

    run: RunFolder
    checkpoint: Path | None
    step: int
    notes: tuple[str, ...]
    """A sentence for whatever was set aside or passed over."""
    lock: Lock | None
    """Held by rank 0 until ``close`` or the end of the process."""
    changes: dict[str, list[object]] = field(default_factory=dict)
    """Settings that differ from those of the launch before: theirs, ours."""
    created: bool = False
    """Whether this launch made the folder. Known to rank 0."""

    def close(self) -> None:
        """Let another launch have the folder."""
        if self.lock:
            self.lock.close()

    def withdraw(self) -> None:
        """After a launch was refused before its first step: delete the folder if this launch made it.

        With several ranks it stays, for the watchdogs still read there. A launch that follows may take it over.
        """
        if self.created and ranks.world() == 1 and not begun(self.run):
            with suppress(OSError):
                durable.remove(self.run.path)


@dataclass(frozen=True)
class _Choice:
    candidates: list[Path]
    """Newest first."""
    own: bool
    """Whether they lie in the folder of this very run, so that a bad one may be set aside."""
    changes: dict[str, list[object]] = field(default_factory=dict)
    """Settings that differ from those of the launch before: theirs, ours."""


def open_run(
    path: Path | str,
    config: dict,
    resume: str | Path = "auto",
    may_differ: Iterable[str] = (),
    text: Shards | None = None,
    facts: dict[str, str] | None = None,
) -> RunStart:
    """Take the run folder ``path`` and find where to start. Collective.

    ``resume`` is ``auto`` (the newest valid checkpoint, or fresh if there never was one), ``must`` (an error if there
    is none), ``never`` (an error if there is one), or a checkpoint or run folder to start from; going back to an older
    checkpoint of this run sets the newer ones aside. ``config`` must be JSON and equal to that of the run which the
    folder holds, except under the dotted keys ``may_differ`` (``"output"``, ``"log"`` for all of ``log.*``); what does
    differ is recorded with the launch, and so are ``facts`` about it. Under ``"text"`` it has the fingerprint of
    ``text``; what changed in it since is told.

    Raises, on all ranks alike: ConfigError for another run's folder, with each field that differs; DataError if
    nothing but the text does, with the shards that changed; CheckpointError if the wanted checkpoint is missing or
    damaged, or if none of several is whole; LockError if another launch writes here; StorageError.
    """
    # rank 0's clock, working folder and dice, for all
    run = ranks.on_rank_zero(lambda: RunFolder(Path(path), f"{time.strftime('%Y%m%d-%H%M%S')}-{secrets.token_hex(3)}"))
    lock: Lock | None = None
    created = False

    def take() -> None:
        nonlocal lock, created
        created = not run.path.exists()
        run.checkpoints.mkdir(parents=True, exist_ok=True)
        lock = Lock(run.lock, run.launch)

    try:
        _by_main(run, take)
        choice = _by_main(run, _choose, run, config, resume, tuple(may_differ), text)
        checkpoint, step, notes = _first_whole(run, choice)
        _by_main(run, _record, run, config, text, choice.changes, checkpoint, step, facts or {})
    except BaseException:
        if lock:
            lock.close()
        raise
    return RunStart(run, checkpoint, step, tuple(notes), lock, choice.changes, created)


def begun(run: RunFolder) -> bool:
    """Whether ``run`` has taken steps of which something is left: a checkpoint, whole or not, or a figure.

    Otherwise its launch was refused or failed before, and another run may have the folder.
    """
    checkpoints = run.checkpoints.iterdir() if run.checkpoints.is_dir() else ()
    kept = any(not path.name.startswith(".tmp-") for path in checkpoints)
    return kept or any(line["step"] > 0 for line in read_metrics(run.logs / "metrics.jsonl"))


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
                durable.write_file(probe, [b"probe"])
            finally:
                probe.unlink(missing_ok=True)
            free = shutil.disk_usage(folder).free
        except OSError as error:
            raise StorageError(storage_sentence(error, "write to the output folder", folder)) from None
        if free < checkpoint_bytes * checkpoints:
            raise StorageError(
                f"{folder} has {free:,} bytes free, but {checkpoints} checkpoints of {checkpoint_bytes:,} bytes need "
                f"{checkpoint_bytes * checkpoints:,}. Free some space or choose another output folder."
            )

    ranks.on_rank_zero(act)


def _by_main(run: RunFolder, act: Callable[..., Answer], *given) -> Answer:
    def guarded() -> Answer:
        try:
            return act(*given)
        except OSError as error:
            raise StorageError(storage_sentence(error, "open the run folder", run.path)) from None

    return ranks.on_rank_zero(guarded)


def _choose(
    run: RunFolder, config: dict, resume: str | Path, may_differ: tuple[str, ...], text: Shards | None
) -> _Choice:
    differing = _changes(run, config, may_differ, text)
    _sweep(run)
    return replace(_candidates(run, resume), changes=differing)


def _candidates(run: RunFolder, resume: str | Path) -> _Choice:
    steps = run.steps()
    mine = [run.checkpoint(step) for step in steps]
    if resume == "never":
        if steps:
            raise CheckpointError(
                f"{run.path} holds a run with a checkpoint of step {steps[0]}, and `resume` is 'never'. "
                "Choose another output folder, or resume it with 'auto'."
            )
        return _Choice([], True)
    if resume not in ("auto", "must"):
        return _choose_path(run, Path(resume), mine)
    damaged = sorted(path.name for path in run.checkpoints.glob(".bad-step-*"))
    if not mine and damaged:
        raise CheckpointError(
            f"{run.path} holds no checkpoint that is whole, only damaged ones ({', '.join(damaged)}). "
            "Restore one from a copy, or choose another output folder to start afresh."
        )
    if not mine and resume == "must":
        raise CheckpointError(f"{run.path} holds no checkpoint, and `resume` is 'must'. Use 'auto' to start afresh.")
    return _Choice(mine, True)


def _sweep(run: RunFolder) -> None:
    """Delete what dead launches left half done; the lock says that none lives."""
    for leftover in run.checkpoints.iterdir():
        if leftover.name.startswith((".tmp-", ".trash-")):
            durable.remove(leftover)
    for leftover in run.path.glob(".tmp-*"):  # a file, or the folder of an export
        durable.remove(leftover) if leftover.is_dir() else leftover.unlink()


def _choose_path(run: RunFolder, source: Path, mine: list[Path]) -> _Choice:
    source = source.resolve()
    if (source / MANIFEST).exists():
        candidates = [source]
    else:
        folder = RunFolder(source)
        candidates = [folder.checkpoint(step) for step in folder.steps()]
    if not candidates:
        raise CheckpointError(
            f"`resume` must be 'auto', 'must', 'never' or hold a checkpoint, but {source} holds none."
        )
    own = candidates[0].parent.resolve() == run.checkpoints.resolve()
    if mine and not own:
        raise CheckpointError(
            f"{run.path} holds a run with checkpoints already; starting it from {source} would mix two runs. "
            "Choose another output folder."
        )
    return _Choice(candidates, own)


def _changes(run: RunFolder, config: dict, may_differ: tuple[str, ...], text: Shards | None) -> dict[str, list[object]]:
    """What differs from the run that the folder holds: theirs, ours. An error if it is not among ``may_differ``."""
    if not run.config.exists():
        if run.steps():
            raise ConfigError(f"{run.path} holds checkpoints but no config.json, so it cannot be told of which run.")
        return {}
    if not begun(run):
        return {}
    try:
        there = flatten(with_new_names(strict_json.read_json(run.config)))
    except (ValueError, AttributeError):
        raise ConfigError(f"{run.config} is damaged: it is no JSON object. Restore it from a copy.") from None
    here = flatten(json.loads(json.dumps(config)))
    pairs = {key: [there.get(key, "absent"), here.get(key, "absent")] for key in sorted(there | here)}
    found = {key: pair for key, pair in pairs.items() if pair[0] != pair[1]}
    refused = {key: pair for key, pair in found.items() if not is_under(key, may_differ)}
    if refused.keys() == {"text"} and text:
        _refuse_other_text(run, text, there.get("data"), here.get("data"))
    if refused:
        cures = "Choose another output folder, undo the changes, or, where they are meant, name them after --change"
        fields = [
            f"`{key}` is {ours!r} here, but {theirs!r} there."
            if key != "text" else _other_data(there.get("data"), here.get("data"))
            for key, (theirs, ours) in refused.items()
        ]  # fmt: skip
        raise ConfigError(f"{run.path} holds another run. {cures}:", *fields)
    return found


def _other_data(theirs: object, ours: object) -> str:
    """The sentence for another text than that of the run, by the setting `data` of both."""
    if theirs == ours:
        return (
            f"`data` is {ours or 'not given'} as before, but holds another text now. Prepare the text of the run again."
        )
    cure = f"Go on with --data {theirs}." if theirs else "Go on without --data."
    return f"`data` is {ours or 'not given'} here, but {theirs or 'not given'} there, and they hold other texts. {cure}"


def _refuse_other_text(run: RunFolder, text: Shards, theirs: object, ours: object) -> None:
    """DataError with the shards that are others than the run began with, or ConfigError if its tokenizer is."""
    try:
        before = strict_json.read_json(run.text)
        changed = manifest_changes(before, text.manifest) or ["the same files, but of other sources or settings"]
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        before, changed = {}, [f"what, cannot be told without {run.text}"]
    cure = f"{_other_data(theirs, ours)} Or choose another output folder."
    own, now = run.path / TOKENIZER, text.folder / TOKENIZER
    if before.get("tokenizer", text.manifest["tokenizer"]) != text.manifest["tokenizer"] and own.is_dir():
        problem = f"{text.folder} has another tokenizer than the run in {run.path} began with. {cure}"
        raise ConfigError(problem, *tokenizer_differences(now, str(now), own, str(own)))
    shown = ", ".join(changed[:10]) + (f", and {len(changed) - 10} more" if len(changed) > 10 else "")
    raise DataError(f"{text.folder} is not the text that the run in {run.path} began with: {shown}. {cure}")


def _first_whole(run: RunFolder, choice: _Choice) -> tuple[Path | None, int, list[str]]:
    notes: list[str] = []
    for folder in choice.candidates:
        try:
            manifest = verify_on_all_ranks(folder)
        except NewerFormat:
            raise  # whole, and newer than anything older that we could read
        except CheckpointError as error:
            notes += error.problems
            if choice.own:
                aside = _by_main(run, run.set_aside, folder, "bad")
                notes.append(f"{folder} was set aside as {aside.name}.")
            continue
        if choice.own:
            notes += _by_main(run, _set_newer_aside, run, manifest.step)
        return folder, manifest.step, notes
    if choice.candidates:
        raise CheckpointError("There is no checkpoint that is whole, so nothing was started:", *notes)
    return None, 0, notes


def go_back(run: RunFolder, step: int) -> tuple[Path | None, int, list[str]]:
    """For a run that is open: its newest whole checkpoint of at most ``step`` steps, set at the top. Collective.

    The folder, its step, and a sentence for each that was set aside, newer or damaged; None if none is so old. Raises
    CheckpointError if none of them is whole, StorageError.
    """
    candidates = _by_main(run, lambda: [run.checkpoint(other) for other in run.steps() if other <= step])
    return _first_whole(run, _Choice(candidates, True))


def _set_newer_aside(run: RunFolder, step: int) -> list[str]:
    newer = [run.checkpoint(other) for other in run.steps() if other > step]
    names = [(folder, run.set_aside(folder, "newer").name) for folder in newer]
    return [f"{folder} is newer than the start and was set aside as {name}." for folder, name in names]


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
    durable.write_atomic(run.config, json.dumps(config, indent=2) + "\n")
    if text:
        durable.write_atomic(run.text, json.dumps(text.manifest, indent=1) + "\n")
    launches = []
    if run.environment.exists():
        try:
            launches = list(strict_json.read_json(run.environment)["launches"])
        except (ValueError, KeyError, TypeError):
            launches = []  # a record for people; its loss must not stop a run
    begun = {"launch": run.launch, "step": step, "from": checkpoint and str(checkpoint), "changes": changes}
    launches.append(begun | facts | describe_environment())
    durable.write_atomic(run.environment, json.dumps({"launches": launches}, indent=2) + "\n")
