"""Metrics reach the board, the file and the console once each, even if launches are killed."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megamask.metrics import logger as telling
from megamask.metrics.logger import MetricsLogger
from megamask.metrics.meters import Timed, Window
from megamask.metrics.metrics_file import read_metrics
from megamask.storage import atomic_write

WINDOW = Window(
    steps=5, skipped=1, grad_norm=0.5, seconds=2.0, waited=0.1, ranks=2,
    nll=600.0, correct=50.0, targets=100, tokens=400, pairs=40_000,
    distill=30.0, num_teacher_tokens=100, num_scored_tokens=400, entropy=800.0, spread=100.0,
)  # fmt: skip


def events(folder) -> dict[str, list[tuple[int, float]]]:
    board = EventAccumulator(str(folder / "tensorboard"), {"scalars": 0})
    board.Reload()
    return {name: [(e.step, e.value) for e in board.Scalars(name)] for name in board.Tags()["scalars"]}


def test_every_metric_goes_to_file_board_and_console(tmp_path, capsys):
    log = MetricsLogger(tmp_path, 0, 100)
    metrics = log.train(10, WINDOW, 1e-3, extra={"mfu": 0.3, "masking/random_share": 0.15, "distill/weight": 0.5})
    log.validation(10, 2.0, 0.25, 7.0, 0.5)
    log.close()
    valid = {"valid/loss": 2.0, "valid/perplexity": math.exp(2), "valid/accuracy": 0.25, "valid/unigram_loss": 7.0}
    valid |= {"valid/nats_per_byte": 0.5}
    assert read_metrics(log.path) == [{"step": 10, **metrics}, {"step": 10, **valid}]
    board = events(tmp_path)
    assert board.keys() == (metrics | valid).keys()
    for name, value in (metrics | valid).items():
        assert board[name] == [(10, pytest.approx(value, rel=1e-6))]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2 and all(line.startswith("step 10/100  ") for line in lines)
    for word, _ in (
        name_and_format for name, name_and_format in telling._SHOWN.items() if not name.startswith("audit/")
    ):
        assert f"  {word} " in lines[0] + lines[1] or word == "distill (samples)"
    assert lines[0].endswith("ETA 00:36")  # 90 steps at 2 s for 5


def test_the_time_left_does_not_count_the_first_step(tmp_path, capsys):
    compiled = Timed(steps=4, seconds=2.0, waited=0.0, tokens=320, targets=80, pairs=32_000)
    log = MetricsLogger(tmp_path, 0, 100)
    log.train(5, replace(WINDOW, seconds=600.0, without_first=compiled), 1e-3)
    log.train(6, replace(WINDOW, steps=1, without_first=replace(compiled, steps=0, seconds=0.0)), 1e-3)
    log.close()
    first, second = capsys.readouterr().out.splitlines()
    assert "tokens/s 160 " in first and first.endswith("ETA 00:47")  # 95 steps of half a second
    assert "tokens/s" not in second and "ETA" not in second


def test_a_line_can_be_printed_once(tmp_path, capsys):
    log = MetricsLogger(tmp_path, 0, 100)
    for line in ("flat", "flat", "other", "flat"):
        log.say_once(line)
    assert capsys.readouterr().out.splitlines() == ["flat", "other"]


def test_a_resumed_run_has_every_step_once(tmp_path):
    def launch(start: int, end: int) -> None:
        log = MetricsLogger(tmp_path, start, 100)
        for step in range(start + 10, end + 1, 10):
            log.train(step, WINDOW, step + start / 1000)
        log.close()

    launch(0, 30)  # of an earlier try that never saved
    launch(0, 50)
    with (tmp_path / "logs" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 60, "train/lo')  # killed while it wrote
    launch(30, 60)
    rates = [(10, 10.0), (20, 20.0), (30, 30.0), (40, 40.03), (50, 50.03), (60, 60.03)]
    assert [(line["step"], line["lr"]) for line in read_metrics(tmp_path / "logs" / "metrics.jsonl")] == rates
    assert events(tmp_path)["lr"] == [(step, pytest.approx(rate)) for step, rate in rates]


STRANGE = [
    b'{"step": 30, "lr": 1',  # a full disk, or a kill
    b"\x00" * 300,  # what a power cut leaves of a file
    '{"step": 4, "who": "J\u00f6rg"}'.encode("latin-1"),
    '{"step": 5, "lr": 5.0}'.encode("utf-16"),
    b"\xff\xfe\xef\xbb\xbf",
    b"[" * 100_000,
    b'{"step": ' + b"9" * 5000 + b"}",
    b'"a string"',
    b'{"step": "6"}',
    b'{"lr": 7.0}',
    b"\r\r\n",
]


@pytest.mark.parametrize("strange", STRANGE, ids=range(len(STRANGE)))
@pytest.mark.parametrize("whole", [True, False], ids=["in the middle", "last"])
def test_damaged_lines_do_not_affect_the_others(tmp_path, strange: bytes, whole: bool):
    log = MetricsLogger(tmp_path, 0, 100)
    for step in (10, 20):
        log.train(step, WINDOW, float(step))
    log.close()
    before = read_metrics(log.path)
    one, other = log.path.read_bytes().splitlines(keepends=True)
    log.path.write_bytes(one + strange + b"\n" + other if whole else one + other + strange)
    log = MetricsLogger(tmp_path, 20, 100)
    log.train(30, WINDOW, 30.0)
    log.close()
    after = read_metrics(log.path)
    assert [line for line in after if line["step"] in (10, 20)] == before
    assert after[-1]["step"] == 30 and [line["lr"] for line in after if "lr" in line][-1] == 30.0
    assert len(after) <= 4
    assert all(json.loads(line) for line in log.path.read_text("ascii").splitlines())  # and now all lines are lines


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.ESTALE])
def test_a_storage_failure_at_a_resume_stops_nothing(tmp_path, monkeypatch, capsys, number):
    log = MetricsLogger(tmp_path, 0, 100)
    for step in (10, 20, 30):
        log.train(step, WINDOW, float(step))
    log.close()

    def fails(*_):
        raise OSError(number, os.strerror(number))

    # neither the file of metrics nor anything else can be made: the launch goes on from step 10 all the same
    with monkeypatch.context() as patch:
        patch.setattr(atomic_write, "write_file", fails)
        log = MetricsLogger(tmp_path, 10, 100)
        assert f"{log.path} cannot be written: {os.strerror(number)}" in capsys.readouterr().out
        log.train(20, WINDOW, 20.5)
        assert f"metrics of step 20 could not be written: {os.strerror(number)}" in capsys.readouterr().out
        assert [line["lr"] for line in read_metrics(log.path)] == [10, 20, 30]
    log.train(30, WINDOW, 30.5)
    log.close()
    assert [line["lr"] for line in read_metrics(log.path)] == [10, 30.5]
    assert "could not be written" not in capsys.readouterr().out


def test_a_half_written_line_is_dropped(tmp_path, capsys):
    class Full(io.StringIO):
        def write(self, text: str) -> int:
            with log.path.open("a") as file:
                file.write(text[: len(text) // 2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    log = MetricsLogger(tmp_path, 0, 100)
    log.train(10, WINDOW, 10.0)
    log._lines.close()
    log._lines = Full()
    log.train(20, WINDOW, 20.0)
    assert "The metrics of step 20 could not be written: No space left on device." in capsys.readouterr().out
    log.train(30, WINDOW, 30.0)
    log.validation(30, 1.0, 1.0, 1.0)
    log.close()
    assert [line.get("lr") for line in read_metrics(log.path)] == [10, 30, None]
    assert len(log.path.read_text().splitlines()) == 3
    # the board has them all: each of the two can fail alone
    assert [step for step, _ in events(tmp_path)["lr"]] == [10, 20, 30]


def test_nan_is_written_as_valid_json(tmp_path):
    log = MetricsLogger(tmp_path, 0, 10)
    log.validation(1, 1e4, 0.0, math.nan)
    log.close()
    (line,) = read_metrics(log.path)
    assert line["valid/perplexity"] is None and line["valid/unigram_loss"] is None
    json.dumps(line, allow_nan=False)


def test_other_ranks_write_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    log = MetricsLogger(tmp_path, 0, 10)
    assert log.train(1, WINDOW, 1.0)["train/loss"] == 6.0
    log.validation(1, 1.0, 1.0, 1.0)
    log.advance(1), log.say("x"), log.close()
    assert capsys.readouterr().out == "" and list(tmp_path.iterdir()) == []


def test_a_terminal_gets_a_bar_and_the_lines(tmp_path, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    console = Terminal()
    monkeypatch.setattr("sys.stdout", console)
    log = MetricsLogger(tmp_path, 20, 100)
    log.train(60, WINDOW, 1.0)
    log.close()
    assert "60/100" in console.getvalue() and "loss 6.000, 200 tokens/s" in console.getvalue()
    assert "step 60/100  loss 6.0000" in console.getvalue()


# ---- Weights & Biases


class FakeWandb(ModuleType):
    """Stands in for wandb: runs by id, which take metrics of a step only once, as wandb does."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.__spec__ = ModuleSpec("wandb", None)
        self.runs: dict[str, dict[int, dict[str, float]]] = {}
        self.asked: list[dict[str, object]] = []
        self.finished = 0
        self.fails = ""

    def init(self, **arguments: object) -> FakeWandb:
        self.asked.append(arguments)
        self._check("init")
        self._run = self.runs.setdefault(arguments["id"], {})
        self._newest = max(self._run, default=-1)
        return self

    def Settings(self, **given: object) -> dict[str, object]:
        return given

    url, offline = "https://wandb/p", False

    def log(self, metrics: dict[str, float], step: int) -> None:
        self._check("log")
        if step > self._newest:
            self._run.setdefault(step, {}).update(metrics)

    def finish(self) -> None:
        self._check("finish")
        self.finished += 1

    def _check(self, call: str) -> None:
        if call == self.fails:
            raise ConnectionError("no route\nto the host")


