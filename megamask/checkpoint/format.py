"""Checkpoints: where they lie, what is in them, whether they are whole. Loading one never runs code.

    checkpoints/step-N/
        rank-00000.safetensors ...   what each rank wrote; every tensor whole, fp32, by name, in exactly one file
        state.json                   counters and small state
        MANIFEST.json                format, step, launch, and the size and sha256 of every file above

Any number of ranks in any ZeRO stage can read it. Reading hashes every byte before it parses any (about the speed
of the disk), then maps the files into memory. ``publish`` makes them, ``runs`` chooses the one to resume from.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from megamask.errors import SHOWN, CheckpointError, StorageError, listed, raise_all
from megamask.runtime import ranks
from megamask.storage import durable as files
from megamask.storage import strict_json
from megamask.storage.durable import FileEntry

FORMAT = 1
MANIFEST = "MANIFEST.json"
STATE = "state.json"
WEIGHTS = "weights/"

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
_STEP = re.compile(r"step-(0|[1-9]\d*)")
_DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
    torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
}  # fmt: skip
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class RunFolder:
    """Where the things of a run lie. ``launch`` names this launch of it; empty for one who only reads."""

    path: Path
    launch: str = ""

    def __post_init__(self):
        object.__setattr__(self, "path", Path(self.path).absolute())

    config = property(lambda self: self.path / "config.json")
    environment = property(lambda self: self.path / "environment.json")
    text = property(lambda self: self.path / "text.json")
    lock = property(lambda self: self.path / "run.lock")
    logs = property(lambda self: self.path / "logs")
    tensorboard = property(lambda self: self.path / "tensorboard")
    checkpoints = property(lambda self: self.path / "checkpoints")
    latest = property(lambda self: self.path / "latest")
    export = property(lambda self: self.path / "export")

    def checkpoint(self, step: int) -> Path:
        """The folder of the checkpoint at ``step``."""
        return self.checkpoints / f"step-{step}"

    def steps(self) -> list[int]:
        """The steps that have a checkpoint folder, valid or not, newest first."""
        if not self.checkpoints.is_dir():
            return []
        found = (_STEP.fullmatch(name) for name in os.listdir(self.checkpoints))
        return sorted((int(match[1]) for match in found if match), reverse=True)

    def set_aside(self, folder: Path, why: str) -> Path:
        """Rename a checkpoint that must not be used, so that it blocks nothing and nothing is lost."""
        number = 0
        while (aside := folder.with_name(f".{why}-{folder.name}-{self.launch}-{number}")).exists():
            number += 1
        files.rename(folder, aside)
        files.sync(aside.parent)
        return aside


@dataclass(frozen=True)
class Manifest:
    """What a checkpoint consists of."""

    step: int
    launch: str
    files: tuple[FileEntry, ...]


class NewerFormat(CheckpointError):
    """The checkpoint is whole, but of a version of megamask that this one does not know."""


def serialise(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The bytes of a safetensors file, a block at a time; the widest types first, so that each lies aligned."""
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header, end = {}, 0
    for name in order:
        begin, end = end, end + tensors[name].nbytes
        kind, shape = _DTYPES[tensors[name].dtype], list(tensors[name].shape)
        header[name] = {"dtype": kind, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for name in order:
        flat = tensors[name].detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        data = memoryview(flat.numpy())  # type: ignore[arg-type]
        for begin in range(0, len(data), files.BLOCK):
            yield data[begin : begin + files.BLOCK]


def render_manifest(manifest: Manifest) -> bytes:
    """The one way to write a manifest down; it holds its own hash."""
    body = {"format": FORMAT, **asdict(manifest)}
    return _seal(body)


def _seal(body: dict) -> bytes:
    digest = hashlib.sha256(json.dumps(body).encode()).hexdigest()
    return json.dumps({**body, "sha256": digest}, indent=1).encode()


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a checkpoint; it is whole, and the files it names lie in the folder.

    Raises CheckpointError if it is missing or damaged, NewerFormat, or OSError if the storage does not answer.
    """
    path = Path(folder) / MANIFEST
    try:
        text = strict_json.read_text(path, 1 << 26)
        body = strict_json.parse_json(text)
        body.pop("sha256")
        if _seal(body) != text.encode():
            raise ValueError
    except (FileNotFoundError, NotADirectoryError):
        raise CheckpointError(f"{folder} has no {MANIFEST}; it was never completed.") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise CheckpointError(f"{path} is damaged: it is not what was written.") from None
    if body.get("format") != FORMAT:
        raise NewerFormat(
            f"{folder} has format {body.get('format')}, and this megamask reads format {FORMAT}. Use a newer megamask."
        )
    try:
        entries = tuple(FileEntry(str(e["name"]), int(e["size"]), str(e["sha256"])) for e in body["files"])
        manifest = Manifest(int(body["step"]), str(body["launch"]), entries)
        if manifest.step < 0 or len({entry.name for entry in entries}) < len(entries):
            raise ValueError
    except (ValueError, KeyError, TypeError, OverflowError):
        raise CheckpointError(f"{path} lacks a field, or one of them cannot be.") from None
    names = [entry.name for entry in manifest.files]
    for name in names:
        if not _NAME.fullmatch(name):
            raise CheckpointError(f"{path} names the file {name!r}, which is no plain name inside the folder.")
    if STATE not in names:
        raise CheckpointError(f"{path} does not name {STATE}.")
    named = _STEP.fullmatch(Path(folder).name)
    if named and int(named[1]) != manifest.step:
        raise CheckpointError(f"{folder} holds the checkpoint of step {manifest.step}; its name says otherwise.")
    return manifest


def damage(folder: Path, entries: Iterable[FileEntry], hashes: bool = True) -> list[str]:
    """A sentence for each file that is not what was written; without ``hashes`` the sizes alone are compared."""
    problems = []
    for entry in entries:
        path = Path(folder) / entry.name
        try:
            found = path.lstat()
        except FileNotFoundError:
            problems.append(f"{path} is missing.")
            continue
        if not stat.S_ISREG(found.st_mode):
            problems.append(f"{path} is no regular file.")
        elif found.st_size != entry.size:
            problems.append(f"{path} has {found.st_size:,} bytes, but {entry.size:,} were written.")
        elif hashes and files.sha256(path) != entry.sha256:
            problems.append(f"{path} is damaged: its sha256 is not that of the bytes written.")
    return problems


def complete(folder: Path) -> bool:
    """Whether a checkpoint was published and still has all its files, by name and size."""
    try:
        return not damage(folder, read_manifest(folder).files, hashes=False)
    except NewerFormat:
        return True
    except CheckpointError:
        return False


def verify(folder: Path) -> Manifest:
    """The manifest, after every byte of the checkpoint was hashed. Raises CheckpointError naming what is damaged."""
    manifest = read_manifest(folder)
    raise_all(CheckpointError, _first(damage(folder, manifest.files)))
    return manifest


def _first(problems: list[str]) -> list[str]:
    """The first of many sentences, and how many more there are: a checkpoint has a file for each rank."""
    more = len(problems) - SHOWN
    return [*problems[:SHOWN], f"{more} more of its files are damaged."] if more > 0 else problems


def on_all_ranks(act: Callable[[], Answer], what: str, folder: Path, need: int = 0) -> list[Answer]:
    """What ``act`` returned on each rank. An error on any rank becomes the same error on all. Collective."""
    mine: tuple[Answer | None, str, bool]
    try:
        mine = (act(), "", True)
    except Exception as error:  # the others wait for word of it
        storage = isinstance(error, (OSError, StorageError))
        mine = (None, storage_sentence(error, what, folder, need), storage)
    said = ranks.gather(mine)
    problems = [problem for _, problem, _ in said if problem]
    if not all(storage for _, _, storage in said):
        raise RuntimeError("\n".join(problems))
    raise_all(StorageError, problems)
    return [answer for answer, _, _ in said]  # type: ignore[misc]


def storage_sentence(error: Exception, what: str, folder: Path, need: int = 0) -> str:
    """Who could not do what, why, and how much space there is."""
    reason = error.strerror if isinstance(error, OSError) and error.strerror else f"{type(error).__name__}: {error}"
    where = f" ({error.filename})" if isinstance(error, OSError) and error.filename else ""
    try:
        space = f" {shutil.disk_usage(folder).free:,} bytes are free under {folder}"
    except OSError:
        space = f" {folder} does not answer"
    space += f", {need:,} bytes are needed." if need else "."
    return f"Rank {ranks.rank()} could not {what}: {reason}{where}.{space}"


def verify_on_all_ranks(folder: Path) -> Manifest:
    """``verify`` with the files shared out among the ranks; all agree. Collective.

    Raises StorageError if a rank reads what rank 0 does not: a file system that lags is no reason to give up a
    checkpoint.
    """

    def look() -> Manifest:
        try:
            manifest = read_manifest(folder)
            raise_all(CheckpointError, _first(damage(folder, manifest.files, hashes=False)))
        except OSError as error:
            raise StorageError(storage_sentence(error, f"read {folder}", folder)) from None
        return manifest

    manifest = ranks.on_rank_zero(look)
    share = manifest.files[ranks.rank() :: ranks.world()]

    def read() -> list[tuple[FileEntry, str]]:
        files.wait_for_file(lambda: not damage(folder, share, hashes=False))  # rank 0 has seen them, so they will show
        return [(entry, sentence) for entry in share for sentence in damage(folder, [entry])]

    said = [found for each in on_all_ranks(read, f"read {folder}", folder) for found in each]
    if said and ranks.world() > 1:
        entries = [entry for entry, _ in said]
        if not on_all_ranks(lambda: damage(folder, entries) if ranks.is_main() else [], f"read {folder}", folder)[0]:
            sentences = _first([sentence for _, sentence in said])
            raise StorageError(f"{folder} is whole to rank 0, but not to others. Look at their storage:", *sentences)
    raise_all(CheckpointError, _first([sentence for _, sentence in said]))
    return manifest


def read_tensors(folder: Path, prefix: str = "", names: Iterable[str] | None = None) -> Iterator[tuple[str, Tensor]]:
    """Each (name, tensor) of a verified checkpoint under ``prefix``, or exactly ``names``; memory-mapped, on the CPU.

    Raises CheckpointError if a name is missing or lies in two files.
    """
    folder = Path(folder)
    wanted = None if names is None else set(names)
    seen: set[str] = set()
    for entry in read_manifest(folder).files:
        if not entry.name.endswith(".safetensors"):
            continue
        try:
            with safe_open(folder / entry.name, framework="pt", device="cpu") as file:
                for name in file.keys():  # noqa: SIM118
                    if name in seen:
                        raise CheckpointError(f"{folder} holds the tensor {name} twice.")
                    if name.startswith(prefix) and (wanted is None or name in wanted):
                        seen.add(name)
                        yield name, file.get_tensor(name)
        except SafetensorError as error:
            raise CheckpointError(f"{folder / entry.name} is no safetensors file: {error}.") from None
    missing = sorted((wanted or set()) - seen)
    if missing:
        raise CheckpointError(f"{folder} lacks {listed(missing, 'tensor')}.")


def read_state(folder: Path) -> dict:
    """The small state of a verified checkpoint."""
    path = Path(folder) / STATE
    try:
        found = json.loads(strict_json.read_text(path, strict_json.LARGEST))
        if isinstance(found, dict):
            return found
    except (OSError, ValueError, RecursionError):
        pass
    raise CheckpointError(f"{path} is no JSON object, so the state of the run is not known.") from None


def find_checkpoint(path: Path, step: int | None = None) -> Path:
    """The checkpoint folder at ``path``, or the one of ``step`` (else the newest) in the run folder ``path``."""
    path = Path(path)
    if (path / MANIFEST).exists() and step is None:
        return path
    steps = RunFolder(path).steps()
    if not steps:
        raise CheckpointError(f"{path} holds no checkpoint and is none.")
    if step is not None and step not in steps:
        raise CheckpointError(f"{path} has no checkpoint of step {step}; it has {listed(map(str, steps))}.")
    return RunFolder(path).checkpoint(steps[0] if step is None else step)


def read_weights(path: Path, step: int | None = None) -> dict[str, Tensor]:
    """The full fp32 weights by name, of a checkpoint or of a run's checkpoint at ``step`` (else the newest).

    Verifies every hash first and raises CheckpointError, naming what is damaged.
    """
    folder = find_checkpoint(path, step)
    verify(folder)
    return {name.removeprefix(WEIGHTS): tensor for name, tensor in read_tensors(folder, WEIGHTS)}
