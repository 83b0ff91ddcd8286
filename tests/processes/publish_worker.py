"""What the ranks of test_publish.py do."""

from __future__ import annotations

import errno
import os
import random
import select
import signal
import time
from pathlib import Path

import torch

from megamask import files, ranks
from megamask.checkpoint import RunFolder, read_tensors, verify
from megamask.errors import MegamaskError
from megamask.publish import publish
from megamask.runs import open_run

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
    ranks.join()
    last = ranks.rank() == ranks.world() - 1
    start = open_run(folder, CONFIG)
    run, story = start.run, {"fresh": start.step, "launch": start.run.launch}
    publish(run, 9, share(9), {"step": 9}, keep=3)
    real = files.write

    def full(path, chunks):
        next(iter(chunks))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    if last:
        files.write = full
    story["full"] = said(lambda: publish(run, 10, share(10), {"step": 10}, keep=3))
    files.write = real
    ranks.barrier()  # rank 0 has tidied up
    story["after"] = sorted(os.listdir(run.checkpoints))
    ranks.barrier()
    publish(run, 10, share(10), {"step": 10}, keep=3)
    found = dict(read_tensors(run.checkpoint(10)))
    mine = share(10)
    story["tensors"] = len(found)
    story["exact"] = all(torch.equal(found[name], mine[name]) for name in mine)
    publish(run, 11, share(11), {"step": 11}, keep=3)
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
    ranks.leave()
    return story


def kill_loop(folder: str, variant: str, kills: int, seed: int) -> dict:
    """Kill a publisher at random moments and look at what it left, each time."""
    rng = random.Random(seed)
    run = RunFolder(Path(folder))
    broken, inside, acknowledged = [], 0, -1
    for _ in range(kills):
        heard, telling = os.pipe()
        child = os.fork()
        if not child:
            os.close(heard)
            _publish_for_ever(folder, variant, telling)
        os.close(telling)
        os.read(heard, 1)  # its first save begins
        time.sleep(rng.uniform(0, 0.06))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        words = _drain(heard).split()
        steps = [int(word) for word in words if word.isdigit()]
        acknowledged = max([acknowledged, *steps])
        inside += not words or words[-1] == "save"
        broken += _broken(run, acknowledged)
        if broken:
            break
    return {"broken": broken, "inside": inside, "acknowledged": acknowledged}


def _publish_for_ever(folder: str, variant: str, telling: int) -> None:
    try:
        BREAK[variant]()
        start = open_run(folder, CONFIG)
        step = start.step
        os.write(telling, b".")
        while True:
            step += 1
            os.write(telling, b" save")
            publish(start.run, step, share(step), {"step": step}, keep=2)
            os.write(telling, f" {step}".encode())
    finally:
        os._exit(1)


def _drain(pipe: int) -> str:
    parts = []
    while select.select([pipe], [], [], 0)[0] and (part := os.read(pipe, 1 << 16)):
        parts.append(part)
    os.close(pipe)
    return b"".join(parts).decode()


def _broken(run: RunFolder, acknowledged: int) -> list[str]:
    """The promises that do not hold: what bears a checkpoint's name is whole, and nothing acknowledged is lost."""
    found, steps = [], run.steps()
    for step in steps:
        try:
            verify(run.checkpoint(step))
        except MegamaskError as error:
            found.append(str(error))
    if acknowledged > max([-1, *steps]):
        found.append(f"step {acknowledged} is lost")
    if acknowledged > 1 and len(steps) < 2:
        found.append(f"only {steps} are left")
    return found


def _in_place() -> None:
    """Write into the folder with the final name."""
    from megamask import publish as module

    def prepare(run, step):
        run.checkpoint(step).mkdir()
        return run.checkpoint(step)

    rename = files.rename
    module._prepare = prepare
    RunFolder.set_aside = lambda run, folder, why: folder
    files.rename = lambda old, new: None if old == new else rename(old, new)


def _prune_first() -> None:
    """Make room before the new one is durable."""
    from megamask import publish as module

    prepare, prune = module._prepare, module._prune

    def prepare_after_pruning(run, step):
        prune(run, 1)
        return prepare(run, step)

    module._prepare = prepare_after_pruning


BREAK = {"sound": lambda: None, "in place": _in_place, "prune first": _prune_first}
