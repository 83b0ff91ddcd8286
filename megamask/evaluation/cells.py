"""The cells of an output folder: one JSON file for each result, written whole, and compared before it is used again."""

from __future__ import annotations

import errno
import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any
from urllib.parse import quote

from pydantic import TypeAdapter, ValidationError

from megamask.errors import ConfigError, DataError, StorageError, must, raise_all
from megamask.evaluation.outcome import Cell, CellKey
from megamask.runtime.entry_point import STORAGE
from megamask.storage.atomic_write import write_atomic
from megamask.storage.strict_json import parse_json, read_object

FOLDER = "cells"
"""The folder of the cells within the output folder."""
RESULTS_FILE = "results.jsonl"
"""The file within it with a line for each cell."""
FINISHED = (f"{FOLDER}/**/[!.]*.json",)
"""The files of finished work in the folder of an evaluation, as patterns."""
_LISTS = ("predictions", "labels")
_NOT_A_FOLDER = (errno.ENOTDIR, errno.EEXIST, errno.ENOENT, errno.EISDIR)
"""Error numbers of the operating system if a part of a path is a file, cannot be made, or if a folder has the name of
the file."""


@contextmanager
def storage_errors(output: Path, finished: Sequence[str] = FINISHED) -> Iterator[None]:
    """Raise StorageError, with a sentence about ``output``, if the block cannot write there.

    The sentence says that finished work stays if a file matches one of the patterns ``finished``. Otherwise a new
    folder is removed again.
    """
    new = not output.exists()
    try:
        yield
    except OSError as error:
        if error.errno not in (*STORAGE, *_NOT_A_FOLDER):
            raise
        what = f"{error.filename or output} cannot be written: {error.strerror}."
        if error.errno in _NOT_A_FOLDER:
            raise StorageError(f"{what} Choose another output folder.") from None
        stays = any(any(output.glob(pattern)) for pattern in finished)
        if new and not stays:
            shutil.rmtree(output, ignore_errors=True)
        raise StorageError(
            f"{what}{f' Finished work stays in {output}.' * stays} Free some space, or get the permission to write "
            f"there, then run the same command {'to continue' if stays else 'again'}."
        ) from None


def cell_path(output: Path, key: CellKey) -> Path:
    """The file of a cell: cells/MODEL/TASK.MODE.VARIANT.seed-N.json, with escapes for what a name may not contain."""
    names = [key.task, key.mode, *([key.variant] if key.variant else []), f"seed-{key.seed}"]
    return output / FOLDER / _escape(key.model) / f"{'.'.join(map(_escape, names))}.json"


def write_cell(output: Path, cell: Cell) -> None:
    """Write the file of ``cell``. NaN and Inf are written as null, which JSON has."""
    path = cell_path(output, cell.key)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(path, json.dumps(without_nan(asdict(cell)), allow_nan=False) + "\n")


def read_cell(path: Path) -> Cell:
    """The cell in the file at ``path``, with NaN where it has null. Raises DataError with a sentence."""
    record = read_object(path, DataError, f"{path} is missing.", "Delete it to compute it again.")
    try:
        return cell_from_record(record)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise DataError(f"{path} is not a cell: `{where}`: {first['msg']}. Delete it to compute it again.") from None


def read_cells(output: Path) -> dict[CellKey, Cell]:
    """All cells of the folder ``output``. Raises DataError with a sentence for each file that is damaged."""
    cells: dict[CellKey, Cell] = {}
    problems: list[str] = []
    for path in sorted((output / FOLDER).glob("*/*.json")):
        if path.name.startswith("."):
            continue  # it is being written
        try:
            cell = read_cell(path)
            cells[cell.key] = cell
        except DataError as error:
            problems += error.problems
    raise_all(DataError, problems)
    return cells


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """The settings in which two cells differ: "`max_length` was 128 and is 256"."""
    old, new = _as_json(old), _as_json(new)
    names = dict.fromkeys([*old, *new])
    return [f"`{name}` was {_shown(old, name)} and is {_shown(new, name)}" for name in names if _differ(old, new, name)]


def check_output(output: Path) -> None:
    """Raise ConfigError if ``output`` has a results.jsonl that `megamask evaluate` did not write: it would be lost."""
    path = output / RESULTS_FILE
    if path.is_dir():
        rule = f"be a folder in which {path.name} is a file"
        raise ConfigError(must("output", rule, str(output), "Choose another folder, or move the folder of that name."))
    lines = [line for line in path.read_text(errors="replace").split("\n") if line.strip()] if path.is_file() else []
    if lines and not any(map(_is_line_of_cell, lines)):
        rule = f"be a folder without the {path.name} of a study or of another program, which would be lost"
        raise ConfigError(must("output", rule, str(output), "Choose another folder, or move the file."))


def is_of_evaluation(record: Mapping[str, Any]) -> bool:
    """Whether a line of a `results.jsonl` is a cell of `megamask evaluate`. The lines of a study have a `kind` too."""
    return "key" in record and "kind" not in record


def results_lines(cells: Iterable[Cell]) -> str:
    """The content of `results.jsonl`: a line for each cell, without the predictions and labels of single examples."""
    return "".join(f"{json.dumps(without_nan(short_record(cell)))}\n" for cell in cells)


def short_record(cell: Cell) -> dict[str, Any]:
    """The fields of ``cell`` without the predictions and labels of single examples."""
    return {name: value for name, value in asdict(cell).items() if name not in _LISTS}


def cell_from_record(record: Mapping[str, Any]) -> Cell:
    """The cell of a record as JSON holds it, with NaN where it has null. Raises pydantic's ValidationError."""
    values = dict(record)
    if "figures" in values:  # older records call the metrics so
        values.setdefault("metrics", values.pop("figures"))
    for name in _LISTS:
        if isinstance(values.get(name), list):
            values[name] = [math.nan if value is None else value for value in values[name]]
    for name in ("metrics", "scores"):
        if isinstance(values.get(name), dict):
            values[name] = {each: math.nan if value is None else value for each, value in values[name].items()}
    return _CELL.validate_python(values)


def without_nan(tree: Any) -> Any:
    """``tree`` with None, which JSON has, in place of NaN and Inf."""
    if isinstance(tree, Mapping):
        return {name: without_nan(value) for name, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [without_nan(value) for value in tree]
    return None if isinstance(tree, float) and not math.isfinite(tree) else tree


_CELL = TypeAdapter(Cell)


def _is_line_of_cell(line: str) -> bool:
    """Whether `results_lines` wrote ``line``."""
    with suppress(ValueError):
        record = parse_json(line)
        return isinstance(record, dict) and is_of_evaluation(record)
    return False


def _escape(name: str) -> str:
    """``name`` as a visible file name."""
    escaped = quote(name, safe=" ")
    return escaped if not escaped.startswith(".") else f"%2E{escaped[1:]}"


def _as_json(tree: Mapping[str, Any]) -> dict[str, Any]:
    """As it is after writing and reading: tuples become lists."""
    return json.loads(json.dumps(tree))


def _differ(old: Mapping[str, Any], new: Mapping[str, Any], name: str) -> bool:
    return (name in old) != (name in new) or old.get(name) != new.get(name)


def _shown(settings: Mapping[str, Any], name: str) -> str:
    return json.dumps(settings[name]) if name in settings else "absent"
