"""Inspect a run folder: what it contains, what is intact, and what a resume would do.

Takes no lock and writes nothing, so it is safe while the run trains. Costs one reading of every checkpoint, or, with
``hashes=False``, a look at the sizes.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from megamask.checkpoint.format import NewerFormat, read_manifest, storage_sentence
from megamask.checkpoint.resume_decision import CheckpointState, decide, read_folder_state
from megamask.checkpoint.run_folder import RunFolder
from megamask.checkpoint.settings import InspectConfig
from megamask.data.manifest import Split, text_report
from megamask.errors import CheckpointError, LockError, MegamaskError, StorageError
from megamask.metrics.metrics_file import read_metrics
from megamask.storage import file_list


@dataclass(frozen=True)
class CheckpointReport(CheckpointState):
    """A checkpoint in the run folder."""

    bytes: int = 0
    ranks: int = 0
    """How many ranks wrote it."""
    launch: str = ""


@dataclass(frozen=True)
class RunReport:
    """What a run folder holds, and what `--resume auto` would do."""

    run: Path
    recipe: str
    steps: int | None
    """The setting `steps`."""
    launches: int
    latest: str
    """The content of the file of that name. Nothing relies on it."""
    checkpoints: tuple[CheckpointReport, ...]
    """Newest first."""
    renamed: tuple[str, ...]
    """Names of checkpoints that were renamed: damaged, or newer than the one that a launch started from."""
    leftovers: tuple[str, ...]
    """Names of what killed launches left unfinished; the next launch deletes it."""
    text: tuple[str, ...]
    """What the tokenizer lost of the text, as counted at preparation, and how long words are."""
    writer: str
    """The process that holds the lock, or that the lock names on another host."""
    resume: tuple[str, ...] = ()
    """What a resume would do, and why, as sentences."""
    exit_code: int = 0
    """The exit code of a resume that would be refused, else 0."""


def inspect_folder(folder: Path, *, hashes: bool = True) -> RunReport:
    """Inspect the run in ``folder``. Raises CheckpointError if it holds none, StorageError if it cannot be read."""
    run = RunFolder(folder)
    try:
        run.check()
        return _predict(run, _observe(run, hashes))
    except OSError as error:
        raise StorageError(storage_sentence(error, "inspect the run", run.path)) from None


def _observe(run: RunFolder, hashes: bool) -> RunReport:
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
        renamed=tuple(name for name in names if name.startswith((".bad-", ".newer-"))),
        leftovers=tuple(name for name in names if name.startswith((".tmp-", ".trash-"))),
        text=_text(run.text),
        writer=_writer(run.lock, owner),
    )


def _read(path: Path) -> dict | None:
    """The JSON object in a file; None if it holds anything else."""
    try:
        content = json.loads(path.read_bytes())
    except (FileNotFoundError, IsADirectoryError, ValueError, RecursionError):
        return None
    return content if isinstance(content, dict) else None


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
        return CheckpointReport(folder, step, "newer", error.problems)
    except CheckpointError as error:
        return CheckpointReport(folder, step, "damaged", error.problems)
    size = sum(entry.bytes for entry in manifest.files.values())
    writers = sum(name.startswith("rank-") for name in manifest.files)
    state: Literal["intact", "damaged"] = "damaged" if problems else "intact"
    return CheckpointReport(folder, step, state, problems, size, writers, manifest.launch)


def _writer(lock: Path, owner: dict) -> str:
    """The process that writes; empty if none is visible."""
    if not owner:
        return ""
    owner_name = f"process {owner.get('pid', '?')} on {owner.get('host', '?')} (launch {owner.get('launch', '?')})"
    return owner_name if owner.get("host") != os.uname().nodename or _locked(lock) else ""


def _locked(lock: Path) -> bool:
    """Whether a process of this host holds the lock, by the kernel's list: trying the lock would take it."""
    try:
        locks = [line.split() for line in Path("/proc/locks").read_text().splitlines()]
    except OSError:
        return True
    inode = str(lock.stat().st_ino)
    return any("FLOCK" in words and words[-3].rsplit(":", 1)[-1] == inode for words in locks)


def _predict(run: RunFolder, report: RunReport) -> RunReport:
    """The report with what a resume would do."""
    here = f" on {os.uname().nodename} " in report.writer
    if report.writer and here:
        return _refused(report, LockError(f"{report.writer} is writing the run."))
    notes = []
    if report.writer:
        notes.append(f"{report.writer} is recorded as its writer; whether it still runs is not visible from here.")
    decision = decide(read_folder_state(run), report.checkpoints)
    if decision.refusal:
        return _refused(report, decision.refusal, *notes)
    if decision.checkpoint is None:
        return replace(report, resume=("A resume would start at step 0: there never was a checkpoint.", *notes))
    step, total = decision.checkpoint.step, f" of {report.steps:,}" if report.steps else ""
    renamed = [f"{damaged.folder.name} is damaged and would be renamed." for damaged in decision.damaged]
    sentence = f"A resume would continue after step {step:,}{total}."
    if _is_over(run, step, report.steps):
        sentence = f"The run is finished after step {step:,}{total}. A resume would only draw its curve and export it."
    return replace(report, resume=(sentence, *renamed, *notes))


def _refused(report: RunReport, error: MegamaskError, *notes: str) -> RunReport:
    return replace(report, resume=("A resume would be refused.", *notes, *error.problems), exit_code=error.exit_code)


def _is_over(run: RunFolder, step: int, steps: int | None) -> bool:
    """Whether all steps are done, or the time budget was used up at ``step``, as the log says."""
    lines = read_metrics(run.logs / "metrics.jsonl")
    return step == steps or any(line["step"] == step and line.get("progress", 0) >= 1 for line in lines)


# ---- the report for people


def print_report(config: InspectConfig) -> int:
    """`megamask inspect`; returns the exit code of a resume that would be refused, else 0."""
    report = inspect_folder(config.run, hashes=config.verify)
    if config.json:
        print(json.dumps(asdict(report), indent=2, default=str))
    else:
        print(*run_report_lines(report, config.verify), sep="\n")
    return report.exit_code


def run_report_lines(report: RunReport, verified: bool) -> list[str]:
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
    lines += [f"  renamed, not used: {name}" for name in report.renamed]
    lines += [f"  unfinished, will be deleted: {name}" for name in report.leftovers]
    return [*lines, "", *(f"  {sentence}" for sentence in report.resume)]
