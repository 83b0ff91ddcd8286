"""Lists of files with their sizes and hashes: what a checkpoint, a folder of shards or a finished part consists of."""

from __future__ import annotations

import hashlib
import re
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Lt

BLOCK = 1 << 22
"""Bytes that are read, written and hashed at a time."""
_INSIDE = re.compile(r"\w[\w.-]{0,200}(/\w[\w.-]{0,200}){0,3}", re.ASCII)


@dataclass(frozen=True)
class FileEntry:
    """What is in a file: its size in bytes and its sha256, in hexadecimal digits."""

    bytes: Annotated[int, Ge(0), Lt(2**63)]
    sha256: str


FileList = dict[str, FileEntry]
"""Files by name, which is relative to the folder of the list, as in "tokenizer/tokenizer.json"."""


def list_files(folder: Path, names: Iterable[str]) -> FileList:
    """The entries of files in ``folder``; reads every byte."""
    return {name: FileEntry((folder / name).stat().st_size, sha256(folder / name)) for name in names}


def to_record(files: FileList) -> dict[str, dict[str, Any]]:
    """The list as JSON can contain it: {name: {"bytes": ..., "sha256": ...}}."""
    return {name: asdict(entry) for name, entry in files.items()}


def from_record(record: Mapping[str, Mapping[str, Any]]) -> FileList:
    """The inverse of ``to_record``; other keys of an entry are ignored. KeyError for a missing one."""
    return {name: FileEntry(entry["bytes"], entry["sha256"]) for name, entry in record.items()}


def is_inside(name: str) -> bool:
    """Whether ``name`` is a plain name of a file inside a folder: no "..", no absolute path, nothing hidden."""
    return bool(_INSIDE.fullmatch(name))


def damage(folder: Path, files: FileList, hashes: bool = True) -> dict[str, str]:
    """A sentence for each file that is not what its entry says, by name.

    Compares sizes, and with ``hashes`` every byte. Raises OSError if the storage does not answer, which is not damage.
    """
    problems = {name: _damage(folder, name, entry, hashes) for name, entry in files.items()}
    return {name: problem for name, problem in problems.items() if problem}


def _damage(folder: Path, name: str, entry: FileEntry, hashes: bool) -> str:
    path = folder / name
    outside = f"{folder} lists {name!r}, which leads out of the folder."
    if not is_inside(name):
        return outside
    try:
        status = path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        return f"{path} is missing."
    if not stat.S_ISREG(status.st_mode):
        return f"{path} is not a regular file."
    # a regular file lies in its folder; a folder on the way to it may be a link, and to resolve it takes many look-ups
    if "/" in name and not path.resolve().is_relative_to(folder.resolve()):
        return outside
    if status.st_size != entry.bytes:
        return f"{path} has {status.st_size:,} bytes, but {entry.bytes:,} were written."
    if hashes and sha256(path) != entry.sha256:
        return f"{path} is damaged: its sha256 is not that of the bytes written."
    return ""


def sha256(path: Path, report: Callable[[int], object] = lambda count: None) -> str:
    """The sha256 of a file, read in blocks; ``report`` receives the number of bytes of each."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
            report(len(block))
    return digest.hexdigest()
