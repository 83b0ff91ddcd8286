"""A run folder, looked at: what is there, what is whole, what a resume would do and why. Nothing is touched.

Takes no lock and writes nothing, so it may look at a run that is under way. Costs one reading of every checkpoint,
or, with ``hashes=False``, a look at the sizes.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import get_args

from megamask.checkpoint.format import NewerFormat, RunFolder, read_manifest, storage_sentence
from megamask.checkpoint.settings import InspectConfig
from megamask.data.manifest import Split, text_report
from megamask.errors import CheckpointError, ConfigError, LockError, StorageError
from megamask.storage import file_list


@dataclass(frozen=True)
class CheckpointReport:
    """A checkpoint as it lies there."""

    step: int
    state: str
    """``whole``, ``damaged`` or ``newer``: of a format that this megamask does not know."""
    problems: tuple[str, ...] = ()
    bytes: int = 0
    ranks: int = 0
    """How many ranks wrote it."""
    launch: str = ""


@dataclass(frozen=True)
class RunReport:
    """What lies in a run folder, and what `--resume auto` would make of it."""

    run: Path
    recipe: str
    steps: int | None
    """The last step that was asked for."""
    launches: int
    latest: str
    """What the file of that name says; a hint that nothing believes."""
    checkpoints: tuple[CheckpointReport, ...]
    """Newest first."""
    aside: tuple[str, ...]
    """Names of what was set aside: damaged, or newer than a start that somebody chose."""
    leftovers: tuple[str, ...]
    """Names of what dead launches left half done; the next launch deletes it."""
    text: tuple[str, ...]
    """What the tokenizer lost of the text, as counted at preparation, and how long words are."""
    writer: str
    """Who holds the lock, or is noted in it on a host that cannot be seen from here."""
    resume: tuple[str, ...] = ()
    """Sentences: what a resume would do, and why."""
    exit_code: int = 0
    """With which a resume would end that cannot begin, else 0."""


def inspect_folder(folder: Path, *, hashes: bool = True) -> RunReport:
    """Look at the run in ``folder``. CheckpointError if it holds none, StorageError if the storage does not answer."""
    run = RunFolder(folder)
    try:
        if not run.path.is_dir():
            raise CheckpointError(f"{run.path} is no folder.")
        if not run.checkpoints.is_dir() and not run.config.exists():
            raise CheckpointError(f"{run.path} holds no run: neither {run.config.name} nor {run.checkpoints.name}/.")
        return _foretold(run, _seen(run, hashes))
    except OSError as error:
        raise StorageError(storage_sentence(error, "look at the run", run.path)) from None


def _seen(run: RunFolder, hashes: bool) -> RunReport:
    config, record, owner = (_read(path) or {} for path in (run.config, run.environment, run.lock))
    names = sorted(os.listdir(run.checkpoints)) if run.checkpoints.is_dir() else []
    steps, launches = config.get("steps"), record.get("launches")
    return RunReport(
        run=run.path,
        recipe=str(config.get("recipe") or ""),
        steps=steps if isinstance(steps, int) else None,
        launches=len(launches) if isinstance(launches, list) else 0,
        latest=run.latest.read_bytes()[:80].decode(errors="replace").strip() if run.latest.is_file() else "",
        checkpoints=tuple(_checkpoint(run.checkpoint(step), step, hashes) for step in run.steps()),
        aside=tuple(name for name in names if name.startswith((".bad-", ".newer-"))),
        leftovers=tuple(name for name in names if name.startswith((".tmp-", ".trash-"))),
        text=_text(run.text),
        writer=_writer(run.lock, owner),
    )


def _read(path: Path) -> dict | None:
    """The JSON object in a file; None if it is no such thing."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, IsADirectoryError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _text(manifest: Path) -> tuple[str, ...]:
    """Sentences by split; none if there is no manifest."""
    content = _read(manifest)
    if content is None:
        return ()
    try:
        return tuple(f"{split}: {line}" for split in get_args(Split) for line in text_report(content, split))
    except (AttributeError, KeyError, TypeError, ValueError):
        return (f"{manifest} is damaged: its counts cannot be read.",)


