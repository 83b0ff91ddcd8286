"""The files that the authors of the tasks publish: GLUE's folders of .tsv files, SNLI, SQuAD 1.1 and BLiMP.

GLUE keeps the labels of its test files secret, so its dev files are reported. SNLI's test file is reported.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megamask.data.formats.compression import CORRUPT
from megamask.evaluation.formats.files import existing_file, json_objects_of, tab_separated_rows_of, whole_text
from megamask.evaluation.formats.rows import Row
from megamask.evaluation.tasks import Answer, Task
from megamask.storage.strict_json import BadRecord, parse_json


@dataclass(frozen=True)
class _Table:
    """Columns of a task of GLUE."""

    folder: str
    label: str = "label"
    columns: tuple[str, ...] = ()
    """Of the task's fields; those have the same names if none are given."""
    header: tuple[str, ...] = ()
    """Of files without one."""
    dev: str = "dev.tsv"
    other_names: tuple[tuple[str, str], ...] = ()
    """Other names of the two files."""
    incomplete: bool = False
    """Whether rows with missing columns are known and left out, as the Hub's copy leaves them out."""


_MSR = ("msr_paraphrase_train.txt", "msr_paraphrase_test.txt")
_SENTENCES = ("sentence1", "sentence2")
_TABLES = {
    "cola": _Table("CoLA", header=("source", "label", "star", "sentence")),
    "sst2": _Table("SST-2"),
    "mrpc": _Table("MRPC", "Quality", ("#1 String", "#2 String"), other_names=(_MSR,)),
    "stsb": _Table("STS-B", "score"),
    "qqp": _Table("QQP", "is_duplicate", incomplete=True),
    "mnli": _Table("MNLI", "gold_label", _SENTENCES, dev="dev_matched.tsv"),
    "mnli_mismatched": _Table("MNLI", "gold_label", _SENTENCES, dev="dev_mismatched.tsv"),
    "qnli": _Table("QNLI"),
    "rte": _Table("RTE"),
    "wnli": _Table("WNLI"),
}
_SNLI = ("snli_1.0_train.jsonl", "snli_1.0_test.jsonl")
_SQUAD = ("train-v1.1.json", "dev-v1.1.json")
_FOLDERS = {"snli": ("snli_1.0", "SNLI", "snli", "."), "squad": ("SQuAD", "squad", "."), "blimp": ("blimp", "BLiMP")}


def find_official_files(folder: Path, task: Task) -> tuple[tuple[Path, str], ...]:
    """The files of ``task`` below ``folder`` with their splits; none unless all are there."""
    if task.name == "blimp":
        for name in _FOLDERS["blimp"]:
            for place in (folder / name / "data", folder / name):
                if paths := sorted(place.glob("*.jsonl")):
                    return tuple((path, "test") for path in paths)
        return ()
    for inside, train, test in _candidates(task):
        train_file, test_file = existing_file(folder / inside, train), existing_file(folder / inside, test)
        if train_file and test_file:
            return (train_file, "train"), (test_file, "test")
    return ()


def official_places(task: Task) -> str:
    """Where the files of ``task`` are expected, for a message; empty if megamask reads it only as JSON lines."""
    if task.name == "blimp":
        return "blimp/*.jsonl"
    places = [f"{inside}/{train} and {inside}/{test}" for inside, train, test in _candidates(task)]
    return places[0] if places else ""


def read_official_files(files: tuple[tuple[Path, str], ...], task: Task, left_out: Counter[str]) -> Iterator[Row | str]:
    """The rows of ``files``, or the problems of their lines. ``left_out`` counts rows that are known to be damaged."""
    for path, split in files:
        if task.name == "squad":
            yield from _read_squad(path, split)
        elif task.name in ("snli", "blimp"):
            for place, record in json_objects_of(path):
                named = None if record is None else record | {"label": record.get("gold_label")}
                yield place if named is None else Row(place, split, named)
        else:
            yield from _read_table(path, split, task, left_out)


def _candidates(task: Task) -> list[tuple[str, str, str]]:
    """Folder, training file and reported file of every arrangement of a task."""
    if task.name in _TABLES:
        table = _TABLES[task.name]
        pairs = (("train.tsv", table.dev), *table.other_names)
        return [(table.folder, *pair) for pair in pairs]
    pair = {"snli": _SNLI, "squad": _SQUAD}.get(task.name)
    return [(inside, *pair) for inside in _FOLDERS[task.name]] if pair else []


def _read_table(path: Path, split: str, task: Task, left_out: Counter[str]) -> Iterator[Row | str]:
    table = _TABLES[task.name]
    columns = dict(zip((*task.fields, "label"), (*(table.columns or task.fields), table.label), strict=True))
    for place, values in tab_separated_rows_of(path, table.header):
        if values is None:
            yield place
            continue
        absent = [name for name in columns.values() if name not in values]
        if absent:
            names = ", ".join(map(repr, values))
            yield f"{path} must have the columns {', '.join(map(repr, absent))}; its columns are {names}."
            return
        missing = [name for name in columns.values() if values[name] is None]
        if missing and table.incomplete:
            left_out["incomplete_lines"] += 1
        elif missing:
            yield f"{place} has too few columns: {', '.join(map(repr, missing))} must be there."
        else:
            yield Row(place, split, {name: values[column] for name, column in columns.items()})


def _read_squad(path: Path, split: str) -> Iterator[Row | str]:
    try:
        for article in parse_json(whole_text(path))["data"]:
            for paragraph in article["paragraphs"]:
                for each in paragraph["qas"]:
                    answers = tuple(Answer(str(a["text"]), int(a["answer_start"])) for a in each["answers"])
                    values = {"question": each["question"], "context": paragraph["context"], "answers": answers}
                    yield Row(f"{path}, question {each['id']}", split, values | {"answers": answers or None})
    except (OSError, *CORRUPT, BadRecord, ValueError) as error:
        yield f"{path} cannot be read: {error}."
    except (KeyError, TypeError) as error:
        yield f"{path} is not a file of SQuAD 1.1: {error} is missing or of a wrong type."
