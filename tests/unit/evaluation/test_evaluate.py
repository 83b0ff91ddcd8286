"""The command: what is computed, what is kept, what is refused, and what happens to the rest after a failure."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shlex
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from threading import Thread

import pytest
import tyro

from megamask.errors import CheckpointError, ConfigError, DataError, StorageError
from megamask.errors.setting_rules import settings_problems
from megamask.evaluation import evaluate as command
from megamask.evaluation import jobs, shared_jobs
from megamask.evaluation.cells import read_cells, write_cell
from megamask.evaluation.jobs import Job
from megamask.evaluation.outcome import Cell, Outcome
from megamask.evaluation.settings import EvaluateConfig, FineTuningConfig
from megamask.evaluation.tasks import TASKS, TaskData
from tests.unit.evaluation.files import LINES, write_lines


@dataclass(frozen=True)
class Encoder:
    """In place of an opened encoder."""

    label: str = "model"
    weights: str = "1" * 64


@dataclass
class Evaluations:
    """In place of the evaluations of an encoder: records what was asked."""

    calls: list[tuple[str, str, int]]
    failing: str = ""

    def __call__(
        self, method: str, encoder: object, data: TaskData, config: EvaluateConfig, seed: int
    ) -> dict[str, Outcome]:
        self.calls.append((data.task.name, method, seed))
        if data.task.name == self.failing:
            raise RuntimeError("no memory")
        outcome = Outcome(data.test.labels, dict.fromkeys(data.task.metrics, 1.0))
        return {name: outcome for name in ("", "first", "mean", "original")}


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    folder.mkdir()
    write_lines(folder / "sst2.jsonl", LINES)
    write_lines(folder / "subj.jsonl", LINES)
    pair = {"split": "dev", "sentence_good": "Who ran?", "sentence_bad": "Ran who?", "UID": "island"}
    write_lines(folder / "blimp.jsonl", [pair])
    context = {"context": "It froze.", "question": "What?", "answer_text": "It", "answer_start": 0}
    write_lines(folder / "squad.jsonl", [{"split": split, **context} for split in ("train", "dev")])
    return folder


@pytest.fixture
def evaluations(monkeypatch: pytest.MonkeyPatch) -> Iterator[Evaluations]:
    stub = Evaluations([])
    monkeypatch.setattr(jobs, "_encoder_outcomes", stub)
    monkeypatch.setattr(command, "_open", lambda config, jobs: Encoder())
    jobs.read_task_once.cache_clear()
    yield stub
    jobs.read_task_once.cache_clear()


def config(data: Path, **changes: object) -> EvaluateConfig:
    base = EvaluateConfig("model", data.parent / "output", data=data, references=())
    return dataclasses.replace(base, **changes)  # type: ignore[arg-type]


def test_each_kind_of_task_is_evaluated_in_its_way(data: Path, evaluations: Evaluations) -> None:
    assert command.run_evaluation(config(data, frozen=True)) == 0
    assert evaluations.calls == [
        ("sst2", "frozen", 0),
        ("subj", "frozen", 0),
        ("squad", "frozen", 0),
        ("blimp", "zero_shot", 0),
    ]
    keys = read_cells(data.parent / "output")
    assert {(key.task, key.mode, key.variant) for key in keys} == {
        ("sst2", "frozen", "first"), ("sst2", "frozen", "mean"), ("subj", "frozen", "first"),
        ("subj", "frozen", "mean"), ("squad", "frozen", ""), ("blimp", "zero_shot", "original"),
    }  # fmt: skip
    evaluations.calls.clear()
    assert command.run_evaluation(config(data, seeds=2, tasks=("sst2", "blimp"))) == 0
    assert evaluations.calls == [("sst2", "fine_tuned", 1), ("sst2", "fine_tuned", 2)]  # pairs are there already


def test_the_same_command_computes_nothing_and_a_new_seed_only_itself(data: Path, evaluations: Evaluations) -> None:
    two = config(data, tasks=("sst2",), seeds=2)
    command.run_evaluation(two)
    table = (two.output / "results.md").read_text()
    evaluations.calls.clear()
    assert command.run_evaluation(two) == 0
    assert not evaluations.calls and (two.output / "results.md").read_text() == table
    command.run_evaluation(dataclasses.replace(two, seeds=1, first_seed=3))
    assert evaluations.calls == [("sst2", "fine_tuned", 3)]
    assert [json.loads(line)["key"]["seed"] for line in (two.output / "results.jsonl").read_text().splitlines()] == [
        1,
        2,
        3,
    ]


def test_a_failure_is_recorded_the_rest_continues_and_it_is_retried(
    data: Path, evaluations: Evaluations, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluations.failing = "sst2"
    both = config(data, tasks=("sst2", "subj"))
    assert command.run_evaluation(both) == 1
    states = {key.task: (cell.state, cell.reason, cell.score) for key, cell in read_cells(both.output).items()}
    assert states == {"sst2": ("failed", "RuntimeError: no memory", None), "subj": ("ok", "", 1.0)}
    assert "sst2, fine tuned, seed 1: failed: RuntimeError: no memory" in capsys.readouterr().out
    evaluations.failing = ""
    evaluations.calls.clear()
    assert command.run_evaluation(both) == 0
    assert evaluations.calls == [("sst2", "fine_tuned", 1)]


def test_an_interruption_keeps_what_is_finished(
    data: Path, evaluations: Evaluations, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(method: str, encoder: object, read: TaskData, *rest: object) -> dict[str, Outcome]:
        if read.task.name == "subj":
            raise KeyboardInterrupt
        return {"first": Outcome(read.test.labels, {"accuracy": 1.0})}

    both = config(data, tasks=("sst2", "subj"))
    with monkeypatch.context() as patch:
        patch.setattr(jobs, "_encoder_outcomes", stop)
        with pytest.raises(KeyboardInterrupt):
            command.run_evaluation(both)
    assert [key.task for key in read_cells(both.output)] == ["sst2"]
    assert command.run_evaluation(both) == 0 and evaluations.calls == [("subj", "fine_tuned", 1)]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"max_length": 64}, "`max_length` was 128 and is 64, in 1 of 1 cells"),
        ({"fine_tuning": FineTuningConfig(epochs=1)}, "`epochs` was null and is 1"),
        ({"max_train": 5}, "`max_train` was null and is 5"),
    ],
)
def test_results_of_other_settings_are_refused(
    data: Path, evaluations: Evaluations, changes: dict[str, object], sentence: str
) -> None:
    first = config(data, tasks=("sst2",))
    command.run_evaluation(first)
    evaluations.calls.clear()
    for tasks in (("sst2",), ("subj",)):
        with pytest.raises(ConfigError, match="has results of other settings") as error:
            command.run_evaluation(dataclasses.replace(first, tasks=tasks, **changes))  # type: ignore[arg-type]
        assert sentence in str(error.value)
    assert not evaluations.calls


def test_other_weights_and_other_files_are_refused(
    data: Path, evaluations: Evaluations, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = config(data, tasks=("sst2",))
    command.run_evaluation(one)
    write_lines(data / "sst2.jsonl", LINES[1:])
    monkeypatch.setattr(command, "_open", lambda config, jobs: Encoder(weights="2" * 64))
    with pytest.raises(ConfigError) as error:
        command.run_evaluation(one)
    assert ["other files of sst2" in problem for problem in error.value.problems] == [True, False]
    assert "other weights of the same name 'model'" in error.value.problems[1]


def test_two_models_share_a_folder(data: Path, evaluations: Evaluations, monkeypatch: pytest.MonkeyPatch) -> None:
    one = config(data, tasks=("sst2",))
    command.run_evaluation(one)
    monkeypatch.setattr(command, "_open", lambda config, jobs: Encoder("other", "2" * 64))
    command.run_evaluation(one)
    assert [key.model for key in read_cells(one.output)] == ["model", "other"]


def test_faults_of_all_files_come_before_any_computation(data: Path, evaluations: Evaluations) -> None:
    for name in ("sst2", "subj"):
        write_lines(data / f"{name}.jsonl", [*LINES, {"split": "train", "sentence": "x", "label": 7}])
    with pytest.raises(DataError) as error:
        command.run_evaluation(config(data))
    assert len(error.value.problems) == 2 and not evaluations.calls


def test_faults_of_the_model_come_with_those_of_the_files(data: Path) -> None:
    jobs.read_task_once.cache_clear()
    write_lines(data / "subj.jsonl", [*LINES, {"split": "train", "sentence": "x", "label": 7}])
    with pytest.raises(CheckpointError) as error:
        command.run_evaluation(config(data, model=str(data)))
    assert ["no config.json" in problem for problem in error.value.problems] == [True, False]
    assert "subj.jsonl, line" in error.value.problems[1] and not (data.parent / "output").exists()


def test_an_output_that_cannot_be_a_folder_is_named_before_any_computation(
    data: Path, evaluations: Evaluations
) -> None:
    below = config(data, output=data / "sst2.jsonl" / "output")
    assert any("`output` must be a folder" in problem for problem in settings_problems(below))
    (data.parent / "output").mkdir()
    (data.parent / "output" / "cells").touch()
    with pytest.raises(StorageError, match="cells cannot be written: File exists"):
        command.run_evaluation(config(data))
    assert not evaluations.calls


def test_the_results_of_a_study_are_not_overwritten(data: Path, evaluations: Evaluations) -> None:
    asked = config(data, tasks=("sst2",))
    asked.output.mkdir()
    (results := asked.output / "results.jsonl").write_text('{"kind": "cell", "key": {}}\n')
    with pytest.raises(ConfigError, match=r"`output` must be a folder without the results\.jsonl of a study"):
        command.run_evaluation(asked)
    assert json.loads(results.read_text())["kind"] == "cell" and not evaluations.calls
    results.unlink()
    assert command.run_evaluation(asked) == command.run_evaluation(asked) == 0


def test_a_full_disk_is_named_and_the_same_command_continues(
    data: Path, evaluations: Evaluations, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(output: Path, cell: Cell) -> None:
        if cell.key.task == "subj":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write_cell(output, cell)

    both = config(data, tasks=("sst2", "subj"))
    with monkeypatch.context() as patch:
        patch.setattr(command, "write_cell", full)
        with pytest.raises(StorageError, match=r"No space left on device\. Finished work stays in"):
            command.run_evaluation(both)
    evaluations.calls.clear()
    assert command.run_evaluation(both) == 0
    assert evaluations.calls == [("subj", "fine_tuned", 1)]


def test_a_full_disk_before_the_first_result_leaves_nothing(
    data: Path, evaluations: Evaluations, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(output: Path, cell: Cell) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(command, "write_cell", full)
    one = config(data, tasks=("sst2",))
    with pytest.raises(StorageError, match="then run the same command again") as error:
        command.run_evaluation(one)
    assert "Finished work" not in str(error.value) and not one.output.exists()


def test_commands_that_share_a_folder_compute_each_result_once(
    data: Path, evaluations: Evaluations, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second one begins while the first one computes, takes the other task, and waits for the first one."""
    both, compute, codes = config(data, tasks=("sst2", "subj")), command.compute_cells, []
    second = Thread(target=lambda: codes.append(command.run_evaluation(both)))

    def compute_slowly(job: Job, *rest: object) -> list[Cell]:
        if second.ident is None:
            second.start()
            deadline = time.monotonic() + 60
            while "Waiting for the result of sst2" not in capsys.readouterr().err and time.monotonic() < deadline:
                time.sleep(0.01)
        return compute(job, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(shared_jobs, "POLL", 0.05)
    monkeypatch.setattr(command, "compute_cells", compute_slowly)
    assert command.run_evaluation(both) == 0
    second.join()
    assert codes == [0] and sorted(evaluations.calls) == [("sst2", "fine_tuned", 1), ("subj", "fine_tuned", 1)]
    assert not [*both.output.rglob(".*.lock")]


def test_a_job_of_a_process_that_was_killed_is_taken_over(data: Path, evaluations: Evaluations) -> None:
    one = config(data, tasks=("sst2",))
    command.run_evaluation(one)
    (cell,) = (one.output / "cells" / "model").glob("*.json")
    cell.unlink()
    cell.with_name(f".{cell.stem}.lock").write_text(json.dumps({"launch": "gone", "pid": 1, "host": "gone"}))
    evaluations.calls.clear()
    assert command.run_evaluation(one) == 0 and evaluations.calls == [("sst2", "fine_tuned", 1)]


def test_a_named_task_without_files_is_in_the_exit_code(
    data: Path, evaluations: Evaluations, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.run_evaluation(config(data, tasks=("sst2", "rte"))) == DataError.exit_code
    assert "Skipped rte: put glue_rte.jsonl" in capsys.readouterr().err
    assert evaluations.calls == [("sst2", "fine_tuned", 1)]


def test_references_need_no_model_and_are_computed_once(data: Path, evaluations: Evaluations) -> None:
    alone = config(data, model="", tasks=("sst2", "squad"), references=("majority", "bag_of_words"))
    assert command.run_evaluation(alone) == 0
    cells = read_cells(alone.output)
    assert {(key.model, key.task, key.variant) for key in cells} == {
        ("reference", "sst2", "majority"), ("reference", "sst2", "bag_of_words"),
    }  # fmt: skip
    assert all(cell.weights == "" and "--model" not in cell.command for cell in cells.values())


def test_random_weights_are_evaluated_like_the_model(
    data: Path, evaluations: Evaluations, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = pytest.importorskip("megamask.evaluation.encoder")
    monkeypatch.setattr(opened, "with_random_weights", lambda encoder, cache, seed: Encoder(weights=str(seed)))
    both = config(data, tasks=("sst2",), seeds=2, references=("random_weights",))
    command.run_evaluation(both)
    assert evaluations.calls == [("sst2", "fine_tuned", seed) for seed in (1, 2, 1, 2)]
    variants = {(key.mode, key.variant) for key in read_cells(both.output)}
    assert variants == {("fine_tuned", "first"), ("reference", "random_weights_fine_tuned_first")}


def test_the_command_of_a_cell_computes_that_cell(data: Path, evaluations: Evaluations) -> None:
    settings = config(
        data, seeds=2, max_train=10, pooling="mean", max_pairs=3, references=("majority",),
        fine_tuning=FineTuningConfig(learning_rate=1e-4, epochs=1),
    )  # fmt: skip
    command.run_evaluation(settings)
    for key, cell in read_cells(settings.output).items():
        words = shlex.split(cell.command)
        assert words[:2] == ["megamask", "evaluate"]
        again = tyro.cli(EvaluateConfig, args=words[2:])
        assert not settings_problems(again)
        assert jobs.cell_settings(TASKS[key.task], key, again) == jobs.cell_settings(TASKS[key.task], key, settings)
        evaluations.calls.clear()
        command.run_evaluation(dataclasses.replace(again, output=data.parent / "again"))
        assert key in read_cells(data.parent / "again")


def test_the_list_of_tasks_has_their_files(
    data: Path, evaluations: Evaluations, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command.run_evaluation(config(data, list_tasks=True)) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(TASKS)
    assert any(line.startswith("sst2") and line.endswith(str(data / "sst2.jsonl")) for line in lines)
    assert any(line.startswith("rte") and "put glue_rte.jsonl" in line for line in lines)
    assert not (data.parent / "output").exists()


TYPED = FineTuningConfig(epochs=2, learning_rate=1e-4)


@pytest.mark.parametrize(
    ("changes", "sentences"),
    [
        ({"model": ""}, ["`model` must name an encoder"]),
        ({"model": "", "references": ("random_weights",)}, ["must know the encoder"]),
        ({"tasks": ("sts2",)}, ["`sts2` is not known in `tasks`. Did you mean `sst2`?"]),
        ({"tasks": ("sst2", "sst2")}, ["`tasks` names 'sst2' twice"]),
        ({"frozen": True, "seeds": 3, "pooling": "mean"}, ["`seeds` has no effect", "`pooling` has no effect"]),
        ({"frozen": True, "fine_tuning": TYPED}, ["`fine_tuning.learning_rate` has no", "`fine_tuning.epochs` has no"]),
        ({"tasks": ("sst2",), "max_pairs": 3}, ["`max_pairs` has no effect without the task `blimp`"]),
        ({"tasks": ("blimp",), "max_train": 3, "seeds": 2}, ["`max_train` has no", "`seeds` has no"]),
        ({"fine_tuning": FineTuningConfig(1e-4, (1e-4,))}, ["`fine_tuning.learning_rates` has no effect"]),
        ({"workers": 0, "max_length": 0}, ["`max_length` must be at least 8", "`workers` must be at least 1"]),
    ],
)
def test_settings_that_cannot_be_run_are_refused(data: Path, changes: dict[str, object], sentences: list[str]) -> None:
    problems = settings_problems(config(data, **changes))
    assert len(problems) == len(sentences)
    for sentence in sentences:
        assert any(sentence in problem for problem in problems)
