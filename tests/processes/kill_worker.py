"""Kills of whole trainings: ranks are forks of one process that has imported DeepSpeed, so a launch takes seconds."""

from __future__ import annotations

import faulthandler
import os
import random
import re
import shutil
import subprocess
import time
from collections import Counter, defaultdict
from functools import partial
from pathlib import Path
from statistics import median

import deepspeed  # noqa: F401
import torch
from forked import Tell, fork
from storage_worker import broken

from megamask import pretrain
from megamask.checkpoint.format import read_tensors, verify
from megamask.checkpoint.run_folder import RunFolder
from megamask.checkpoint.save import CheckpointSave
from megamask.runtime import ranks
from megamask.storage import atomic_write, file_list
from megamask.training import finish, loop
from tests.processes.server import free_port
from tests.system.commands import ROOT, metrics, training

STEPS = 6
PHASES = {
    "start": None,
    "build_run": loop,
    "take_step": loop,
    "save": None,
    "validate_sources": loop,
    "finish_run": finish,
}
"""Where each phase of a launch is a function. A save is more than one call, see `_tell_saves`."""
WISHES = (*PHASES, *["save"] * 9)
"""Two of three kills are to come in a save."""


def training_kills(folder: str, data: str, variant: str, kills: int, stages: list[int], world: int, seed: int) -> dict:
    """Kill one rank or all of a training in a random phase, let the same command go on, and kill again.

    What a run came to in the end, after some kills, is compared with the same run without any.
    """
    rng, place = random.Random(seed), Path(folder)
    straight: dict[int, RunFolder] = {}
    lasts: dict[str, list[float]] = defaultdict(list)
    counted = Counter({"kills": 0, "inside a save": 0, "runs": 0, "launches": 0, "differ": 0})
    phases: Counter[str] = Counter()
    lost: list[str] = []
    while counted["kills"] < kills and not lost:
        stage = stages[counted["runs"] % len(stages)]
        if stage not in straight:
            straight[stage] = RunFolder(place / f"straight-{stage}")
            words, codes = _launch(straight[stage], data, "sound", stage, world, lasts)
            assert codes == [0] * world, words
        run = RunFolder(place / f"run-{counted['runs']}")
        acknowledged, codes = -1, []
        while codes != [0] * world and not lost:
            wish = rng.choice(WISHES) if counted["kills"] < kills else ""
            words, codes = _launch(run, data, variant, stage, world, lasts, wish, rng)
            counted["launches"] += 1
            print(dict(counted), stage, wish, words, codes, flush=True)
            lines = words.split()
            acknowledged = max(acknowledged, *(int(word[6:]) for word in lines if word.startswith("saved-")), -1)
            if any(code < 0 for code in codes):
                counted["kills"] += 1
                counted["inside a save"] += lines.count("save") > sum(word.startswith("saved-") for word in lines)
                phases[lines[-1]] += 1
            elif codes != [0] * world:
                lost.append(f"launch {counted['launches']}: ended with {codes}")
            lost += [f"launch {counted['launches']}, {lines[-1]}: {what}" for what in broken(run, acknowledged)]
        counted["runs"] += 1
        counted["differ"] += not lost and not _same(run, straight[stage])
    log = [line for path in sorted(place.glob("*.log")) for line in path.read_text().splitlines()[-30:]]
    return {**counted, "phases": dict(phases), "lost": lost, "log": log[-200:] if lost else []}


def _launch(
    run: RunFolder, data: str, variant: str, stage: int, world: int, lasts: dict, wish: str = "",
    rng: random.Random | None = None,
) -> tuple[str, list[int]]:  # fmt: skip
    """One launch, killed in the phase ``wish`` if it comes there: what was told, and how each rank ended."""
    command = _command(run, data, stage, background=variant == "background")
    team = fork(world, partial(_train, command, run.path.with_suffix(".log"), variant), free_port())
    words, phase, since = "", "start", {"start": time.monotonic()}
    until = 1 + (rng.randrange(STEPS - 1) if rng and wish in ("take_step", "save") else 0)
    while wish and (more := team.hear(180)):
        words += more
        for word in more.split():
            if word in PHASES:
                phase, since[word] = word, time.monotonic()
            else:
                ended = "save" if word.startswith("saved-") else phase
                lasts[ended].append(time.monotonic() - since[ended])
            until -= word == wish
        if until <= 0 and rng:
            time.sleep(rng.uniform(0, 0.8 * median(lasts[wish] or [0.5])))
            team.kill(rng.choice([None, *range(world)]))
            break
    # a rank that meets nobody waits for minutes; its launcher ends it
    more, codes = team.end(20, hangs=True) if until <= 0 and wish else team.end(300)
    return words + more, codes


