"""Work that is divided into parts, done by any number of processes, and continued after a kill.

A part depends only on its task, and its arrays are files. It is finished once a list of their hashes is written. On a
CPU every process uses one thread, since the rounding of sums depends on the number of threads. So the bytes do not
depend on the number of processes. The processes are distributed evenly over the GPUs.
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
from megamask.storage.atomic_write import write_atomic
from megamask.storage.file_list import damage, from_record, to_record
from megamask.storage.npy import save_array

POLL = 1.0
"""Seconds between two updates of the progress."""


class Part(NamedTuple):
    """The name of a part's files, the input of its worker, and its number of units of work."""

    name: str
    task: Any
    size: int


Report = Callable[[int], None]
"""Receives the number of units of work that are newly done."""
Worker = Callable[[Any, Report], Sequence[np.ndarray]]
"""Computes the arrays of a part and reports its units of work, whose sum is the size of the part."""


def run_parts(
    parts: Sequence[Part],
    work: Path,
    worker: Callable[[], Worker],
    workers: int,
    label: str,
    unit: str,
    kinds: Sequence[str] = ("",),
) -> None:
    """Compute every unfinished part. Its arrays are written to ``work`` as NAME.npy, or NAME.KIND.npy for each kind.

    A progress bar shows ``label`` and counts units of work, each called ``unit``.
    """
    missing = [part for part in parts if not _finished(work, part.name, kinds)]
    total = sum(part.size for part in parts)
    done = total - sum(part.size for part in missing)
    gpus = torch.cuda.device_count()
    workers = min(workers or gpus or len(os.sched_getaffinity(0)), max(1, len(missing)))
    with ProgressBar(label, total, unit, done=done) as bar:
        if workers > 1:
            _compute_in_processes(missing, work, worker, workers, kinds, bar)
        elif missing:
            _compute_here(missing, work, worker, kinds, bar)


def _compute_here(
    missing: Sequence[Part], work: Path, worker: Callable[[], Worker], kinds: Sequence[str], bar: ProgressBar
) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        compute = worker()
        for part in missing:
            _save(work, part.name, compute(part.task, bar.update), kinds)
    finally:
        torch.set_num_threads(threads)


def _compute_in_processes(
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
            # units are reported more often than parts, and the bar needs updates between them
            finished, pending = wait(pending, timeout=POLL, return_when=FIRST_COMPLETED)
            bar.move_to(before + units.value)
            for future in finished:
                future.result()


_worker: Worker | None = None
_units: Any = None


def _start(worker: Callable[[], Worker], count: Any, units: Any, gpus: int) -> None:
    """In a worker process: choose a device and create the worker."""
    global _worker, _units
    torch.set_num_threads(1)
    with count.get_lock():
        number, count.value = count.value, count.value + 1
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": str(number % gpus if gpus else 0)}
    _worker, _units = worker(), units


def _report(count: int) -> None:
    with _units.get_lock():
        _units.value += count


def _work_on(work: Path, part: Part, kinds: Sequence[str]) -> None:
    assert _worker is not None
    _save(work, part.name, _worker(part.task, _report), kinds)


def _files(name: str, kinds: Sequence[str]) -> list[str]:
    return [f"{name}.{kind}.npy" if kind else f"{name}.npy" for kind in kinds]


def _save(work: Path, name: str, arrays: Sequence[np.ndarray], kinds: Sequence[str]) -> None:
    """Write a part and, last, the list of its hashes, which makes it finished."""
    files = {file: save_array(work / file, array) for file, array in zip(_files(name, kinds), arrays, strict=True)}
    write_atomic(work / f"{name}.json", json.dumps(to_record(files)))


def _finished(work: Path, name: str, kinds: Sequence[str]) -> bool:
    """Whether a part is there with exactly the bytes that were written."""
    try:
        files = from_record(strict_json.read_json(work / f"{name}.json"))
        return files.keys() == set(_files(name, kinds)) and not damage(work, files)
    except (OSError, ValueError, AttributeError, KeyError, TypeError):
        return False


def join_parts(names: Sequence[str], work: Path) -> np.ndarray:
    """The arrays of the named parts, one after the other."""
    arrays = [np.load(work / f"{name}.npy", allow_pickle=False) for name in names]
    return np.concatenate(arrays) if arrays else np.empty(0, np.uint8)