def _checkpoint(folder: Path, step: int, hashes: bool) -> CheckpointReport:
    try:
        manifest = read_manifest(folder)
        problems = tuple(file_list.damage(folder, manifest.files, hashes).values())
    except NewerFormat as error:
        return CheckpointReport(step, "newer", error.problems)
    except CheckpointError as error:
        return CheckpointReport(step, "damaged", error.problems)
    size = sum(entry.bytes for entry in manifest.files.values())
    wrote = sum(name.startswith("rank-") for name in manifest.files)
    return CheckpointReport(step, "damaged" if problems else "whole", problems, size, wrote, manifest.launch)


def _writer(lock: Path, owner: dict) -> str:
    """Who writes; empty if nobody does as far as can be seen."""
    if not owner:
        return ""
    named = f"process {owner.get('pid', '?')} on {owner.get('host', '?')} (launch {owner.get('launch', '?')})"
    return named if owner.get("host") != os.uname().nodename or _locked(lock) else ""


def _locked(lock: Path) -> bool:
    """Whether a process of this host holds the lock, as the kernel lists it: to ask for it would be to take it."""
    try:
        held = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    except OSError:
        return True
    inode = str(lock.stat().st_ino)
    return any("FLOCK" in words and words[-3].rsplit(":", 1)[-1] == inode for words in held)


def _foretold(run: RunFolder, found: RunReport) -> RunReport:
    """With what a resume would do: the decisions of ``runs.open_run``, without its deeds."""

    def refused(error: type[ConfigError | CheckpointError | LockError], *why: str) -> RunReport:
        return replace(found, resume=("A resume would be refused.", *why), exit_code=error.exit_code)

    here = f" on {os.uname().nodename} " in found.writer
    if found.writer and here:
        return refused(LockError, f"{found.writer} is writing the run.")
    notes = []
    if found.writer:
        notes.append(f"{found.writer} is noted as its writer; whether it lives cannot be seen from here.")
    if run.config.exists() and _read(run.config) is None:
        return refused(ConfigError, *notes, f"{run.config} is damaged: it is no JSON object.")
    if found.checkpoints and not run.config.exists():
        return refused(ConfigError, *notes, "There are checkpoints but no config.json to tell of which run.")
    bad: list[int] = []
    for each in found.checkpoints:
        if each.state == "newer":
            return refused(CheckpointError, *notes, *each.problems)
        if each.state == "whole":
            of = f" of {found.steps:,}" if found.steps else ""
            aside = [f"step-{step} is damaged and would be set aside." for step in bad]
            return replace(found, resume=(f"A resume would go on after step {each.step:,}{of}.", *aside, *notes))
        bad.append(each.step)
    if bad or any(name.startswith(".bad-step-") for name in found.aside):
        return refused(CheckpointError, *notes, "No checkpoint is whole, and a run never starts afresh by itself.")
    return replace(found, resume=("A resume would start afresh: there never was a checkpoint.", *notes))


# ---- the report for people


def print_report(config: InspectConfig) -> int:
    """`megamask inspect`; returns the exit code of a resume that would be refused, else 0."""
    report = inspect_folder(config.run, hashes=config.verify)
    if config.json:
        print(json.dumps(asdict(report), indent=2, default=str))
    else:
        print(*report_lines(report, config.verify), sep="\n")
    return report.exit_code


def report_lines(report: RunReport, verified: bool) -> list[str]:
    """The report as lines of text."""
    launches = f"{report.launches} launch{'es' * (report.launches != 1)}"
    lines = [f"{report.run}", f"  recipe {report.recipe or 'none'}, {report.steps or '?'} steps, {launches}"]
    lines += [f"  text, {line}" for line in report.text]
    lines += [f"  written by {report.writer}"] if report.writer else []
    lines += ["", f"  {'step':>9}  {'state':8} {'MB':>10}  {'ranks':>5}  launch"] if report.checkpoints else []
    for each in report.checkpoints:
        latest = " <- latest" if report.latest == f"step-{each.step}" else ""
        size = f"{each.bytes / 1e6:>10,.1f}"
        lines.append(f"  {each.step:>9}  {each.state:8} {size}  {each.ranks:>5}  {each.launch}{latest}")
        lines += [f"             {problem}" for problem in each.problems]
    lines += ["", "  Only sizes were compared, no hashes."] if report.checkpoints and not verified else []
    lines += [f"  renamed, not used: {name}" for name in report.aside]
    lines += [f"  unfinished, will be deleted: {name}" for name in report.leftovers]
    return [*lines, "", *(f"  {sentence}" for sentence in report.resume)]
