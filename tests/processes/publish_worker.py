"""What the ranks of test_publish.py do."""

from __future__ import annotations

import errno
import os

import torch

from megamask.checkpoint.format import read_tensors
from megamask.checkpoint.resume import open_run
from megamask.checkpoint.save import save_checkpoint
from megamask.errors import MegamaskError
from megamask.runtime import ranks
from megamask.storage import atomic_write

CONFIG = {"depth": 2}


def share(step: int) -> dict[str, torch.Tensor]:
    """What this rank writes: tensors of its own."""
    rng = torch.Generator().manual_seed(1000 * step + ranks.rank())
    return {f"weights/{ranks.rank()}.{i}": torch.randn(50, 10, generator=rng) for i in range(3)}


def said(act) -> str:
    """What ``act`` said, or the error that it raised."""
    try:
        return str(act())
    except MegamaskError as error:
        return f"{type(error).__name__}: {error}"


def life(folder: str) -> dict:
    """A run of two launches, with a full disk on the last rank and a damaged file of the last rank."""
    ranks.init_process_group()
    last = ranks.rank() == ranks.world() - 1
    start = open_run(folder, CONFIG)
    run, story = start.run, {"fresh": start.step, "launch": start.run.launch}
    save_checkpoint(run, 9, share(9), {"step": 9}, keep=3)
    real = atomic_write.write_file

    def full(path, chunks):
        next(iter(chunks))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    if last:
        atomic_write.write_file = full
    story["full"] = said(lambda: save_checkpoint(run, 10, share(10), {"step": 10}, keep=3))
    atomic_write.write_file = real
    ranks.barrier()  # rank 0 has tidied up
    story["after"] = sorted(os.listdir(run.checkpoints))
    ranks.barrier()
    save_checkpoint(run, 10, share(10), {"step": 10}, keep=3)
    saved = dict(read_tensors(run.checkpoint(10)))
    own = share(10)
    story["tensors"] = len(saved)
    story["exact"] = all(torch.equal(saved[name], own[name]) for name in own)
    save_checkpoint(run, 11, share(11), {"step": 11}, keep=3)
    ranks.barrier()
    start.close()

    story["other"] = said(lambda: open_run(folder, {"depth": 3}))
    story["never"] = said(lambda: open_run(folder, CONFIG, "never"))
    if last:
        path = run.checkpoint(11) / f"rank-{ranks.rank():05d}.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
    ranks.barrier()
    again = open_run(folder, CONFIG)
    story["resumed"], story["notes"] = again.step, again.notes
    ranks.destroy_process_group()
    return story
