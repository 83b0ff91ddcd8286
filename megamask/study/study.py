"""`megamask study`: train and evaluate every arm of a plan with every seed, and write the results and the report.

Every run is an ordinary `megamask pretrain`, and every evaluation an ordinary `megamask evaluate`, each in its own
process. The study starts them, waits, and collects their results. It adds the start of Python to each command, about
ten seconds.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from megamask.errors import ConfigError, DataError, MegamaskError, listed, must, raise_all
from megamask.evaluation.cells import RESULTS_FILE, storage_errors
from megamask.evaluation.read_tasks import find_tasks
from megamask.evaluation.tasks import TASKS
from megamask.study.collect import collect_results, read_results, write_results
from megamask.study.dry_run import describe_study
from megamask.study.jobs import POLL, JobQueue, Slot, describe_end, find_slots, unfinished_runs
from megamask.study.plan import StudyPlan
from megamask.study.plan_file import find_plan, plan_path, plan_problems, shipped_plans, tasks_of, unchecked_plan
from megamask.study.planned_cost import planned_folders
from megamask.study.planned_runs import PlannedRun, plan_runs, select_runs
from megamask.study.results import RunKey
from megamask.study.settings import StudyConfig
from megamask.study.study_folder import FINISHED, open_study
from megamask.study.time_left import describe_left


def run_study(config: StudyConfig) -> int:
    """Run, resume or describe a study; 0, or 1 if a run failed.

    Raises ConfigError, DataError and StorageError.
    """
    if config.list_plans:
        return print_plans()
    plan = unchecked_plan(plan_path(config.plan))
    tasks_data = tasks_folder(config, plan)
    problems = [] if config.report else task_problems(plan, tasks_data)
    if of_plan := plan_problems(plan):
        raise ConfigError(*of_plan, *problems)
    folder = (config.output or Path("studies") / plan.name).absolute()
    text = [str(Path(word).absolute()) for word in planned_folders(config.data or plan.text)]
    if config.data and any(axis.setting == "data" for axis in plan.axis):
        words = " ".join(map(str, config.data))
        raise ConfigError(must("data", "be left out for a plan with an axis over `data`", words))
    try:
        runs = plan_runs(plan, folder, text)
        chosen = select_runs(runs, config.only)
    except MegamaskError as error:
        raise type(error)(*error.problems, *problems) from None
    slots = find_slots(config.jobs)
    left = without_known(chosen, folder)
    if config.dry_run:
        print(describe_study(plan, runs, chosen, unfinished_runs(left), len(slots)))
    raise_all(DataError, problems)
    raise_all(ConfigError, results_problems(runs, folder))
    for line in open_study(folder, plan, text, write=not config.dry_run):
        print(line)
    if config.dry_run:
        return 0
    with storage_errors(folder, FINISHED):
        failed = [] if config.report else run_jobs(left, slots, tasks_data)
        publish(plan, runs, folder)
    for line in failed:
        print(line)
    return 1 if failed else 0


def tasks_folder(config: StudyConfig, plan: StudyPlan) -> str:
    """The absolute path of the folder of the tasks; empty if neither names one."""
    folder = config.tasks_data or plan.tasks_data
    return str(Path(folder).absolute()) if folder else ""


def task_problems(plan: StudyPlan, tasks_data: str) -> list[str]:
    """Sentences for tasks of the evaluations that have no files in ``tasks_data``. The files are not read.

    Names that are not tasks are problems of the plan, and are left out here.
    """
    if plan.evaluations and tasks_data and not Path(tasks_data).is_dir():
        return [must("tasks_data", "be a folder with task files", tasks_data)]
    problems: list[str] = []
    for evaluation in plan.evaluations:
        names = tuple(name for name in tasks_of(evaluation) if name in TASKS) if "tasks" in evaluation.set else ()
        try:
            missing = find_tasks(Path(tasks_data) if tasks_data else None, names).missing if names else {}
            problems += [line.replace("`data`", "`tasks_data`") for line in missing.values()]
        except DataError as error:
            problems += [line.replace("`data`", "`tasks_data`") for line in error.problems]
    return list(dict.fromkeys(problems))


def print_plans() -> int:
    """Print the shipped plans."""
    plans = {name: find_plan(name) for name in shipped_plans()}
    width = max(map(len, plans), default=0)
    print("\n".join(f"{name:{width}}  {plan.question}" for name, plan in plans.items()))
    return 0


def results_problems(runs: Sequence[PlannedRun], folder: Path) -> list[str]:
    """Sentences for runs in results.jsonl that are not those of the plan: they would be lost when it is written again.

    A run with a folder of its own is compared by the command that continues it.
    """
    path, cure = folder / RESULTS_FILE, "They would be lost. Choose another --output, or move the file."
    known, _, _ = read_results(path)
    planned = {run.key: run for run in runs}
    strange = [f"{arm}/{budget}/seed-{seed}" for arm, seed, budget in sorted(known.keys() - planned.keys())]
    others = [
        run.name
        for key, run in planned.items()
        if key in known and known[key].settings != run.settings and not run.record.exists()
    ]
    problems = [f"{path} has runs that are not in the plan: {listed(strange, 'run')}. {cure}"] if strange else []
    if others:
        why = "with another text, a changed plan or recipe, or an early version of megamask"
        problems.append(f"{path} has runs of other settings, made {why}: {listed(others, 'run')}. {cure}")
    return problems


def without_known(runs: Sequence[PlannedRun], folder: Path) -> list[PlannedRun]:
    """The runs that are not in results.jsonl, or whose folders exist, so that they can continue.

    A run whose model is the teacher of such a run is repeated if its folder is missing.
    """
    known, cells, _ = read_results(folder / RESULTS_FILE)
    left, teachers = list[PlannedRun](), set[RunKey | None]()
    for run in reversed(runs):  # a teacher comes before the runs that it teaches
        if (
            run.key in teachers
            or run.key not in known
            or known[run.key].state != "finished"
            or known[run.key].settings != run.settings
            or (run.evaluations and run.key not in cells)
            or run.run_folder.exists()
        ):
            left.append(run)
            teachers.add(run.teacher_key)
    return left[::-1]


def run_jobs(runs: Sequence[PlannedRun], slots: Sequence[Slot], tasks_data: str) -> list[str]:
    """Run everything that is not finished; a sentence for each command that failed or could not start."""
    queue, failed = JobQueue(runs, slots, tasks_data), list[str]()
    try:
        while queue.unfinished:
            queue.start_next()
            for command, record in queue.finish():
                print(f"{describe_end(command, record)}; {describe_left(runs, len(slots))}", flush=True)
                if record.state != "finished":
                    failed.append(f"{command.run.name}: {command.step} {record.state}: {record.reason}")
            for command in queue.take_started():
                print(f"{command.run.name}: {command.step} started, log {command.run.log(command.step)}", flush=True)
            for run in queue.take_busy():
                print(f"{run.name}: skipped, because another process works on it", flush=True)
            if blocked := queue.blocked():
                failed += [
                    f"{run.name} was not started: the run of its teacher, {run.arm.teacher}/{run.budget}/"
                    f"seed-{run.seed}, is not finished. With --only, name it too."
                    for run in blocked
                ]
                break
            time.sleep(POLL)
    finally:
        queue.stop()
    return failed


def publish(plan: StudyPlan, runs: Sequence[PlannedRun], folder: Path) -> None:
    """Write results.jsonl and the report of everything that has been computed."""
    results = collect_results(plan, runs, folder)
    write_results(results, folder / RESULTS_FILE)
    print(f"results: {folder / RESULTS_FILE} ({len(results.runs)} of {len(runs)} runs)")
    if results.runs:
        from megamask.study.report import write_report  # takes a second to import

        write_report(results, folder)
        print(f"report: {folder / 'report.html'}")
