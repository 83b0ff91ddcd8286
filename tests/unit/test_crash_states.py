"""Power cuts: every state that a disk may have during three saves is built and read.

A kill leaves the page cache to the kernel and so cannot detect a missing fsync; this can. The operations of
`storage.atomic_write` are recorded. Then, for each moment, every possible image of the file system is made: a name that
was not synced into its folder may be there or not (as any prefix of the changes of that folder, for each folder
separately), and bytes that were not synced may be missing, half written or complete.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from megamask.checkpoint.format import read_weights, verify
from megamask.checkpoint.run_folder import RunFolder
from megamask.checkpoint.save import CheckpointSave
from megamask.errors import CheckpointError
from megamask.storage import atomic_write as durable


@dataclass
class File:
    data: bytes
    synced: bool = True

    def images(self) -> list[bytes]:
        return [self.data] if self.synced else [b"", self.data[: len(self.data) // 2], self.data]


@dataclass
class Folder:
    durable: dict = field(default_factory=dict)
    """Names that are on the disk."""
    pending: list = field(default_factory=list)
    """Changes since: functions of the names."""

    def live(self) -> dict:
        return self.names(len(self.pending))

    def names(self, done: int) -> dict:
        names = dict(self.durable)
        for change in self.pending[:done]:
            change(names)
        return names

    def images(self) -> Iterator[dict]:
        for done in range(len(self.pending) + 1):
            names = self.names(done)
            choices = [list(node.images()) for node in names.values()]
            for chosen in itertools.product(*choices):
                yield dict(zip(names, chosen, strict=True))


class Disk:
    """A model of the disk below ``root``; ``forget`` names the syncs that are left out."""

    def __init__(self, root: Path, forget: str = ""):
        self.root, self.forget = root, forget
        self.top = Folder({"checkpoints": Folder()})

    def folder(self, path: Path) -> Folder:
        node = self.top
        for part in path.relative_to(self.root).parts:
            node = node.live()[part]
        return node

    def write_file(self, path: Path, data: bytes, whole: bool) -> None:
        synced = whole and not (self.forget and self.forget in path.name)
        self.folder(path.parent).pending.append(lambda names: names.update({path.name: File(data, synced)}))

    def make_folder(self, path: Path) -> None:
        made = Folder()
        self.folder(path.parent).pending.append(lambda names: names.update({path.name: made}))

    def rename(self, old: Path, new: Path) -> None:
        self.folder(old.parent).pending.append(lambda names: names.update({new.name: names.pop(old.name)}))

    def sync(self, path: Path) -> None:
        if self.forget and self.forget in f"folder {path.name}":
            return
        folder = self.folder(path)
        folder.durable, folder.pending = folder.live(), []

    def remove(self, path: Path) -> None:
        if path.name not in self.folder(path.parent).live():
            return
        inside = self.folder(path)
        for name in inside.live():
            inside.pending.append(lambda names, name=name: names.pop(name))
        self.folder(path.parent).pending.append(lambda names: names.pop(path.name))


def weights(step: int) -> dict[str, torch.Tensor]:
    return {"weights/a": torch.full((4,), float(step))}


def record(run: RunFolder, monkeypatch, background: bool = False) -> list[tuple]:
    """The operations of three saves that keep two, and their acknowledgements."""
    done: list[tuple] = []
    real = {name: getattr(durable, name) for name in ("write_file", "make_folder", "rename", "sync", "remove")}

    def write(path, chunks):
        entry = real["write_file"](path, chunks)
        data = path.read_bytes()
        done.append(("write_file", path, data[: len(data) // 2], False))  # the power may fail in the middle
        done.append(("write_file", path, data, True))
        return entry

    def other(name):
        def act(*paths):
            real[name](*paths)
            done.append((name, *paths))

        return act

    monkeypatch.setattr(durable, "write_file", write)
    for name in ("make_folder", "rename", "sync", "remove"):
        monkeypatch.setattr(durable, name, other(name))
    for step in (8, 9, 10):
        CheckpointSave(run, step, weights(step), {"step": step}, keep=2, background=background).finish()
        done.append(("acknowledged", step))
    monkeypatch.undo()
    return done


def lay_out(image: dict, folder: Path) -> None:
    folder.mkdir()
    for name, content in image.items():
        if isinstance(content, dict):
            lay_out(content, folder / name)
        else:
            (folder / name).write_bytes(content)


def states(done: list[tuple], root: Path, forget: str = "") -> Iterator[tuple[dict, tuple[int, ...]]]:
    """Each different image of the disk, with the steps that were acknowledged until then."""
    disk, acknowledged = Disk(root, forget), ()
    seen = set()
    for act, *given in done:
        if act == "acknowledged":
            acknowledged += tuple(given)
        else:
            getattr(disk, act)(*given)
        for image in disk.top.images():
            if (key := (repr(image), acknowledged)) not in seen:
                seen.add(key)
                yield image, acknowledged


def keeps_promise(image: dict, promised: tuple[int, ...], place: Path) -> bool:
    """Whether every folder with the name of a checkpoint is valid and none that was acknowledged is missing."""
    lay_out(image, place)
    run = RunFolder(place)
    steps = run.steps()
    try:
        right = all(verify(run.checkpoint(step)).step == step for step in steps)
        right = right and all(torch.equal(read_weights(run.path, s)["a"], weights(s)["weights/a"]) for s in steps)
    except CheckpointError:
        return False
    return right and (steps or [0])[0] >= (promised or (0,))[-1] and len(steps) >= min(2, len(promised))


@pytest.mark.parametrize("background", [False, True])
def test_no_power_cut_loses_a_checkpoint(run, tmp_path, monkeypatch, background):
    number = 0
    for number, (image, promised) in enumerate(states(record(run, monkeypatch, background), run.path)):
        assert keeps_promise(image, promised, tmp_path / str(number)), image
    assert number > 50


@pytest.mark.parametrize(
    "forget", ["rank-00000", "state.json", "MANIFEST.json", "folder .tmp-step-", "folder checkpoints"]
)
def test_each_missing_sync_is_detected(run, tmp_path, monkeypatch, forget):
    numbered = enumerate(states(record(run, monkeypatch), run.path, forget))
    assert not all(keeps_promise(image, promised, tmp_path / str(number)) for number, (image, promised) in numbered)
