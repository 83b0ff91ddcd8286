"""Find the files and datasets that the inputs name, and count the files of folders that are not read.

No file is left out silently: unsupported files are counted by ending, and a folder is refused if they look like the
data. Cost: lists all names and reads the first byte of each file.
"""

from __future__ import annotations

import fnmatch
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from megamask.data.formats import huggingface_datasets
from megamask.data.formats.compression import COMPRESSIONS
from megamask.data.input_file import KINDS, NO_ENDING, InputFile, ending_of, kind_of, utf8_name, without_compression
from megamask.errors import DataError, raise_all

ARCHIVES = (".tar", ".tgz", ".tbz2", ".txz", ".tzst", ".zip", ".7z", ".rar")
TABLES = (".arrow", ".feather", ".orc", ".avro", ".tfrecord", ".warc", ".wet", ".xls", ".xlsx", ".ods", ".sqlite",
          ".db", ".lz4", ".br", ".lzo", ".snappy", ".z")  # fmt: skip
"""Endings of data that cannot be read: other formats of datasets, and other compressions."""
MEDIA = (".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg", ".ico", ".bmp", ".tif", ".tiff", ".mp3", ".mp4", ".wav",
         ".ogg", ".flac", ".mov", ".avi", ".webm", ".ttf", ".otf", ".woff", ".woff2", ".pyc", ".so", ".o")  # fmt: skip
"""Endings of files that are not text, however large they are."""
HIDDEN = frozenset((
    "__MACOSX", "__pycache__", "_SUCCESS", "_metadata", "_common_metadata", "Thumbs.db", "desktop.ini",
    # the library datasets and the Hugging Face Hub write these beside data
    "state.json", "dataset_info.json", "dataset_infos.json", "dataset_dict.json",
))  # fmt: skip
"""Names that systems and libraries put beside data. They are hidden, as are names that begin with a dot."""
LISTED = 8
"""Number of endings or files that a message lists."""
ABOUT = re.compile(r"(readme|license|licence|copying)\b", re.IGNORECASE)
"""Names of files that describe the data."""


@dataclass
class FileCounts:
    """Number of files and bytes by ending."""

    files: Counter[str] = field(default_factory=Counter)
    bytes: Counter[str] = field(default_factory=Counter)

    def add(self, ending: str, size: int) -> None:
        """Count a file."""
        self.files[ending] += 1
        self.bytes[ending] += size

    def update(self, other: FileCounts) -> None:
        """Add the counts of ``other``."""
        self.files.update(other.files)
        self.bytes.update(other.bytes)

    def facts(self) -> dict[str, dict[str, int]]:
        """Files and bytes of each ending."""
        return {ending: {"files": self.files[ending], "bytes": self.bytes[ending]} for ending in sorted(self.files)}

    def __str__(self) -> str:
        """Such as "2 .json.gz (1.2MB), 1 .txt (40B)", the largest first."""
        order = sorted(self.files, key=lambda ending: (-self.bytes[ending], ending))
        shown = [f"{self.files[e]} {e} ({tqdm.format_sizeof(self.bytes[e], 'B')})" for e in order[:LISTED]]
        rest = sum(self.files[ending] for ending in order[LISTED:])
        return ", ".join(shown + [f"{rest} others"] * (rest > 0))


