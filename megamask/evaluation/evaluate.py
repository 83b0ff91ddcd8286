"""`megamask evaluate`: find the tasks, compute the cells that are not there yet, write the results and the table.

All settings, files and earlier cells are checked before anything is computed. A cell that fails is recorded, and the
other cells are still computed; the exit code is then 1. Several processes may share a folder (`shared_jobs`).
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megamask.errors import CheckpointError, ConfigError, DataError, StorageError, raise_all
from megamask.evaluation.cells import (
    FOLDER,
    RESULTS_FILE,
    cell_path,
    check_output,
    differences,
    read_cell,
    read_cells,
    results_lines,
    storage_errors,
    write_cell,
)
from megamask.evaluation.formats.rows import few_classes, limit_train
from megamask.evaluation.jobs import (
    MODELS,
    Job,
    build_cell,
    cell_settings,
    compute_outcomes,
    failed_cell,
    job_keys,
    plan_jobs,
    read_task_once,
)
from megamask.evaluation.outcome import Cell, CellKey
from megamask.evaluation.read_tasks import FoundTasks, find_tasks, hash_task
from megamask.evaluation.settings import EvaluateConfig
from megamask.evaluation.shared_jobs import SharedJobs, alone
from megamask.evaluation.table import results_table
from megamask.evaluation.tasks import TASKS
from megamask.runtime.accelerator import choose_accelerator
from megamask.runtime.entry_point import as_problem
from megamask.runtime.progress_bar import ProgressBar, elapsed
from megamask.storage import workdir
from megamask.storage.atomic_write import write_atomic

if TYPE_CHECKING:
    from megamask.evaluation.encoder import EncoderFolder

POLL = 1.0
"""Seconds between two updates of the progress bar."""


def run_evaluation(config: EvaluateConfig) -> int:
    """Compute the cells and print the table; returns 0, or 1 if a cell failed, or 3 if a named task has no files."""
    available = find_tasks(config.data, config.tasks)
    if config.list_tasks:
        print(task_list(available), end="")
        return 0
    check_output(config.output)
    for sentence in available.missing.values():
        print(f"Skipped {sentence}", file=sys.stderr)
    choose_accelerator()
    with_texts = find_tasks(config.data, ()).tasks if config.data else ()
    jobs = plan_jobs(available.tasks, [files for files in with_texts if files.task.kind != "minimal_pairs"], config)
    encoder = _open(config, jobs) if config.model else None
    cells = read_cells(config.output)
    missing = missing_jobs(jobs, cells, encoder, config)
    raise_all(DataError, _file_problems(missing, config.max_train))
    if len(missing) < len(jobs):
        print(f"{len(jobs) - len(missing)} of {len(jobs)} results are in {config.output} already.", file=sys.stderr)
    with storage_errors(config.output):
        (config.output / FOLDER).mkdir(parents=True, exist_ok=True)
        _compute(missing, {key for key, cell in cells.items() if cell.state != "failed"}, encoder, config)
        return _report(config, jobs, encoder, 3 if config.tasks and available.missing else 0)


def task_list(available: FoundTasks) -> str:
    """A line for each task: its name, its title, how it is scored and where its files are."""
    lines = []
    for name, task in TASKS.items():
        files = next((files for files in available.tasks if files.task is task), None)
        if files or name in available.missing:
            where = "Hub: nyu-mll/glue" if files else available.missing[name].partition(": ")[2]
            if files and files.json_lines:
                where = str(files.json_lines)
            elif files and files.official:
                where = str(files.official[0][0].parent)
            lines.append(f"{name:16}{task.title:11}{' and '.join(task.metrics).replace('_', ' '):24}{where}")
    return "".join(f"{line}\n" for line in lines)


def missing_jobs(
    jobs: Sequence[Job], cells: Mapping[CellKey, Cell], encoder: EncoderFolder | None, config: EvaluateConfig
) -> list[Job]:
    """The jobs that are not done. A job that failed is not done.

    Raises ConfigError, with every difference, if ``cells`` has results of other settings, weights or files.
    """
    problems = _other_settings(cells, jobs, config)
    missing = []
    hashes = {job.files: hash_task(job.files) for job in jobs}
    for job in jobs:
        keys = job_keys(job, encoder.label if encoder else "", config)
        done = [cells[key] for key in keys if key in cells and cells[key].state != "failed"]
        for cell in done:
            path = cell_path(config.output, cell.key)
            if dict(cell.data) != hashes[job.files]:
                problems.append(f"{path} was computed from other files of {cell.key.task}. {_CURE}")
            if encoder and job.method != "reference" and not job.reference and cell.weights != encoder.weights:
                problems.append(f"{path} belongs to other weights of the same name {cell.key.model!r}. {_CURE}")
        if keys[0] not in {cell.key for cell in done}:
            missing.append(job)
    raise_all(ConfigError, problems)
    return missing


_CURE = "Set `output` to another folder, or delete the file."


def _other_settings(cells: Mapping[CellKey, Cell], jobs: Sequence[Job], config: EvaluateConfig) -> list[str]:
    """A sentence for each difference between cells of the folder and cells of the same kind that this command makes."""
    modes = {job.mode for job in jobs}
    places: dict[str, list[str]] = {}
    for key, cell in cells.items():
        if key.mode in modes and cell.state != "failed":
            for difference in differences(cell.settings, cell_settings(TASKS[key.task], key, config)):
                places.setdefault(difference, []).append(str(cell_path(config.output, key)))
    return [
        f"{config.output} has results of other settings: {difference}, in {len(paths)} of {len(cells)} cells, such as "
        f"{paths[0]}. Set `output` to another folder, or use the same settings."
        for difference, paths in places.items()
    ]


def _open(config: EvaluateConfig, jobs: Sequence[Job]) -> EncoderFolder:
    """The encoder. Raises CheckpointError if it is unfit, with the problems of local task files too."""
    from megamask.evaluation.encoder import open_encoder  # imports torch

    try:
        return open_encoder(config.model, config.output / MODELS)
    except CheckpointError as error:
        more = _file_problems(jobs, config.max_train) if config.data else []
        raise CheckpointError(*error.problems, *more) from None


def _file_problems(jobs: Sequence[Job], max_train: int | None) -> list[str]:
    """Read the files of all jobs, so that every problem is reported before anything is computed."""
    problems: list[str] = []
    for files in dict.fromkeys(files for job in jobs for files in (job.files, *job.texts)):
        try:
            problems += few_classes(read_task_once(files), max_train)
        except DataError as error:
            problems += error.problems
            if not files.json_lines and not files.official:
                break  # the Hub does not answer, and each task would wait for it
    return problems


def _compute(
    jobs: Sequence[Job], done: Collection[CellKey], encoder: EncoderFolder | None, config: EvaluateConfig
) -> None:
    """Compute and write the cells of ``jobs``, except those that an interrupted job has written before, or another
    process meanwhile."""
    sizes = {job: _size(job, config) for job in jobs}

    def cell_of(job: Job) -> Path:
        return cell_path(config.output, job_keys(job, encoder.label if encoder else "", config)[0])

    def is_done(job: Job) -> bool:
        return cell_of(job).exists() and read_cell(cell_of(job)).state != "failed"

    with (
        ProgressBar("evaluate", sum(sizes.values()), "example") as bar,
        closing(SharedJobs(jobs, cell_of, is_done)) as shared,
    ):
        for job, cells in _results(shared, encoder, config, bar):
            for cell in reversed(cells):  # the first variant, which makes the job done, last
                if cell.key not in done:
                    write_cell(config.output, cell)
            shared.finish(job)
            print(_line(job, cells), flush=True)
            bar.update(sizes[job])
        bar.update(sum(sizes[job] for job in shared.of_others))


def _results(
    jobs: SharedJobs, encoder: EncoderFolder | None, config: EvaluateConfig, bar: ProgressBar
) -> Iterator[tuple[Job, list[Cell]]]:
    """Each job of this command with its cells as it ends, in this process or in several."""
    workers = min(config.workers, jobs.left)
    if workers <= 1:
        while jobs.left:
            if job := jobs.take():
                with elapsed(job.name):
                    cells = compute_cells(job, encoder, config)
                yield job, cells
            elif jobs.left:
                jobs.wait()
        return
    number = workdir.SPAWN.Value("i", 0)
    threads = max(1, len(os.sched_getaffinity(0)) // workers)
    with workdir.processes(workers, _start_worker, number, threads) as pool:
        running: dict[Future[list[Cell]], Job] = {}
        while running or jobs.left:
            while len(running) < workers and (job := jobs.take()):
                running[pool.submit(compute_cells, job, encoder, config)] = job
            if not running:
                if jobs.left:
                    jobs.wait()
                continue
            finished, _ = wait(running, timeout=POLL, return_when=FIRST_COMPLETED)
            bar.update(0)
            for future in finished:
                yield running.pop(future), future.result()


def _start_worker(number: Any, threads: int) -> None:
    """In a worker process: use an equal share of the cores, and one GPU."""
    import torch
    from threadpoolctl import threadpool_limits

    with number.get_lock():
        index, number.value = number.value, number.value + 1
    torch.set_num_threads(threads)
    threadpool_limits(threads)
    if count := torch.cuda.device_count():
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")
        devices = visible if visible != [""] else list(map(str, range(count)))
        os.environ["CUDA_VISIBLE_DEVICES"] = devices[index % len(devices)]


def compute_cells(job: Job, encoder: EncoderFolder | None, config: EvaluateConfig) -> list[Cell]:
    """The cells of ``job``; after an error a single one, of state `failed`. A full disk raises StorageError."""
    begin = time.monotonic()
    try:
        outcomes = compute_outcomes(job, encoder, config)
        seconds = time.monotonic() - begin
        return [build_cell(key, outcome, job, encoder, config, seconds) for key, outcome in outcomes.items()]
    except Exception as error:  # from many libraries; the other cells do not depend on this one
        problem = as_problem(error)
        if isinstance(problem, StorageError):
            raise problem from None
        if problem is None:
            traceback.print_exc()
        reason = str(problem) if problem else f"{type(error).__name__}: {error}"
        key = job_keys(job, encoder.label if encoder else "", config)[0]
        return [failed_cell(key, reason, job, encoder, config, time.monotonic() - begin)]


def _report(config: EvaluateConfig, jobs: Sequence[Job], encoder: EncoderFolder | None, code: int) -> int:
    """Write results.jsonl and the table of all cells in the folder, print the table, and return the exit code."""
    with alone(config.output):
        cells = read_cells(config.output)
        table = results_table(list(cells.values()))
        write_atomic(config.output / RESULTS_FILE, results_lines(cells.values()))
        write_atomic(config.output / "results.md", table)
    print(f"\n{table}", end="")
    keys = {key for job in jobs for key in job_keys(job, encoder.label if encoder else "", config)}
    return 1 if any(cells[key].state == "failed" for key in keys & cells.keys()) else code


def _size(job: Job, config: EvaluateConfig) -> int:
    """Examples, weighted by how often the encoder reads each one."""
    data = limit_train(read_task_once(job.files), config.max_train)
    reported = len(data.test)
    if data.test.groups and config.max_pairs:
        reported = min(reported, config.max_pairs * len(set(data.test.groups)))
    return _PASSES[job.method] * (len(data.train) + reported)


_PASSES = {"zero_shot": 20, "frozen": 1, "fine_tuned": 30, "reference": 1}
"""About how often an example is read: a sentence once for each token, a training example in several epochs."""


def _line(job: Job, cells: Sequence[Cell]) -> str:
    if cells[0].state == "failed":
        return f"{job.name}: failed: {cells[0].reason}"
    scores = ", ".join(f"{cell.key.variant} {100 * (cell.score or 0):.1f}".strip() for cell in cells)
    state = " (collapsed)" if any(cell.state == "collapsed" for cell in cells) else ""
    return f"{job.name}: {scores}{state}, {cells[0].seconds:.1f} s"
