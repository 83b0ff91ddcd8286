"""Work in parts, by any number of processes, that goes on after a kill.

A part is a function of what it is told, and its arrays are files; it counts once a record of their hashes is written.
On a CPU every process computes in one thread, since sums depend on how they are shared out: so the bytes do not depend
on the number of processes. Each GPU gets its share of the processes.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import as_completed
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from megamask import records
from megamask import work as working
from megamask.data.shards import file_hash, save_array
from megamask.errors import must

Part = tuple[str, Any]
"""The name of a part's files, and what its worker must know of it."""
Worker = Callable[[Any], Sequence[np.ndarray]]
"""Makes the arrays of a part."""


def make(
    parts: Sequence[Part],
    work: Path,
    worker: Callable[[], Worker],
    workers: int,
    label: str,
    kinds: Sequence[str] = ("",),
) -> None:
    """Make every part that is not finished; its arrays lie in ``work`` as NAME.npy, or NAME.KIND.npy for each kind."""
    missing = [part for part in parts if not _finished(work, part[0], kinds)]
    with tqdm(total=len(parts), initial=len(parts) - len(missing), unit="part", desc=label, disable=None) as bar:
        for _ in _done(missing, work, worker, workers, kinds):
            bar.update()


def _done(missing: Sequence[Part], work: Path, worker: Callable[[], Worker], workers: int, kinds) -> Iterator[None]:
    gpus = torch.cuda.device_count()
    workers = min(workers or gpus or len(os.sched_getaffinity(0)), max(1, len(missing)))
    if not missing:
        return
    if workers == 1:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            act = worker()
            for name, told in missing:
                _save(work, name, act(told), kinds)
                yield
        finally:
            torch.set_num_threads(threads)
        return
    with working.processes(workers, _start, worker, working.SPAWN.Value("i", 0), gpus) as pool:
        for future in as_completed([pool.submit(_work_on, work, name, told, kinds) for name, told in missing]):
            future.result()
            yield


_mine: Worker | None = None


def _start(worker: Callable[[], Worker], count: Any, gpus: int) -> None:
    """In a worker process: take a device, and begin."""
    global _mine
    torch.set_num_threads(1)
    with count.get_lock():
        number, count.value = count.value, count.value + 1
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": str(number % gpus if gpus else 0)}
    _mine = worker()


def _work_on(work: Path, name: str, told: Any, kinds: Sequence[str]) -> None:
    assert _mine is not None
    _save(work, name, _mine(told), kinds)


def _files(name: str, kinds: Sequence[str]) -> list[str]:
    return [f"{name}.{kind}.npy" if kind else f"{name}.npy" for kind in kinds]


def _save(work: Path, name: str, made: Sequence[np.ndarray], kinds: Sequence[str]) -> None:
    """Write a part; the record of its hashes, without which it does not count, comes last."""
    files = _files(name, kinds)
    for file, array in zip(files, made, strict=True):
        save_array(work / file, array)
    record = work / f"{name}.json"
    beside = record.with_suffix(f".{os.getpid()}")
    beside.write_text(json.dumps({file: file_hash(work / file) for file in files}))
    beside.rename(record)


def _finished(work: Path, name: str, kinds: Sequence[str]) -> bool:
    """Whether a part is there, byte for byte as it was written."""
    try:
        record = records.read_json(work / f"{name}.json")
        return all(file_hash(work / file) == record[file] for file in _files(name, kinds))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def joined(names: Sequence[str], work: Path) -> np.ndarray:
    found = [np.load(work / f"{name}.npy", allow_pickle=False) for name in names]
    return np.concatenate(found) if found else np.empty(0, np.uint8)


def problems(workers: int) -> list[str]:
    """Sentences for what is wrong with a number of processes."""
    return [must("workers", "be 0 or more", workers)] if workers < 0 else []
