"""Hundreds of faults of storage and of its writers, on forked ranks. Each loop returns its counts.

``variant`` names a way of saving that is broken ("sound" is not): an error that a loop finds in the sound one is a bug,
and an error that it does not find in a broken one is a gap in the loop.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import resource
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from forked import Team, Tell, fork

from megamask.checkpoint import resume
from megamask.checkpoint import save as publishing
from megamask.checkpoint.format import verify
from megamask.checkpoint.resume import RunStart, open_run
from megamask.checkpoint.run_folder import RunFolder
from megamask.checkpoint.save import CheckpointSave, save_checkpoint
from megamask.errors import LockError, MegamaskError, StorageError
from megamask.runtime import ranks
from megamask.storage import atomic_write, file_list, lock

CONFIG = {"depth": 2}
OPERATIONS = ("make_folder", "write_file", "sync", "rename", "remove")


def share(step: int, size: int = 1500) -> dict[str, torch.Tensor]:
    """What this rank writes: a tensor of its own."""
    return {f"weights/{ranks.rank()}": torch.full((size,), step + ranks.rank() / 8)}


def save(run: RunFolder, step: int, size: int = 1500) -> None:
    save_checkpoint(run, step, share(step, size), {"step": step}, keep=2)


def save_in_background(run: RunFolder, step: int) -> None:
    """`save` while the ranks do other work, as in a training."""
    saving = CheckpointSave(run, step, share(step), {"step": step}, keep=2, background=True)
    while saving.advance() is None:
        pass


def begin(folder: Path) -> RunStart:
    """A launch, without asking git for the commit."""
    resume.environment = dict
    return open_run(folder, CONFIG)


def prepared(folder: Path, steps: int = 2, world: int = 2, size: int = 1500) -> RunFolder:
    """A run that saved at steps 1, 2 and so on, and ended."""

    def act(tell: Tell) -> None:
        start = begin(folder)
        for step in range(1, steps + 1):
            save(start.run, step, size)
        start.close()

    _, codes = fork(world, act).end()
    assert codes == [0] * world
    return RunFolder(folder)


def broken(run: RunFolder, acknowledged: int) -> list[str]:
    """The broken promises: a folder with the name of a checkpoint is valid, nothing acknowledged is lost."""
    problems, steps = [], run.steps()
    for step in steps:
        try:
            verify(run.checkpoint(step))
        except MegamaskError as error:
            problems.append(str(error))
    if acknowledged > max([-1, *steps]):
        problems.append(f"step {acknowledged} is lost")
    if acknowledged > 1 and len(steps) < 2:
        problems.append(f"only {steps} are left")
    if run.latest.exists() and not run.checkpoints.joinpath(run.latest.read_text().strip()).is_dir():
        problems.append(f"latest names {run.latest.read_text().strip()}, which is not there")
    return problems


# ---- kills at random moments


def kill_loop(folder: str, variant: str, kills: int, seed: int, world: int = 3) -> dict:
    """Kill one or all of ``world`` ranks that save, at random moments, and check what is left."""
    rng = random.Random(seed)
    lost, inside, saves, acknowledged, tried = [], 0, 0, -1, 0
    run = RunFolder(Path(folder) / "run")
    while tried < kills and not lost:
        if tried % 100 == 0:  # the record of launches grows
            shutil.rmtree(run.path, ignore_errors=True)
            saves, acknowledged = saves + max(0, acknowledged), -1
        team = fork(world, partial(_publish_for_ever, run.path, variant))
        words = team.hear()  # its first save begins
        time.sleep(rng.uniform(0, 0.06))
        team.kill(rng.choice([None, *range(world)]))
        more, _ = team.end()
        tried += 1
        lines = (words + more).split()
        acknowledged = max(acknowledged, *(int(word) for word in lines if word.isdigit()), -1)
        inside += lines[-1] == "save"
        lost = broken(run, acknowledged)
    return {"kills": tried, "inside a save": inside, "saves": saves + max(0, acknowledged), "lost": lost}


def _publish_for_ever(folder: Path, variant: str, tell: Tell) -> None:
    BREAK[variant]()
    start = begin(folder)
    say = tell if ranks.is_main() else lambda words: None
    publish = save_in_background if variant == "background" else save
    for step in itertools.count(start.step + 1):
        say(" save")
        publish(start.run, step)
        say(f" {step}")


def _in_place() -> None:
    """Write into the folder with the final name."""

    def prepare(run, step):
        run.checkpoint(step).mkdir()
        return run.checkpoint(step)

    rename = atomic_write.rename
    publishing._prepare = prepare
    publishing.complete = lambda folder: False
    RunFolder.rename_unused = lambda run, folder, why: folder
    atomic_write.rename = lambda old, new: None if old == new else rename(old, new)


def _prune_first() -> None:
    """Delete older ones before the new one is durable."""
    prepare, prune = publishing._prepare, publishing._prune

    def prepare_after_pruning(run, step):
        prune(run, step, 1)
        return prepare(run, step)

    publishing._prepare = prepare_after_pruning


def _latest_first() -> None:
    """Name the new one before it is durable, as DeepSpeed does."""
    prepare = publishing._prepare

    def prepare_after_naming(run, step):
        atomic_write.write_atomic(run.latest, f"step-{step}\n")
        return prepare(run, step)

    publishing._prepare = prepare_after_naming


BREAK = {
    "sound": lambda: None,
    "background": lambda: None,
    "in place": _in_place,
    "prune first": _prune_first,
    "latest first": _latest_first,
}


# ---- a kill at each point


def at_point(nth: int, do: Callable[[], None], tell: Tell) -> None:
    """Call ``do`` before the ``nth`` moment: each operation of `durable` is one, and the middle of a file another."""
    moments = itertools.count()

    def point(name: str) -> None:
        if next(moments) == nth:
            tell(f" {name}")
            do()

    def around(name: str) -> Callable:
        act = getattr(atomic_write, name)

        def acts(path, *given):
            point(f"{name}-{path.name}")
            return act(path, *given)

        def writes(path, chunks):
            def halfway() -> Iterator[bytes | memoryview]:
                for chunk in chunks:
                    yield chunk[: len(chunk) // 2]
                    point(f"middle-{path.name}")
                    yield chunk[len(chunk) // 2 :]

            point(f"write-{path.name}")
            return act(path, halfway())

        return writes if name == "write_file" else acts

    for name in OPERATIONS:
        setattr(atomic_write, name, around(name))


def crash_points(folder: str, background: bool = False) -> dict:
    """Kill one of two ranks at each point of a save; then a new launch must save the same step."""
    publish = save_in_background if background else save
    template = prepared(Path(folder) / "template")
    points, lost = [], []
    for rank in (0, 1):
        for nth in itertools.count():
            run = RunFolder(shutil.copytree(template.path, Path(folder) / f"{rank}-{nth}"))

            def act(tell: Tell, run=run, rank=rank, nth=nth) -> None:
                start = begin(run.path)
                if ranks.rank() == rank:
                    at_point(nth, lambda: os.kill(os.getpid(), signal.SIGKILL), tell)
                publish(start.run, 3)

            words, codes = fork(2, act).end()
            if codes == [0, 0]:
                break
            assert codes[rank] == -signal.SIGKILL and words
            points.append(f"{rank}: {words.strip()}")
            lost += [f"{points[-1]}: {problem}" for problem in broken(run, 2)]
            lost += [f"{points[-1]}: the next launch fails"] * (again(run) != [0, 0])
            lost += [f"{points[-1]}: after it: {problem}" for problem in broken(run, 4)]
            shutil.rmtree(run.path)
    return {"points": points, "lost": lost}


def again(run: RunFolder) -> list[int]:
    """Go on with a run of two ranks: save steps 3 and 4."""

    def act(tell: Tell) -> None:
        start = begin(run.path)
        for step in (3, 4):
            save(start.run, step)
        start.close()

    return fork(2, act).end()[1]


# ---- two launches


def take_overs(folder: str, variant: str, rounds: int) -> dict:
    """Stop a launch at each point of a save, in turn; another takes over and saves; then the first one wakes.

    The lock of the operating system is made not to work, as on a file system that has none between two hosts.
    """
    template = prepared(Path(folder) / "template", world=1)
    counted = {"rounds": 0, "refused": 0, "published": []}
    nth = -1
    while counted["rounds"] < rounds:
        nth += 1
        run = RunFolder(shutil.copytree(template.path, Path(folder) / str(counted["rounds"])))
        old = fork(1, partial(_sleep_in_a_save, run.path, nth, variant))
        words = old.hear()
        if words != " asleep":
            nth = -1  # there are no more points
            more, codes = old.end()
            assert codes == [0], f"{words}{more} {codes}"
            shutil.rmtree(run.path)
            continue
        _stopped(old)
        new, codes = fork(1, partial(_take_over, run.path)).end()
        assert codes == [0], new
        before = {step: verify(run.checkpoint(step)) for step in run.steps()}
        old.kill(0, signal.SIGCONT)
        _, codes = old.end()
        counted["rounds"] += 1
        counted["refused"] += codes == [LockError.exit_code]
        after = {step: verify(run.checkpoint(step)) for step in run.steps()}
        if after != before or codes != [LockError.exit_code]:
            counted["published"].append(f"point {nth}: code {codes[0]}, {sorted(after)} after {sorted(before)}")
        shutil.rmtree(run.path)
    return counted


def _stopped(team: Team) -> None:
    os.waitid(os.P_PID, team.pids[0], os.WSTOPPED | os.WNOWAIT)


def _no_lock(*_: object) -> None:
    raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))


def _sleep_in_a_save(folder: Path, nth: int, variant: str, tell: Tell) -> None:
    os.environ["SLURM_JOB_ID"] = "17"
    lock.fcntl.flock = _no_lock
    start = begin(folder)
    if variant == "no fence":
        lock.names_launch = lambda path, launch: True

    asleep = []

    def sleep() -> None:
        if not asleep:
            asleep.append(True)
            tell(" asleep")
            os.kill(os.getpid(), signal.SIGSTOP)

    at_point(nth, sleep, lambda words: None)
    save(start.run, 3)
    asleep.append(True)
    tell(" awake")
    save(start.run, 9)  # a launch that was stopped after the rename is refused here


def _take_over(folder: Path, tell: Tell) -> None:
    os.environ["SLURM_JOB_ID"] = "17"  # the same job, requeued
    lock.fcntl.flock = _no_lock
    lock.socket.gethostname = lambda: "another"
    start = begin(folder)
    for step in (start.step + 1, start.step + 2):
        save(start.run, step)
    start.close()


# ---- storage that is full or fails


def full_disks(folder: str, variant: str, levels: int) -> dict:
    """A tmpfs with room for a tenth of a checkpoint, and so on up to 2.2; then one rank alone that cannot write."""
    size = 1 << 16
    counted = {"levels": 0, "failed": 0, "saved": 0, "wrong": []}
    faults: list[tuple[str, float]] = [("full", 0.1 + 2.1 * n / (levels - 1)) for n in range(levels)]
    faults += [("limit", 0.05 + 0.9 * n / (levels - 1)) for n in range(levels)]
    faults += [("fails", number) for number in (errno.EIO, errno.EROFS, errno.ESTALE, errno.EDQUOT)]
    for kind, level in faults:
        place = Path(folder) / f"{kind}-{level}"
        place.mkdir()
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", place], check=True)
        run = prepared(place / "run", size=size)
        words, codes = fork(2, partial(_meet_fault, run.path, kind, level, size, variant)).end()
        counted["levels"] += 1
        outcomes = [line.split(":", 1) for line in words.splitlines()]
        first = {message for name, message in outcomes if name == "first"}
        wrong = [message for name, message in outcomes if name == "wrong"] + broken(run, 4)
        wrong += [f"the ranks ended with {codes}"] if codes != [0, 0] else []
        wrong += [f"the ranks disagree: {first}"] if len(first) != 1 else []
        for message in first - {"saved"}:
            wrong += [] if "bytes are free" in message and "bytes are needed" in message else [message]
        counted["saved" if first == {"saved"} else "failed"] += 1
        counted["wrong"] += [f"{kind} {level:.3g}: {problem}" for problem in wrong]
        subprocess.run(["umount", "--lazy", place], check=True)
    return counted


def _meet_fault(folder: Path, kind: str, level: float, size: int, variant: str, tell: Tell) -> None:
    start = begin(folder)
    ballast, whole = folder.parent / "ballast", 2 * 4 * size
    write, limits = atomic_write.write_file, resource.getrlimit(resource.RLIMIT_FSIZE)

    def fails(path, chunks):
        raise OSError(int(level), os.strerror(int(level)), str(path))

    def careless(path, chunks):
        """A rank that ignores a full disk."""
        blocks = [bytes(chunk) for chunk in chunks]
        try:
            return write(path, blocks)
        except OSError:
            text = b"".join(blocks)
            return file_list.FileEntry(len(text), atomic_write.hashlib.sha256(text).hexdigest())

    if kind == "full" and ranks.is_main():
        with ballast.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, int(shutil.disk_usage(folder).free - level * whole))
    ranks.barrier()
    if kind == "limit" and not ranks.is_main():
        resource.setrlimit(resource.RLIMIT_FSIZE, (int(level * 4 * size), limits[1]))
    if not ranks.is_main() and (kind == "fails" or variant == "careless"):
        atomic_write.write_file = fails if kind == "fails" else careless
    try:
        save(start.run, 3, size)
        tell("first:saved\n")
    except StorageError as error:
        tell(f"first:{error}\n".replace("\n", " ").strip() + "\n")
        if ranks.is_main() and (problems := broken(start.run, 2)):
            tell(f"wrong:an older checkpoint: {problems}\n")
    atomic_write.write_file = write
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    ranks.barrier()
    if ranks.is_main():
        ballast.unlink(missing_ok=True)
    ranks.barrier()
    save(start.run, 4, size)  # room was made, training went on
    start.close()


# ---- ranks that differ, storage that lags


def agreements(folder: str, variant: str, launches: int) -> dict:
    """Launches whose ranks have other clocks, temporary folders and working folders each; how many folders they use."""
    place = Path(folder)

    def act(tell: Tell) -> None:
        own = place / f"here-{ranks.rank()}"
        own.mkdir(exist_ok=True)
        os.chdir(own)
        os.environ["TMPDIR"] = str(own)
        clock, strftime = time.time, time.strftime
        skew = (ranks.rank() - 1) * 2.0
        time.time = lambda: clock() + skew
        time.strftime = lambda form, *given: strftime(form, *(given or (time.localtime(time.time()),)))
        if variant == "own clocks":
            _own_clocks()
        resume.environment = dict
        for number in range(launches):
            start = open_run(f"run-{number}", CONFIG)
            seen = set(ranks.gather((start.run.path, start.run.launch)))
            if number % 10 == 0:
                save(start.run, 1)
            if ranks.is_main():
                wanted = {f"rank-{rank:05d}.safetensors" for rank in range(ranks.world())}
                saved = [verify(start.run.checkpoint(step)) for step in start.run.steps()]
                whole = all(wanted <= manifest.files.keys() for manifest in saved)
                tell(f" {len(seen) == 1 and whole and len(saved) == (number % 10 == 0)}")
            start.close()

    words, codes = fork(3, act).end(timeout=300)
    return {"launches": launches, "agreed": words.split().count("True"), "codes": codes}


def _own_clocks() -> None:
    """Each rank names the folder by its own clock."""
    write = publishing._write_share

    def write_to_own(folder, tensors, state):
        own = folder if ranks.is_main() else folder.with_name(f".tmp-{time.strftime('%Y%m%d-%H%M%S')}")
        own.mkdir(exist_ok=True)
        return write(own, tensors, state)

    publishing._write_share = write_to_own


def views(folder: str) -> dict:
    """A checkpoint read by two ranks, of which the second sees its file late, never, or with another byte in it."""
    run = prepared(Path(folder) / "run")
    step, messages = 2, {}
    for kind in ("late", "never", "another byte", "damaged"):
        if kind == "damaged":
            file = run.checkpoint(step) / "state.json"  # of the second rank to read
            file.write_bytes(file.read_bytes()[::-1])

        def act(tell: Tell, kind=kind) -> None:
            looked, look, read = [0], Path.lstat, file_list.sha256

            def lstat(path):
                looked[0] += 1
                if kind == "never" or looked[0] < 5:
                    raise FileNotFoundError
                return look(path)

            if ranks.rank() and kind in ("late", "never"):
                Path.lstat, atomic_write.VISIBILITY_TIMEOUT = lstat, 0.2
            if ranks.rank() and kind == "another byte":
                file_list.sha256 = lambda path: read(path)[::-1]
            try:
                start = begin(run.path)
            except StorageError as error:
                tell(f"StorageError: {error.problems[0]}\n")
            else:
                tell(f"{start.step} {len(start.notes)}\n")
                start.close()

        words, codes = fork(2, act).end()
        assert codes == [0, 0], words
        messages[kind] = sorted(set(words.splitlines()))
    return messages


def lags(folder: str, variant: str, saves: int, seed: int) -> dict:
    """Saves on a file system that shows other ranks a new folder up to 5 s late, and first answers them ESTALE.

    The clock is a model too, so nobody waits.
    """

    def act(tell: Tell) -> None:
        rng, now, shown = random.Random(seed + ranks.rank()), [0.0], {}
        look, write = os.stat, atomic_write.write_file

        def late(path) -> None:
            if not (ranks.rank() and Path(path).name.startswith(".tmp-step")):
                return
            if path not in shown:
                shown[path] = now[0] + rng.uniform(0, 5)
                raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))
            if now[0] < shown[path]:
                raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))

        def stat(path, *given, **named):
            late(path)
            return look(path, *given, **named)

        def writes(path, chunks):
            late(path.parent)
            return write(path, chunks)

        def sleep(seconds: float) -> None:
            now[0] += seconds

        start = begin(Path(folder) / "run")
        atomic_write.time.sleep, atomic_write.time.monotonic = sleep, lambda: now[0]
        atomic_write.os.stat, atomic_write.write_file = stat, writes
        if variant == "no wait":
            atomic_write.wait_until = lambda condition: condition() or True
        done = 0
        for step in range(1, saves + 1):
            try:
                save(start.run, step)
                done += 1
            except StorageError:
                pass
        tell(f" {done}")

    words, codes = fork(3, act).end(timeout=300)
    return {"saves": saves, "done": min(map(int, words.split())), "codes": codes}
