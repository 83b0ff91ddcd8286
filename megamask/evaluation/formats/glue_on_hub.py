"""GLUE as the Hub has it: the dataset `nyu-mll/glue`, whose parquet files run no code, from the network or the cache.

Its validation split is reported, since the labels of its test split are secret.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

from megamask.errors import DataError
from megamask.evaluation.formats.rows import Row
from megamask.evaluation.tasks import Task

REPOSITORY = "nyu-mll/glue"
_SPLITS = {"mnli": "validation_matched", "mnli_mismatched": "validation_mismatched"}
HUB_TASKS = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "mnli_mismatched", "qnli", "rte", "wnli")
"""The tasks that the dataset has."""
REASON = 300
"""Characters of a library's message that an error shows."""


def load_hub_task(task: Task) -> dict[str, Any]:
    """The splits `train` and `test` of ``task``. Raises DataError if it can be read from neither network nor cache."""
    import datasets  # slow to import

    config = task.name.removesuffix("_mismatched")
    try:
        splits = {"train": "train", "test": _SPLITS.get(task.name, "validation")}
        return {name: datasets.load_dataset(REPOSITORY, config, split=split) for name, split in splits.items()}
    except Exception as error:  # the library raises many types: no network, no cache, no space
        reason = " ".join(str(error).split())[:REASON] or type(error).__name__
        raise DataError(
            f"{task.name}: {REPOSITORY} can be read neither from the network nor from the cache: {reason}. Set `data` "
            "to a folder of task files, or run the same command once where there is a network, with the same HF_HOME."
        ) from None


def read_hub_task(task: Task, splits: dict[str, Any]) -> Iterator[Row | str]:
    """The rows of the loaded ``splits``, or a problem if their classes are others."""
    for split, table in splits.items():
        names = getattr(table.features["label"], "names", None)
        if task.kind == "classification" and task.labels[0] not in "01" and tuple(names or ()) != task.labels:
            yield f"{REPOSITORY}, {task.name}: the labels must be {', '.join(task.labels)}, but are {names}."
            return
        for number, record in enumerate(table):
            label = record["label"]
            if task.kind == "classification" and 0 <= label < len(task.labels):
                label = task.labels[label]
            yield Row(f"{REPOSITORY}, {task.name}, {split}, row {number}", split, record | {"label": label})


def hash_hub_task(task: Task, splits: dict[str, Any]) -> dict[str, str]:
    """A SHA-256 of the texts and labels of each split, since the files of a cache have no stable names."""
    hashes = {}
    for name, table in splits.items():
        digest = hashlib.sha256()
        for record in table.select_columns([*task.fields, "label"]):
            digest.update(json.dumps(record, sort_keys=True).encode())
        hashes[f"{REPOSITORY}/{task.name}/{name}"] = digest.hexdigest()
    return hashes
