"""From the rows of a file to the examples of a task: every row is checked, and all problems are reported together."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from megamask.errors import DataError, must, raise_all
from megamask.evaluation.tasks import Answer, Examples, Layout, Task, TaskData

SPLITS = {"train": "train", "dev": "dev", "validation": "dev", "test": "test"}
"""Names of splits that files use, and what they mean."""
HIGHEST = 5.0
"""The largest similarity of STS-B."""
NO_GOLD_LABEL = "-"
"""The label of SNLI and MNLI where the annotators disagree."""
MISPLACED_SHARE = 0.01
"""Share of the answers that may stand elsewhere than at their ``start``; these training examples are left out."""
SHOWN = 20
"""Problems of one task that an error lists."""


@dataclass(frozen=True)
class Row:
    """One example as a file has it."""

    place: str
    """The file and the line."""
    split: str
    values: Mapping[str, Any]
    """By the names of the task's fields; `label`; of spans `answers`, of minimal pairs `UID`."""


@dataclass
class _Split:
    texts: list[tuple[str, ...]] = field(default_factory=list)
    labels: list[float] = field(default_factory=list)
    answers: list[tuple[Answer, ...]] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)

    def examples(self) -> Examples:
        labels = np.array(self.labels, dtype=np.float64)
        return Examples(tuple(self.texts), labels, tuple(self.answers), tuple(self.groups))


def build_task_data(
    task: Task, rows: Iterable[Row | str], files: Mapping[str, str], layout: Layout, left_out: Counter[str]
) -> TaskData:
    """The examples of ``rows``; a string among them is a problem that the reader met.

    The split `test` is reported, or `dev` if there is none. ``left_out`` counts the rows that the reader dropped, and
    is continued here. Raises DataError with every problem: the file, the line, the rule and the value.
    """
    splits: dict[str, _Split] = {name: _Split() for name in ("train", "dev", "test")}
    problems: list[str] = []
    misplaced: list[str] = []
    answered = 0
    for row in rows:
        if isinstance(row, str):
            problems.append(row)
            continue
        row_problems = _problems(task, row)
        if row_problems:
            problems += row_problems
            continue
        split = SPLITS[row.split]
        texts = tuple(row.values[name] for name in task.fields)
        if task.kind == "spans":
            answered += 1
            if any(not _is_at_its_place(answer, texts[-1]) for answer in row.values["answers"]):
                misplaced.append(row.place)
                if split == "train":
                    left_out["misplaced_answers"] += 1
                    continue
        if row.values.get("label") == NO_GOLD_LABEL and NO_GOLD_LABEL not in task.labels:
            left_out["without_gold_label"] += 1
            continue
        splits[split].texts.append(texts)
        splits[split].labels.append(_number(task, row.values.get("label")))
        if task.kind == "spans":
            splits[split].answers.append(tuple(row.values["answers"]))
        elif task.kind == "minimal_pairs":
            splits[split].groups.append(row.values["UID"])
    if len(misplaced) > MISPLACED_SHARE * max(answered, 1):
        problems += [
            f"{place}: an answer must occur in the context at its `answer_start`, but does not." for place in misplaced
        ]
    reported = "test" if splits["test"].texts else "dev"
    if reported == "test" and splits["dev"].texts:
        left_out["unused_dev_examples"] += len(splits["dev"].texts)
    train, test = splits["train"].examples(), splits[reported].examples()
    if not problems:
        problems = _split_problems(task, train, test, ", ".join(files))
    _raise_some(task, problems)
    counts = {"train_examples": len(train), "test_examples": len(test)}
    counts["test_examples_in_train"] = _repeats(train, test)
    empty = sum(not all(text.strip() for text in texts) for part in (train, test) for texts in part.texts)
    counts |= {"empty_texts": empty} if empty else {}
    return TaskData(task, train, test, files, layout, counts | {f"left_out/{why}": n for why, n in left_out.items()})


def limit_train(data: TaskData, most: int | None) -> TaskData:
    """``data`` with at most ``most`` training examples, drawn once with a fixed seed, in their order."""
    if most is None or len(data.train) <= most:
        return data
    kept = np.sort(np.random.default_rng(0).choice(len(data.train), most, replace=False))
    train = Examples(
        tuple(data.train.texts[i] for i in kept),
        data.train.labels[kept],
        tuple(data.train.answers[i] for i in kept) if data.train.answers else (),
    )
    counts = dict(data.counts) | {"train_examples": most}
    return TaskData(data.task, train, data.test, data.files, data.layout, counts)