@dataclass
class Inputs:
    """The inputs to read, and counts of the other files of folders."""

    sources: list[InputFile] = field(default_factory=list)
    folders: list[Path] = field(default_factory=list)
    """The inputs that are folders of files."""
    read: FileCounts = field(default_factory=FileCounts)
    unsupported: FileCounts = field(default_factory=FileCounts)
    hidden: int = 0
    excluded: int = 0

    def facts(self) -> dict:
        """The counts for the manifest."""
        return {
            "read": self.read.facts(), "passed_over": self.unsupported.facts(),
            "hidden": self.hidden, "excluded": self.excluded,
        }  # fmt: skip

    def sentence(self) -> str:
        """A log line with the counts of the folders; "" if no input is a folder."""
        if not self.folders:
            return ""
        left_out = [f"unsupported: {self.unsupported}"] if self.unsupported.files else []
        left_out += [f"{self.excluded} excluded"] if self.excluded else []
        left_out += [f"{self.hidden} hidden"] if self.hidden else []
        return "; ".join([f"Reading {self.read}", *left_out]) + "."

    def warnings(self) -> Iterator[str]:
        """Warnings about files that perhaps should not be read."""
        files = [source for source in self.sources if source.path is not None and source.is_file]
        about = [source.name for source in files if source.path and ABOUT.match(source.path.name)]
        if about and len(about) < len(files):
            yield f"{_some(about)} will be read as text to train on. `exclude` leaves files out by name."
        plain = {without_compression(source.name): source.name for source in files}
        twice = [source.name for source in files if plain[without_compression(source.name)] != source.name]
        if twice:
            also = plain[without_compression(twice[0])]
            yield f"{twice[0]} and {also} differ only in their compression; both are read."


def find_inputs(inputs: Iterable[str], *, exclude: Sequence[str] = (), skip_empty: bool = False) -> Inputs:
    """The files and datasets of ``inputs``, in order. DataError with all that are missing, unreadable or unsupported.

    Files of folders that match a pattern of ``exclude``, by name or by path below the folder, are left out. An empty
    file is an error unless ``skip_empty``.
    """
    result = Inputs()
    problems: list[str] = []
    used: set[str] = set()
    for name in inputs:
        path = Path(name)
        if path.is_dir() and huggingface_datasets.is_saved(path):
            result.sources.append(InputFile(utf8_name(path.name), path))
        elif path.is_dir():
            problems += _add_folder(result, path, exclude, used)
        elif path.exists():
            if not kind_of(path):
                problems.append(_unknown(path))
            else:
                result.sources.append(InputFile(utf8_name(path.name), path))
                result.read.add(ending_of(path), path.stat().st_size)
        elif _looks_like_path(name):
            problems.append(f"{path} does not exist.")
        else:
            result.sources.append(InputFile(name, None))
    for pattern in exclude:
        if pattern not in used:
            problems.append(f"`exclude` names {pattern!r}, but no file of a folder matches it. Remove it.")
    problems += _unreadable(result.sources, skip_empty)
    raise_all(DataError, problems)
    return result


# ---- folders


def _add_folder(result: Inputs, folder: Path, exclude: Sequence[str], used: set[str]) -> list[str]:
    """Add the files of ``folder`` to ``result`` and the patterns that match to ``used``; returns the problems."""
    problems: list[str] = []
    here = Inputs(folders=[folder])
    for file in _walk(folder, problems):
        name = file.relative_to(folder).as_posix()
        matching = [p for p in exclude if fnmatch.fnmatchcase(name, p) or fnmatch.fnmatchcase(file.name, p)]
        used.update(matching)
        if matching:
            here.excluded += 1
        elif _is_hidden(file.name):
            here.hidden += 1
        elif not file.exists():
            problems.append(f"{file} is a link to a file that does not exist. Fix it, or leave it out with `exclude`.")
        elif not file.is_file():
            here.unsupported.add("special files", 0)
        elif kind_of(file):
            here.sources.append(InputFile(utf8_name(f"{folder.name}/{name}"), file))
            here.read.add(ending_of(file), file.stat().st_size)
        else:
            here.unsupported.add(ending_of(file), file.stat().st_size)
    problems += _refusals(here)
    result.folders.append(folder)
    result.sources += here.sources
    result.read.update(here.read)
    result.unsupported.update(here.unsupported)
    result.hidden += here.hidden
    result.excluded += here.excluded
    return problems


