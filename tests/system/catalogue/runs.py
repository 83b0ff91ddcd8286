"""Run folders and checkpoints that cannot be gone on with, and storage that fails."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path

from megamask.__main__ import main
from megamask.checkpoint import format, save
from megamask.checkpoint.run_folder import RunFolder
from megamask.storage import atomic_write
from megamask.storage.lock import Lock
from tests.system.catalogue.row import (
    CHECKPOINT,
    CONFIG,
    DATA,
    LOCK,
    SAME,
    STEPS,
    STORAGE,
    Command,
    Ground,
    Plant,
    Row,
    as_it_was,
    missing,
)  # fmt: skip
from tests.system.catalogue.settings import typed
from tests.system.commands import run


def resumed(spoil: Callable[[Path], object], *arguments: object, **more: object) -> Plant:
    """A run that is to go on, after something happened to it."""

    def plant(ground: Ground) -> Command:
        spoil(copied := ground.copy(ground.finished))
        return ground.train(*arguments, output=copied, **(SAME | more))

    return plant


def damage(folder: Path) -> None:
    """A bit of the weights, in a checkpoint."""
    path = next(folder.glob("*.safetensors"))
    inside = bytearray(path.read_bytes())
    inside[-1] ^= 1
    path.write_bytes(inside)


def damage_all(copied: Path) -> None:
    for step in RunFolder(copied).steps():
        damage(RunFolder(copied).checkpoint(step))


def says(what: str) -> Callable[[Path], object]:
    """Settings that are something else."""
    return lambda copied: (copied / "config.json").write_text(what)


def newer(copied: Path) -> None:
    """The newest checkpoint, as a later version would write it."""
    folder = RunFolder(copied).checkpoint(STEPS)
    manifest = json.loads((folder / "MANIFEST.json").read_text()) | {"format": format.FORMAT + 1}
    del manifest["sha256"]
    (folder / "MANIFEST.json").write_bytes(format._seal(manifest))


def other_text(*more: object) -> Plant:
    """A run that is to go on with a text to which a document was added."""

    def plant(ground: Ground) -> Command:
        (ground.folder / "corpus.txt").write_text((ground.data.parent / "corpus.txt").read_text() + "\n\nOne more.\n")
        made = ground.folder / "changed"
        flags = ["--input", ground.folder / "corpus.txt", "--output", made, "--valid-share", 0.2, "--workers", 1]
        tokenizer = more or ("--tokenizer", ground.data / "tokenizer")
        assert run(main, "prepare", *flags, *tokenizer).code == 0
        return ground.train(data=made, output=ground.copy(ground.finished), **SAME)

    return plant


def smaller(ground: Ground) -> Command:
    return ground.train("--resume", ground.finished, "--model.hidden-size", 16)


def locked(ground: Ground) -> Command:
    copied = ground.copy(ground.finished)
    lock = Lock(copied / "run.lock", "another")  # noqa: F841 - until the end of the process
    return ground.train(output=copied, **SAME)


def exported(spoil: Callable[[Path], object], *more: object) -> Plant:
    """An export of a run."""

    def plant(ground: Ground) -> Command:
        spoil(copied := ground.copy(ground.finished))
        return main, ["export", "--run", copied, "--output", ground.folder / "exported", *more]

    return plant


def imported(ground: Ground) -> Command:
    return main, ["import", "--model", ground.folder, "--output", ground.folder / "start"]


RUNS = [
    Row(
        "another run's folder", resumed(as_it_was, seed=7, masking__unit="word"), CONFIG,
        ("finished holds another run", "`seed` is 7 here, but 1 there", "`masking.unit` is 'word' here"),
    ),
    Row(
        "a text that has changed", other_text(), DATA,
        (
            "changed is not the text that the run in", "valid-00000.tokens.npy has other bytes",
            "there, and the texts differ. Resume with --data",
        ),
    ),
    Row(
        "a tokenizer that has changed", other_text("--vocab-size", 200), CONFIG,
        ("another tokenizer than the run in", "a vocabulary of 200 tokens"),
    ),
    Row(
        "settings that are damaged", resumed(says("{")), CONFIG,
        ("config.json is damaged",),
    ),
    Row("settings that are gone", resumed(missing("config.json")), CONFIG, ("holds checkpoints but no config.json",)),
    Row(
        "a run that may not go on", resumed(as_it_was, "--resume", "never"), CHECKPOINT,
        ("holds a run with a checkpoint of step 12", "'never'"),
    ),
    Row(
        "a start that is not there", resumed(as_it_was, "--resume", "nowhere"), CHECKPOINT,
        ("nowhere holds no checkpoint",),
    ),
    Row("a run that never began", typed(["--resume", "must"]), CHECKPOINT, ("holds no checkpoint", "'must'")),
    Row(
        "damaged checkpoints", resumed(damage_all), CHECKPOINT,
        (
            "There is no intact checkpoint",
            *(f"step-{step}/rank-00000.safetensors is damaged" for step in (12, 8, 4)),
        ),
    ),
    Row(
        "a checkpoint of a newer format", resumed(newer), CHECKPOINT,
        ("step-12 has format 2, and this megamask reads format 1",),
    ),
    Row(
        "a checkpoint of another model", smaller, CHECKPOINT,
        ("step-12 is of another model, in", "weights/encoder.", "32) there, but (16"),
    ),
    Row("a run that another writes", locked, LOCK, ("finished is being written by process", "(launch another)")),
    Row("an export of no run", exported(missing("config.json")), CHECKPOINT, ("so it is not a run",)),
    Row(
        "an export of settings that are a list", exported(says("[]")), CHECKPOINT,
        ("so it is not a run",),
    ),
    Row(
        "an export of a step that is not there", exported(as_it_was, "--step", 5), CHECKPOINT,
        ("no checkpoint of step 5; it has 12, 8, 4",),
    ),
    Row(
        "an export of damaged weights", exported(damage_all), CHECKPOINT,
        ("rank-00000.safetensors is damaged",),
    ),
    Row("an import of no model", imported, CHECKPOINT, ("has no config.json",)),
]  # fmt: skip


# ---- storage


def full(ground: Ground) -> Command:
    usage = namedtuple("usage", "total used free")(10**9, 10**9, 1000)
    ground.patch.setattr(shutil, "disk_usage", lambda path: usage)
    return ground.train()


def failing(number: int) -> Plant:
    """Storage that fails in the only save of a run."""

    def plant(ground: Ground) -> Command:
        write = atomic_write.write_file

        def fails(path, chunks):
            if path.parent.name.startswith(".tmp-step-"):
                raise OSError(number, os.strerror(number), str(path))
            return write(path, chunks)

        ground.patch.setattr(save.atomic_write, "write_file", fails)
        return ground.train(steps=1)

    return plant


def below_a_file(ground: Ground) -> Command:
    (ground.folder / "file").write_text("")
    return ground.train(output=ground.folder / "file" / "run")


STORAGES = [
    Row("no space for checkpoints", full, STORAGE, ("1,000 bytes free", "Free some space")),
    Row("a run folder below a file", below_a_file, STORAGE, ("Rank 0 could not", "Not a directory")),
    *(
        Row(
            f"{errno.errorcode[number]} in a save", failing(number), STORAGE,
            ("could not save checkpoint 1: " + os.strerror(number), "bytes are free", "bytes are needed"),
        )
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ESTALE)
    ),
]  # fmt: skip
