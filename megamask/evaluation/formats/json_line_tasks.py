"""A task in one file of JSON lines: an object per example, with `split`, the fields of the task and `label`.

SQuAD has `question`, `context`, `answer_text` and `answer_start` (in characters); BLiMP has `UID` and no label.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from megamask.evaluation.formats.files import existing_file, json_objects_of
from megamask.evaluation.formats.glue_on_hub import HUB_TASKS
from megamask.evaluation.formats.rows import Row
from megamask.evaluation.tasks import Answer, Task


def find_json_lines(folder: Path, task: Task) -> Path | None:
    """The file of ``task`` in ``folder``, compressed or not."""
    return existing_file(folder, *file_names(task))


def file_names(task: Task) -> tuple[str, ...]:
    """Names that the file of ``task`` may have, the usual one first."""
    plain, with_glue = f"{task.name}.jsonl", f"glue_{task.name}.jsonl"
    if task.name == "squad":
        return plain, "squad_slice.jsonl"
    return (with_glue, plain) if task.name in HUB_TASKS else (plain, with_glue)


def read_json_line_task(path: Path, task: Task) -> Iterator[Row | str]:
    """The rows of the file at ``path``, or the problems of its lines."""
    for place, record in json_objects_of(path):
        if record is None:
            yield place
        elif "split" not in record:
            yield f"{place} has no field 'split', which must be train, dev or test."
        elif task.kind != "spans":
            yield Row(place, str(record["split"]), record)
        else:
            text, start = record.get("answer_text"), record.get("answer_start")
            if not isinstance(text, str) or type(start) is not int:  # True is an int too
                yield f"{place} must have a string `answer_text` and a number `answer_start`, in characters."
            else:
                yield Row(place, str(record["split"]), record | {"answers": (Answer(text, start),)})