@pytest.fixture
def wandb(monkeypatch) -> FakeWandb:
    monkeypatch.setitem(sys.modules, "wandb", fake := FakeWandb())
    return fake


def metrics_by_step(folder) -> dict[int, dict[str, float]]:
    by_step: dict[int, dict[str, float]] = {}
    for line in read_metrics(folder / "logs" / "metrics.jsonl"):
        by_step.setdefault(line.pop("step"), {}).update(line)
    return by_step


def test_wandb_gets_the_metrics_and_a_resumed_run_continues(tmp_path, wandb):
    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):  # killed before step 3 was saved
        log = MetricsLogger(tmp_path, start, 4, wandb_project="p", settings={"seed": 7})
        for step in steps:
            log.train(step, WINDOW, 1e-3)
            log.validation(step, 2.0, 0.25, 7.0)
        log.close()
    [(run, metrics)] = wandb.runs.items()
    assert metrics == metrics_by_step(tmp_path)
    assert wandb.finished == 2
    for arguments in wandb.asked:
        assert (arguments["project"], arguments["id"], arguments["name"]) == ("p", run, tmp_path.name)
        assert (arguments["resume"], arguments["config"]) == ("allow", {"seed": 7})


def test_a_run_that_starts_again_is_a_new_one_in_wandb(tmp_path, wandb):
    for _ in range(2):
        log = MetricsLogger(tmp_path, 0, 4, wandb_project="p")
        log.train(1, WINDOW, 1e-3)
        log.close()
    assert len(wandb.runs) == 2


def test_without_a_project_wandb_is_not_used(tmp_path, wandb):
    log = MetricsLogger(tmp_path, 0, 4)
    log.train(1, WINDOW, 1e-3)
    log.close()
    assert not wandb.asked


@pytest.mark.parametrize("call", ["init", "log", "finish"])
def test_an_error_of_wandb_stops_nothing(call, tmp_path, wandb, capsys):
    wandb.fails = call
    log = MetricsLogger(tmp_path, 0, 4, wandb_project="p")
    for step in (1, 2):
        log.train(step, WINDOW, 1e-3)
    log.close()
    assert metrics_by_step(tmp_path).keys() == {1, 2}
    out = capsys.readouterr().out
    assert out.count("No more metrics are sent to Weights & Biases: no route. Training continues.") == 1