def _command(run: RunFolder, data: str, stage: int, *, background: bool = False) -> list[str]:
    how = {"checkpoint__background": True} if background else {}
    command = training(Path(data), run.path, steps=STEPS, checkpoint__every=1, validation__every=3, export=True, **how)
    return [*command, "--deepspeed", str(ROOT / f"ds_configs/zero{stage}.json")]


def _train(command: list[str], log: Path, variant: str, tell: Tell) -> None:
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    faulthandler.enable(file)  # a rank that hangs is aborted, and shows where it was
    BREAK[variant]()
    if ranks.is_main():
        tell(" start")
        for name, module in PHASES.items():
            if module:
                setattr(module, name, _told(name, getattr(module, name), tell))
        _tell_saves(tell)
    ranks.exit_process(pretrain.main(command))


def _told(name: str, act, tell: Tell):
    def acts(*given, **named):
        tell(f" {name}")
        result = act(*given, **named)
        tell(" done")
        return result

    return acts


def _tell_saves(tell: Tell) -> None:
    """Tell when a save begins and when it is reported, steps later if it is written in the background."""
    begin, go_on = CheckpointSave.__init__, CheckpointSave._next

    def begins(save, *given, **named):
        tell(" save")
        begin(save, *given, **named)

    def goes_on(save):
        if line := go_on(save):
            tell(f" saved-{save.step}")
        return line

    CheckpointSave.__init__, CheckpointSave._next = begins, goes_on


def _same(one: RunFolder, other: RunFolder) -> bool:
    """Whether two runs came to the same weights, moments and figures, bit for bit."""
    ours, theirs = (dict(read_tensors(run.checkpoint(STEPS))) for run in (one, other))
    same = ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in theirs)
    exported = [(run.export / "model.safetensors").read_bytes() for run in (one, other)]
    return same and metrics(one.path) == metrics(other.path) and exported[0] == exported[1]


def _forgetful() -> None:
    """Weights go on from the checkpoint, moments from zero."""
    from megamask.engine.engine import Engine

    restore = Engine.restore

    def restore_weights(engine, read, *, steps):
        def weights(name):
            tensor = read(name)
            return tensor if tensor is None or re.match("weights/", name) else torch.zeros_like(tensor)

        restore(engine, weights, steps=steps)

    Engine.restore = restore_weights


def _in_place() -> None:
    """Write into the folder with the final name, one block at a time."""
    from storage_worker import BREAK as PUBLISHERS

    file_list.BLOCK = 1 << 12
    PUBLISHERS["in place"]()


def _slowly() -> None:
    """Write so slowly that training goes on meanwhile."""
    write = atomic_write.write_file

    def slow(chunks):
        for chunk in chunks:
            time.sleep(0.005)
            yield chunk

    file_list.BLOCK = 1 << 14
    atomic_write.write_file = lambda path, chunks: write(path, slow(chunks))


BREAK = {"sound": lambda: None, "background": _slowly, "forgetful": _forgetful, "in place": _in_place}


# ---- a disk that is full


def training_on_a_full_disk(folder: str, data: str, world: int, stage: int, background: bool = False) -> dict:
    """A training whose small disk is full during its second save, and again from the fourth on, until it gives up.

    Then somebody makes room and the same command goes on. What came of it, and what was told.
    """
    disk = Path(folder) / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "none", disk], check=True)
    straight, run = RunFolder(Path(folder) / "straight"), RunFolder(disk / "run")
    words, codes = _launch(straight, data, "sound", stage, world, defaultdict(list))
    assert codes == [0] * world, words
    command = _command(run, data, stage, background=background)
    log, ends = Path(folder) / "full.log", []
    for fills in ({2: True, 3: False, 4: True}, {}):
        words, codes = fork(world, partial(_train_full, command, log, disk / "ballast", fills), free_port()).end(300)
        ends.append(codes)
        left = {step: verify(run.checkpoint(step)).step for step in run.steps()}
        (disk / "ballast").unlink(missing_ok=True)
        ends.append(sorted(left))
    return {"ends": ends, "same": _same(run, straight), "log": log.read_text()}


def _train_full(command: list[str], log: Path, ballast: Path, fills: dict[int, bool], tell: Tell) -> None:
    begin = CheckpointSave.__init__

    def begins(save, run, step, *given, **named):
        if ranks.is_main():
            ballast.unlink(missing_ok=True)
            if fills.get(step, step > 4 and bool(fills)):
                with ballast.open("wb") as file:
                    os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(ballast.parent).free)
        ranks.barrier()
        begin(save, run, step, *given, **named)

    CheckpointSave.__init__ = begins
    _train(command, log, "sound", lambda words: None)
