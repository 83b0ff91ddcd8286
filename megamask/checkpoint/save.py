"""Publishing: a checkpoint becomes visible whole, or not at all.

The order is the whole matter. A temporary folder; every rank's file, synced; the manifest with every hash, synced;
the folder, synced; one rename; the parent, synced: durable. Then ``latest``, which is a hint and never believed
over the manifests, and last the removal of what is older than the newest ``keep``. A kill, a full disk or a power
cut between any two leaves the older checkpoints as they were. Saving streams one tensor at a time: it needs no
memory beyond the largest tensor.
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
    RunFolder,
    complete,
    on_all_ranks,
    render_manifest,
    serialise,
    storage_sentence,
)
from megamask.errors import ConfigError, LockError, StorageError, must
from megamask.runtime import ranks
from megamask.storage import durable
from megamask.storage.durable import FileEntry


def save_checkpoint(run: RunFolder, step: int, tensors: Mapping[str, Tensor], state: dict, keep: int = 2) -> str:
    """Make the checkpoint of ``step`` durable and return the line that says so. Collective.

    ``tensors`` are those that this rank writes: each whole tensor is given by exactly one rank. ``state`` is small,
    JSON, and taken from rank 0. The newest ``keep`` checkpoints stay, the others go.

    Raises, on every rank alike, StorageError if any rank could not write (the older checkpoints are untouched and
    training can go on) and LockError if another launch took the run folder over.
    """
    if keep < 2:
        raise ConfigError(must("keep", "be at least 2, since the newest checkpoint may be damaged", keep))
    need = sum(tensor.nbytes for tensor in tensors.values())
    try:
        return _publish(run, step, tensors, state, keep, need)
    except StorageError:
        # whoever takes a folder over sweeps away what was being written there
        if ranks.on_rank_zero(lambda: _lost(run)):
            raise LockError(_taken(run)) from None
        raise


def _publish(run: RunFolder, step: int, tensors: Mapping[str, Tensor], state: dict, keep: int, need: int) -> str:
    began = time.monotonic()
    temporary = ranks.on_rank_zero(lambda: _prepare(run, step))
    if temporary is None:
        return f"checkpoint {step} was durable already"
    try:
        written = on_all_ranks(
            lambda: _write_share(temporary, tensors, state), f"save checkpoint {step}", run.path, need
        )
        names = [name for _, its_names in written for name in its_names]
        assert len(set(names)) == len(names), "a tensor was given by two ranks"
        entries = [entry for its_entries, _ in written for entry in its_entries]
        notes = ranks.on_rank_zero(lambda: _commit(run, step, temporary, entries, keep))
    except BaseException:
        if ranks.is_main():
            durable.remove(temporary)
        raise
    size = sum(entry.size for entry in entries)
    line = f"checkpoint {step} durable: {size / 1e6:,.1f} MB in {time.monotonic() - began:.1f} s"
    return "; ".join([line, *notes])


def _prepare(run: RunFolder, step: int) -> Path | None:
    try:
        _hold(run)
        if complete(run.checkpoint(step)):
            return None  # the same run at the same step has the same content
        temporary = run.checkpoints / f".tmp-step-{step}-{run.launch}"
        durable.remove(temporary)
        durable.make_folder(temporary)
    except OSError as error:
        raise StorageError(storage_sentence(error, f"save checkpoint {step}", run.path)) from None
    return temporary


def _write_share(folder: Path, tensors: Mapping[str, Tensor], state: dict) -> tuple[list[FileEntry], list[str]]:
    if not durable.wait_for_file(lambda: durable.publish_folder(folder)):
        raise StorageError(
            f"{folder} did not become visible within {durable.PATIENCE:g} s; is it on a shared file system?"
        )
    entries = [durable.write_file(folder / f"rank-{ranks.rank():05d}.safetensors", serialise(tensors))]
    if ranks.is_main():
        entries.append(durable.write_file(folder / STATE, [json.dumps(state, indent=1).encode()]))
    durable.sync(folder)
    return entries, list(tensors)


def _hold(run: RunFolder) -> None:
    """LockError if another launch has the folder; a ``run`` without a launch asks for nothing."""
    if run.launch and not durable.holds(run.lock, run.launch):
        raise LockError(_taken(run))


def _lost(run: RunFolder) -> bool:
    try:
        _hold(run)
    except LockError:
        return True
    except OSError:
        pass  # the storage fails, as was said
    return False


def _taken(run: RunFolder) -> str:
    return f"{run.path} was taken over by another launch; this one may write there no more."


def _commit(run: RunFolder, step: int, temporary: Path, entries: list[FileEntry], keep: int) -> list[str]:
    final = run.checkpoint(step)
    try:
        durable.write_file(temporary / MANIFEST, [render_manifest(Manifest(step, run.launch, tuple(entries)))])
        durable.sync(temporary)
        _hold(run)
        if complete(final):
            raise LockError(_taken(run))  # it was not there when this save began
        if final.exists():
            run.set_aside(final, "bad")
        durable.rename(temporary, final)
        durable.sync(run.checkpoints)
    except OSError as error:
        raise StorageError(storage_sentence(error, f"save checkpoint {step}", run.path)) from None
    # from here on the checkpoint is durable: what fails below is a remark, not an error
    try:
        _hold(run)
        durable.replace(run.latest, final.name + "\n")
        _prune(run, step, keep)
    except OSError as error:
        return [storage_sentence(error, "tidy up", run.path)]
    return []


def _prune(run: RunFolder, newest: int, keep: int) -> None:
    # what bears a higher number than the one just made is not of this launch, and does not count
    whole = [step for step in run.steps() if step <= newest and complete(run.checkpoint(step))]
    for step in whole[keep:]:
        # under another name, durably: or a power cut could leave a checkpoint's name over half its files
        durable.remove(run.set_aside(run.checkpoint(step), "trash"))