def few_classes(data: TaskData, most: int | None) -> list[str]:
    """A sentence if at most ``most`` training examples leave fewer than two classes, so that nothing can be learnt."""
    if data.task.kind != "classification" or most is None or most >= len(data.train):
        return []
    if len(np.unique(limit_train(data, most).train.labels)) > 1:
        return []
    return [must("max_train", f"leave two classes of {data.task.name} at least", most, "Use a larger number.")]


def _problems(task: Task, row: Row) -> list[str]:
    if row.split not in SPLITS:
        return [f"{row.place}: `split` must be train, dev or test, but is {row.split!r}."]
    problems = []
    needed = {"classification": ("label",), "regression": ("label",), "spans": ("answers",), "minimal_pairs": ("UID",)}
    for name in (*task.fields, *needed[task.kind]):
        value = row.values.get(name)
        if value is None:
            filled = [each for each in row.values if row.values[each] is not None]
            shown = ", ".join(map(repr, filled[:10])) or "none"
            problems.append(f"{row.place} has no value for the field {name!r}; its fields with a value are {shown}.")
        elif name in (*task.fields, "UID") and not isinstance(value, str):
            problems.append(f"{row.place}: the field {name!r} must be a string, but is {type(value).__name__}.")
        elif isinstance(value, str) and _SURROGATE.search(value):
            problems.append(f"{row.place}: the field {name!r} has an unpaired surrogate. Remove it.")
    if not problems and "label" in needed[task.kind]:
        problems += _label_problem(task, row)
    if not problems and task.kind == "spans" and not all(answer.text.strip() for answer in row.values["answers"]):
        problems.append(f"{row.place}: an answer must have text, but is empty.")
    return problems


def _label_problem(task: Task, row: Row) -> list[str]:
    value = row.values["label"]
    if task.kind == "regression":
        try:
            number = float("nan") if isinstance(value, bool) else float(value)
        except (TypeError, ValueError):
            number = math.nan
        if not 0 <= number <= HIGHEST:
            return [f"{row.place}: the label must lie in [0, {HIGHEST:g}], but is {value!r}."]
        return []
    if isinstance(value, (bool, float)) or str(value) not in (*task.labels, NO_GOLD_LABEL):
        hidden = " The labels of GLUE's test files are not public: use dev." if str(value) == "-1" else ""
        return [f"{row.place}: the label must be one of {', '.join(task.labels)}, but is {value!r}.{hidden}"]
    return []


def _number(task: Task, label: Any) -> float:
    """A class number or a number; 1 for spans and pairs."""
    if task.kind == "classification":
        return float(task.labels.index(str(label)))
    return float(label) if task.kind == "regression" else 1.0


def _is_at_its_place(answer: Answer, context: str) -> bool:
    return answer.start >= 0 and context.startswith(answer.text, answer.start)


def _split_problems(task: Task, train: Examples, test: Examples, files: str) -> list[str]:
    problems = [] if len(test) else [f"{task.name}: the split dev or test must have examples, but is empty ({files})."]
    if task.kind == "minimal_pairs":
        return problems
    if not len(train):
        return [*problems, f"{task.name}: the split train must have examples, but is empty ({files})."]
    if task.kind == "classification" and len(np.unique(train.labels)) < 2:
        only = task.labels[int(train.labels[0])]
        problems.append(f"{task.name}: train must have two classes at least, but has only {only} ({files}).")
    return problems


def _raise_some(task: Task, problems: Sequence[str]) -> None:
    more = len(problems) - SHOWN
    shown = [*problems[:SHOWN], *([f"{task.name}: {more:,} more problems of this kind."] if more > 0 else [])]
    raise_all(DataError, shown)


def _repeats(train: Examples, test: Examples) -> int:
    """Test examples that occur in train, ignoring case and punctuation."""
    known = {_plain(texts) for texts in train.texts}
    return sum(_plain(texts) in known for texts in test.texts)


_SURROGATE = re.compile("[\ud800-\udfff]")
_PUNCTUATION = re.compile(r"[\W_]+")


def _plain(texts: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(_PUNCTUATION.sub(" ", text.lower()).strip() for text in texts)
