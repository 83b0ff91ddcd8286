"""Save a checkpoint: it becomes visible as a whole, or not at all.

The order of the operations ensures that. A temporary folder; the file of every rank, synced; the manifest with every
hash, synced; the folder, synced; one rename; the parent folder, synced. Now the checkpoint is durable. Then `latest` is
written, which is only a hint, since the manifests decide. Last, checkpoints older than the newest ``keep`` are deleted.
A kill, a full disk or a power cut between any two operations leaves the older checkpoints as they were. Of a stream of
tensors, a save needs the memory of one window.

A save in the background is the same, in threads: training goes on while they write and publish.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
from megamask.storage.tensor_stream import TensorStream, as_stream


def save_checkpoint(run: RunFolder, step: int, tensors: Mapping[str, Tensor], state: dict, keep: int = 2) -> str:
    """Save the checkpoint of ``step`` and return the line for the log. Collective.

    Arguments and errors are those of `CheckpointSave`.
    """
    return CheckpointSave(run, step, tensors, state, keep).finish()


class CheckpointSave:
    """A save: every rank writes its share, then rank 0 publishes the checkpoint. Every method is collective.

    In the ``background`` a thread of each rank does its part while the caller goes on. The threads only work on files.
    Ranks agree in the calls, so the caller calls `advance` from time to time, and `finish` to wait for the end.

    The methods raise, on all ranks, StorageError if any rank could not write (the older checkpoints are unchanged and
    training can continue) and LockError if another launch took over the run folder. After an error the save is over.
    """

    def __init__(
        self,
        run: RunFolder,
        step: int,
        tensors: Mapping[str, Tensor] | TensorStream,
        state: dict,
        keep: int = 2,
        *,
        background: bool = False,
    ):
        """Begin to save the checkpoint of ``step``.

        ``tensors`` are those that this rank writes: exactly one rank passes each tensor, whole. In the background they
        must not change until they are written, so they cannot be a stream. ``state`` is small, can be represented in
        JSON, and is taken from rank 0, as it is now. The newest ``keep`` checkpoints stay, the others are deleted.
        """
        if keep < 2:
            raise ConfigError(must("keep", "be at least 2, since the newest checkpoint may be damaged", keep))
        self._run, self.step, self._keep, self._background = run, step, keep, background
        assert not (background and isinstance(tensors, TensorStream)), (
            "the ranks gather a stream together, which threads must not do"
        )
        stream = as_stream(tensors)
        self._need = sum(tensor.nbytes for tensor in stream.meta.values())
        self._begun = time.monotonic()
        self._files: FileList = {}
        """Those of all ranks, once they are written."""
        self._part: Future[Any] = Future()
        """What this rank does now: it writes, or it publishes."""
        self._folder: Path | None = None
        """The temporary folder; None if the checkpoint exists."""
        content = b""

        def prepare() -> Path | None:
            nonlocal content
            content = json.dumps(state, indent=1).encode()
            return _prepare(run, step)

        with self._cleaning_up():
            self._folder = folder = ranks.on_rank_zero(prepare)
            if folder is not None:
                self._part = _start(lambda: _write_share(folder, stream, content), background)

    def advance(self) -> str | None:
        """Go on with the save if all ranks have done their part; the line for the log once it is published."""
        if self._folder is not None and ranks.any_rank(not self._part.done()):
            return None
        return self._next()

    def finish(self) -> str:
        """Wait until the checkpoint is published; returns the line for the log."""
        while (line := self._next()) is None:
            pass
        return line

    def _next(self) -> str | None:
        """Wait for the parts of all ranks and begin the next; the line for the log if there is none."""
        if self._folder is None:
            return f"checkpoint {self.step} was saved already"
        with self._cleaning_up():
            if self._files:
                notes = ranks.on_rank_zero(self._part.result)
                return "; ".join([self._line(), *notes])
            shares = on_all_ranks(self._part.result, f"save checkpoint {self.step}", self._run.path, self._need)
        names = [name for _, tensor_names in shares for name in tensor_names]
        assert len(set(names)) == len(names), "two ranks passed the same tensor"
        self._files = {name: entry for share, _ in shares for name, entry in share.items()}
        if ranks.is_main():
            run, step, folder, files, keep = self._run, self.step, self._folder, self._files, self._keep
            self._part = _start(lambda: _commit(run, step, folder, files, keep), self._background)
        return None

    def _line(self) -> str:
        size, seconds = sum(entry.bytes for entry in self._files.values()), time.monotonic() - self._begun
        how = " in the background" if self._background else ""
        return f"checkpoint {self.step} saved: {size / 1e6:,.1f} MB in {seconds:.1f} s{how}"

    @contextmanager
    def _cleaning_up(self) -> Iterator[None]:
        """Remove the temporary folder after an error, and raise LockError if another launch is the reason."""
        try:
            yield
        except BaseException as error:
            if ranks.is_main() and self._folder is not None:
                atomic_write.remove(self._folder)
            # a launch that takes over a folder deletes what this one was writing there
            if isinstance(error, StorageError) and ranks.on_rank_zero(lambda: _is_lost(self._run)):
                raise LockError(_taken_over(self._run)) from None
            raise


def _start(act: Callable[[], Any], background: bool) -> Future[Any]:
    """Call ``act`` in a thread, or at once."""
    outcome: Future[Any] = Future()

    def work() -> None:
        try:
            outcome.set_result(act())
        except BaseException as error:  # raised where the result is needed
            outcome.set_exception(error)

    if background:
        threading.Thread(target=work, name="checkpoint", daemon=True).start()
    else:
        work()
    return outcome


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


def _write_share(folder: Path, tensors: TensorStream, state: bytes) -> tuple[FileList, list[str]]:
    """Write the files of this rank; returns their entries and the names of the tensors."""
    try:
        return _write_files(folder, tensors, state), list(tensors.meta)
    finally:
        tensors.finish()


def _write_files(folder: Path, tensors: TensorStream, state: bytes) -> FileList:
    """Write the file of this rank, unless it has no tensors, and on rank 0 the state."""
    if not tensors.meta and not ranks.is_main():
        return {}
    if not atomic_write.wait_until(lambda: atomic_write.is_visible(folder)):
        raise StorageError(
            f"{folder} did not become visible within {atomic_write.VISIBILITY_TIMEOUT:g} s. Is it on a shared file "
            "system?"
        )
    name = f"rank-{ranks.rank():05d}.safetensors"
    files = {name: atomic_write.write_file(folder / name, serialise(tensors))}
    if ranks.is_main():
        files[STATE] = atomic_write.write_file(folder / STATE, [state])
    atomic_write.sync(folder)
    return files


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
