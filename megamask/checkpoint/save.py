"""Save a checkpoint: it becomes visible as a whole, or not at all.

The order of the operations ensures that. A temporary folder; the file of every rank, synced; the manifest with every
hash, synced; the folder, synced; one rename; the parent folder, synced. Now the checkpoint is durable. Then `latest` is
written, which is only a hint, since the manifests decide. Last, checkpoints older than the newest ``keep`` are deleted.
A kill, a full disk or a power cut between any two operations leaves the older checkpoints as they were. Saving streams
one tensor at a time, so it needs no memory beyond the largest tensor.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from megamask.checkpoint.format import (
    MANIFEST,
    STATE,
    Manifest,
    complete,
    on_all_ranks,
    render_manifest,
    serialise,
    storage_sentence,
)
from megamask.checkpoint.run_folder import RunFolder
from megamask.errors import ConfigError, LockError, StorageError, must
from megamask.runtime import ranks
from megamask.storage import atomic_write, lock
from megamask.storage.file_list import FileList


def save_checkpoint(run: RunFolder, step: int, tensors: Mapping[str, Tensor], state: dict, keep: int = 2) -> str:
    """Save the checkpoint of ``step`` and return the line for the log. Collective.

    ``tensors`` are those that this rank writes: exactly one rank passes each tensor, whole. ``state`` is small, can be
    represented in JSON, and is taken from rank 0. The newest ``keep`` checkpoints stay, the others are deleted.

    Raises, on all ranks, StorageError if any rank could not write (the older checkpoints are unchanged and training can
    continue) and LockError if another launch took over the run folder.
    """
    if keep < 2:
        raise ConfigError(must("keep", "be at least 2, since the newest checkpoint may be damaged", keep))
    need = sum(tensor.nbytes for tensor in tensors.values())
    try:
        return _save(run, step, tensors, state, keep, need)
    except StorageError:
        # a launch that takes over a folder deletes what this one was writing there
        if ranks.on_rank_zero(lambda: _is_lost(run)):
            raise LockError(_taken_over(run)) from None
        raise


def _save(run: RunFolder, step: int, tensors: Mapping[str, Tensor], state: dict, keep: int, need: int) -> str:
    start = time.monotonic()
    temporary = ranks.on_rank_zero(lambda: _prepare(run, step))
    if temporary is None:
        return f"checkpoint {step} was saved already"
    try:
        shares = on_all_ranks(
            lambda: _write_share(temporary, tensors, state), f"save checkpoint {step}", run.path, need
        )
        names = [name for _, tensor_names in shares for name in tensor_names]
        assert len(set(names)) == len(names), "two ranks passed the same tensor"
        files = {name: entry for share, _ in shares for name, entry in share.items()}
        notes = ranks.on_rank_zero(lambda: _commit(run, step, temporary, files, keep))
    except BaseException:
        if ranks.is_main():
            atomic_write.remove(temporary)
        raise
    size = sum(entry.bytes for entry in files.values())
    line = f"checkpoint {step} saved: {size / 1e6:,.1f} MB in {time.monotonic() - start:.1f} s"
    return "; ".join([line, *notes])


def _prepare(run: RunFolder, step: int) -> Path | None:
    try:
        _check_lock(run)
        if complete(run.checkpoint(step)):
            return None  # the same run at the same step has the same content
        temporary = run.checkpoints / f".tmp-step-{step}-{run.launch}"
        atomic_write.remove(temporary)
        atomic_write.make_folder(temporary)
    except OSError as error:
        raise StorageError(storage_sentence(error, f"save checkpoint {step}", run.path)) from None
    return temporary


def _write_share(folder: Path, tensors: Mapping[str, Tensor], state: dict) -> tuple[FileList, list[str]]:
    if not atomic_write.wait_until(lambda: atomic_write.is_visible(folder)):
        raise StorageError(
            f"{folder} did not become visible within {atomic_write.PATIENCE:g} s. Is it on a shared file system?"
        )
    name = f"rank-{ranks.rank():05d}.safetensors"
    files = {name: atomic_write.write_file(folder / name, serialise(tensors))}
    if ranks.is_main():
        files[STATE] = atomic_write.write_file(folder / STATE, [json.dumps(state, indent=1).encode()])
    atomic_write.sync(folder)
    return files, list(tensors)


def _check_lock(run: RunFolder) -> None:
    """LockError if the folder belongs to another launch. A ``run`` without a launch has no lock."""
    if run.launch and not lock.names_launch(run.lock, run.launch):
        raise LockError(_taken_over(run))


def _is_lost(run: RunFolder) -> bool:
    try:
        _check_lock(run)
    except LockError:
        return True
    except OSError:
        pass  # the storage fails, which the caller reports
    return False


def _taken_over(run: RunFolder) -> str:
    return f"Another launch took over {run.path}, so this one must not write there any more."


def _commit(run: RunFolder, step: int, temporary: Path, files: FileList, keep: int) -> list[str]:
    final = run.checkpoint(step)
    try:
        atomic_write.write_file(temporary / MANIFEST, [render_manifest(Manifest(step, run.launch, files))])
        atomic_write.sync(temporary)
        _check_lock(run)
        if complete(final):
            raise LockError(_taken_over(run))  # it did not exist when this save began
        if final.exists():
            run.rename_unused(final, "bad")
        atomic_write.rename(temporary, final)
        atomic_write.sync(run.checkpoints)
    except OSError as error:
        raise StorageError(storage_sentence(error, f"save checkpoint {step}", run.path)) from None
    # from here on the checkpoint is durable: a failure below is a note, not an error
    try:
        _check_lock(run)
        atomic_write.write_atomic(run.latest, final.name + "\n")
        _prune(run, step, keep)
    except OSError as error:
        return [storage_sentence(error, "tidy up", run.path)]
    return []


def _prune(run: RunFolder, newest: int, keep: int) -> None:
    # a checkpoint with a higher number is not from this launch and does not count
    steps = [step for step in run.steps() if step <= newest and complete(run.checkpoint(step))]
    for step in steps[keep:]:
        # rename it durably first: a power cut must not leave the name of a checkpoint on half of its files
        atomic_write.remove(run.rename_unused(run.checkpoint(step), "trash"))