def _walk(top: Path, problems: list[str]) -> list[Path]:
    """Every file below ``top`` in the order of the paths, and every hidden folder. Follows links.

    A folder is read once, under its first name: links may form a cycle.
    """
    files: list[Path] = []
    seen: set[str] = set()
    for folder, folders, names in os.walk(
        top, followlinks=True, onerror=lambda e: problems.append(f"{e.filename} cannot be read: {e.strerror}.")
    ):
        real = os.path.realpath(folder)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        files += [Path(folder, name) for name in names]
        files += [Path(folder, name) for name in folders if _is_hidden(name)]
        folders[:] = sorted(name for name in folders if not _is_hidden(name))
    return sorted(files)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name in HIDDEN


def _refusals(folder: Inputs) -> Iterator[str]:
    """The error for a folder whose unsupported files look like the data."""
    [path] = folder.folders
    others, read = folder.unsupported, folder.read
    if not folder.sources:
        left_out = f" It contains {others}." if others.files else ""
        left_out += f" {folder.excluded} are excluded." if folder.excluded else ""
        left_out += f" {folder.hidden} are hidden." if folder.hidden else ""
        cures = "".join(f" {cure}" for cure in sorted({_cure(ending) for ending in others.files}))
        yield f"{path} contains no file that can be read: {_endings()}.{left_out}{cures}"
        return
    data = sorted(ending for ending in others.files if _is_data(ending))
    large = sum(size for ending, size in others.bytes.items() if ending not in MEDIA)
    if data:
        why = "which look like the data"
    elif large > sum(read.bytes.values()):
        why = "more bytes than those that are read"
    else:
        return
    cures = " ".join(sorted({_cure(ending) for ending in data or others.files if ending not in MEDIA}))
    example = _pattern(data[0] if data else others.bytes.most_common(1)[0][0])
    yield (
        f"{path} contains files that cannot be read, {why}: {others}. Only {read} would be read. {cures} To leave "
        f"files out, name them with `exclude`, such as --exclude {example}."
    )


def _is_data(ending: str) -> bool:
    return ending in TABLES or ending in ARCHIVES or any(ending.endswith(packing) for packing in COMPRESSIONS)


def _pattern(ending: str) -> str:
    return f"'*{ending}'" if ending.startswith(".") else "NAME"


def _cure(ending: str) -> str:
    """How to make a file with this ending readable."""
    plain = without_compression(ending)
    if plain in ARCHIVES:
        return f"Unpack {ending} files."
    if ending == ".arrow":
        return "Give each folder of a saved dataset as an input of its own."
    if ending in COMPRESSIONS:
        return f"Rename {ending} files so that their names say what is inside, such as .jsonl{ending}."
    if plain in (NO_ENDING, ".md", ".rst", ".text", ".log", ".tex"):
        what = "files without ending" if plain == NO_ENDING else f"{ending} files"
        return f"Rename {what} to .txt{ending.removeprefix(plain)} if they are plain text."
    return f"Convert {ending} files to one of the types above."


# ---- single inputs


def _unknown(path: Path) -> str:
    """The error for an input file of an unsupported type."""
    return f"{path} has an unknown file type: its name must end in {_endings()}. {_cure(ending_of(path))}"


def _endings() -> str:
    return f"{', '.join(KINDS)}, or one of these and {', '.join(COMPRESSIONS)}"


def _unreadable(sources: Iterable[InputFile], skip_empty: bool) -> Iterator[str]:
    empty: list[str] = []
    for source in sources:
        if source.is_file and source.path:
            try:
                with source.path.open("rb") as file:
                    if not file.read(1) and not skip_empty:
                        empty.append(str(source.path))
            except OSError as error:
                yield f"{source.path} cannot be read: {error.strerror}."
    if empty:
        verb = "is" if len(empty) == 1 else "are"
        yield f"{_some(empty)} {verb} empty. (`on_bad_document` skip counts empty files and continues.)"


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - LISTED} more" if len(names) > LISTED else ""
    return ", ".join(names[:LISTED]) + more


def _looks_like_path(name: str) -> bool:
    is_name = re.fullmatch(r"[\w.-]+(/[\w.-]+)?(:[\w.-]+)?", name) and not name.startswith((".", "/"))
    return not is_name or bool(kind_of(Path(name))) or Path(name).suffix in COMPRESSIONS
