"""Long work says its rate and the time left, on a terminal or not, and never fails because of that."""

from __future__ import annotations

import contextlib
import io
import itertools
import threading
import time

import pytest

from megamask.runtime import progress_bar
from megamask.runtime.progress_bar import FIRST, LONGEST, ProgressBar, elapsed


class Clock:
    seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


def watched(seconds: int, total: int | None = 1000, done: int = 0, rate: int = 2) -> list[tuple[float, str]]:
    """The lines of work at ``rate`` units a second, each with the second at which it came."""
    clock, stream, lines = Clock(), io.StringIO(), []
    with contextlib.redirect_stderr(stream):
        bar = ProgressBar("entropies", total, "token", done=done, now=clock)
    for second in range(1, seconds + 1):
        clock.seconds = float(second)
        before = len(stream.getvalue())
        bar.update(rate)
        if new := stream.getvalue()[before:]:
            lines.append((clock.seconds, new))
    return lines


def test_the_first_line_comes_early_and_the_intervals_grow_to_a_limit():
    times = [second for second, _ in watched(3000, total=10**6)]
    gaps = [later - earlier for earlier, later in itertools.pairwise(times)]
    assert times[0] == FIRST
    assert gaps == sorted(gaps) and gaps[0] == 2 * FIRST and gaps[-1] == LONGEST


def test_a_line_has_count_rate_and_time_left():
    (_, line), *_ = watched(10)
    assert line == "entropies: 20 of 1,000 tokens (2%), 2 tokens/s, ETA 08:10\n"


def test_units_of_an_earlier_run_do_not_count_for_the_rate():
    (_, line), *_ = watched(10, done=900)
    assert "920 of 1,000" in line and "2 tokens/s, ETA 00:40" in line


def test_an_unknown_total_has_no_time_left():
    (_, line), *_ = watched(10, total=None)
    assert line == "entropies: 20 tokens, 2 tokens/s\n"


def test_work_without_a_finished_unit_prints_lines():
    (_, line), *_ = watched(10, rate=0)
    assert line == "entropies: 0 of 1,000 tokens (0%), 00:10 so far\n"


def test_items_are_counted_when_they_are_finished():
    with ProgressBar("ranks", 3, "layer") as bar:
        assert [(item, bar.done) for item in bar.over("abc")] == [("a", 0), ("b", 1), ("c", 2)]
        assert bar.done == 3


@pytest.mark.parametrize(("seconds", "lines"), [(FIRST - 1, 0), (FIRST + 1, 1)])
def test_only_long_work_prints_its_duration(seconds, lines):
    clock, stream = Clock(), io.StringIO()
    with contextlib.redirect_stderr(stream), ProgressBar("export", 3, now=clock) as bar:
        clock.seconds = seconds
        bar.done = 3
    assert stream.getvalue().count("\n") == lines


def test_a_terminal_has_a_bar():
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    with contextlib.redirect_stderr(stream), ProgressBar("entropies", 4, "token") as bar:
        bar.update(2)
        bar.move_to(4)
    assert "\r" in stream.getvalue() and "4/4" in stream.getvalue()


def test_a_closed_stream_does_not_end_the_work():
    clock, stream = Clock(), io.StringIO()
    stream.close()
    with contextlib.redirect_stderr(stream), ProgressBar("entropies", 4, now=clock) as bar:
        clock.seconds = FIRST
        bar.update()
        assert bar.done == 1


def test_work_without_units_prints_the_elapsed_time(monkeypatch):
    monkeypatch.setattr(progress_bar, "FIRST", 0.01)
    stream = io.StringIO()
    with contextlib.redirect_stderr(stream), elapsed("training the tokenizer"):
        while "so far" not in stream.getvalue():
            time.sleep(0.005)
    assert stream.getvalue().startswith("training the tokenizer: 00:00 so far\n")
    assert not [thread for thread in threading.enumerate() if thread.name == "elapsed"]
