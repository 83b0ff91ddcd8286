"""Work in parts, by any number of processes, that goes on after a kill.

A part is a function of what it is given, and its arrays are files; it counts once a record of their hashes is written.
On a CPU every process computes in one thread, since sums depend on how they are shared out: so the bytes do not depend
on the number of processes. Each GPU gets its share of the processes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, wait
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from megamask.runtime.progress_bar import ProgressBar
from megamask.storage import strict_json
from megamask.storage import workdir as working
from megamask.storage.durable import write_atomic
from megamask.storage.file_list import damage, from_record, to_record
from megamask.storage.npy import save_array

POLL = 1.0
"""Seconds between two looks at how far the worker processes are."""


class Part(NamedTuple):
    """The name of a part's files, what its worker must know of it, and how many units of work it is."""

    name: str
    task: Any
    size: int


Report = Callable[[int], None]
"""Adds units of work to those that are done."""
Worker = Callable[[Any, Report], Sequence[np.ndarray]]
"""Makes the arrays of a part; reports its units of work as they are done, their sum is the part's size."""


def run_parts(
    parts: Sequence[Part],
    work: Path,
    worker: Callable[[], Worker],
    workers: int,
    label: str,
    unit: str,
    kinds: Sequence[str] = ("",),
) -> None:
    """Make every part that is not finished; its arrays lie in ``work`` as NAME.npy, or NAME.KIND.npy for each kind.

    Progress is shown as ``label``, in units of work, each one ``unit``.
    """
    missing = [part for part in parts if not _finished(work, part.name, kinds)]
    total = sum(part.size for part in parts)
    done = total - sum(part.size for part in missing)
    gpus = torch.cuda.device_count()
    workers = min(workers or gpus or len(os.sched_getaffinity(0)), max(1, len(missing)))
    with ProgressBar(label, total, unit, done=done) as bar:
        if workers > 1:
            _make_in_processes(missing, work, worker, workers, kinds, bar)
        elif missing:
            _make_here(missing, work, worker, kinds, bar)


def _make_here(
    missing: Sequence[Part], work: Path, worker: Callable[[], Worker], kinds: Sequence[str], bar: ProgressBar
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        act = worker()
        for part in missing:
            _save(work, part.name, act(part.task, bar.update), kinds)
    finally:
        torch.set_num_threads(threads)


def _make_in_processes(
    missing: Sequence[Part],
    work: Path,
    worker: Callable[[], Worker],
    workers: int,
    kinds: Sequence[str],
    bar: ProgressBar,
) -> None:
    before, units, number = bar.done, working.SPAWN.Value("q", 0), working.SPAWN.Value("i", 0)
    with working.processes(workers, _start, worker, number, units, torch.cuda.device_count()) as pool:
        pending = {pool.submit(_work_on, work, part, kinds) for part in missing}
        while pending:
            # units come in more often than parts, and a line may be due while none does
            finished, pending = wait(pending, timeout=POLL, return_when=FIRST_COMPLETED)
            bar.move_to(before + units.value)
            for future in finished:
                future.result()


_mine: Worker | None = None
_units: Any = None


def _start(worker: Callable[[], Worker], count: Any, units: Any, gpus: int) -> None:
    """In a worker process: take a device, and begin."""
    global _mine, _units
    torch.set_num_threads(1)
    with count.get_lock():
        number, count.value = count.value, count.value + 1
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": str(number % gpus if gpus else 0)}
    _mine, _units = worker(), units


def _report(count: int) -> None:
    with _units.get_lock():
        _units.value += count


def _work_on(work: Path, part: Part, kinds: Sequence[str]) -> None:
    assert _mine is not None
    _save(work, part.name, _mine(part.task, _report), kinds)


def _files(name: str, kinds: Sequence[str]) -> list[str]:
    return [f"{name}.{kind}.npy" if kind else f"{name}.npy" for kind in kinds]


def _save(work: Path, name: str, made: Sequence[np.ndarray], kinds: Sequence[str]) -> None:
    """Write a part; the record of its hashes, without which it does not count, comes last."""
    files = {file: save_array(work / file, array) for file, array in zip(_files(name, kinds), made, strict=True)}
    write_atomic(work / f"{name}.json", json.dumps(to_record(files)))


def _finished(work: Path, name: str, kinds: Sequence[str]) -> bool:
    """Whether a part is there, byte for byte as it was written."""
    try:
        files = from_record(strict_json.read_json(work / f"{name}.json"))
        return files.keys() == set(_files(name, kinds)) and not damage(work, files)
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return False


def join_parts(names: Sequence[str], work: Path) -> np.ndarray:
    found = [np.load(work / f"{name}.npy", allow_pickle=False) for name in names]
    return np.concatenate(found) if found else np.empty(0, np.uint8)
