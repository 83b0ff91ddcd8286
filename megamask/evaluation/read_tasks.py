"""Find the files of the tasks in a folder, or on the Hub, and read them; 100,000 examples take seconds."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from megamask.errors import DataError, raise_all
from megamask.evaluation.formats import glue_on_hub, json_line_tasks, official_files
from megamask.evaluation.formats.rows import build_task_data
from megamask.evaluation.tasks import TASKS, Task, TaskData
from megamask.storage.file_list import sha256


@dataclass(frozen=True)
class TaskFiles:
    """Where the examples of one task are."""

    task: Task
    json_lines: Path | None = None
    official: tuple[tuple[Path, str], ...] = ()
    """Files and their splits. Without either, the task is read from the Hub."""


@dataclass(frozen=True)
class FoundTasks:
    """The tasks that can be read, and a sentence for each one that cannot."""

    tasks: tuple[TaskFiles, ...]
    missing: dict[str, str]
    """By the name of the task: where to put which files."""


def find_tasks(folder: Path | None, names: tuple[str, ...]) -> FoundTasks:
    """The files of the tasks ``names``, or of all tasks, in ``folder``; None: on the Hub. Reads no file.

    Raises DataError if a task is there twice, or if there is no task at all.
    """
    wanted = [TASKS[name] for name in names or TASKS]
    if folder is None:
        return _on_hub(wanted)
    tasks: list[TaskFiles] = []
    missing, problems = {}, []
    for task in wanted:
        files = TaskFiles(
            task, json_line_tasks.find_json_lines(folder, task), official_files.find_official_files(folder, task)
        )
        if files.json_lines and files.official:
            other = ", ".join(str(path) for path, _ in files.official[:2])
            problems.append(f"{task.name} is in {files.json_lines} and in {other}. Move one of them elsewhere.")
        elif files.json_lines or files.official:
            tasks.append(files)
        else:
            missing[task.name] = f"{task.name}: {_where(task, folder)}"
    if not tasks and not problems:
        problems = [f"{folder} has the files of none of these tasks:", *missing.values()]
    raise_all(DataError, problems)
    return FoundTasks(tuple(tasks), missing)


def hash_task(files: TaskFiles) -> dict[str, str]:
    """SHA-256 of each file of a task by its name, without reading its examples, unless they are on the Hub."""
    if files.json_lines:
        return _hashes(files.json_lines)
    if files.official:
        return _hashes(*(path for path, _ in files.official))
    return glue_on_hub.hash_hub_task(files.task, glue_on_hub.load_hub_task(files.task))


def read_task(files: TaskFiles) -> TaskData:
    """The examples of a task. Raises DataError with every problem of its files."""
    task, left_out = files.task, Counter[str]()
    if files.json_lines:
        rows = json_line_tasks.read_json_line_task(files.json_lines, task)
        return build_task_data(task, rows, hash_task(files), "json_lines", left_out)
    if files.official:
        rows = official_files.read_official_files(files.official, task, left_out)
        return build_task_data(task, rows, hash_task(files), "official", left_out)
    splits = glue_on_hub.load_hub_task(task)
    rows = glue_on_hub.read_hub_task(task, splits)
    return build_task_data(task, rows, glue_on_hub.hash_hub_task(task, splits), "hub", left_out)


def _on_hub(wanted: list[Task]) -> FoundTasks:
    tasks = tuple(TaskFiles(task) for task in wanted if task.name in glue_on_hub.HUB_TASKS)
    missing = {
        task.name: f"{task.name}: {glue_on_hub.REPOSITORY} does not have it. Set `data` to a folder with its files."
        for task in wanted
        if task.name not in glue_on_hub.HUB_TASKS
    }
    if not tasks:
        raise DataError(*missing.values())
    return FoundTasks(tasks, missing)


def _where(task: Task, folder: Path) -> str:
    official = official_files.official_places(task)
    names = " or ".join(filter(None, [json_line_tasks.file_names(task)[0], official]))
    return f"put {names} into {folder}."


def _hashes(*paths: Path) -> dict[str, str]:
    return {path.name: sha256(path) for path in paths}
