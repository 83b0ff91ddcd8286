"""The command `megamask`: its subcommands, and the function that each one calls.

`megamask NAME`, `python -m megamask NAME` and the scripts in tools/ are the same commands. Only the standard library is
imported before the subcommand is known, so `megamask --help` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from megamask.errors import ConfigError, LaunchError, raise_all, unknown
from megamask.runtime import entry_point, launch_environment


@dataclass(frozen=True)
class Subcommand:
    """What it does, and the names of what does it, as ``module:name`` inside megamask."""

    summary: str
    function: str
    """Takes the settings and returns the exit code, or None for 0."""
    settings: str = ""
    """The dataclass of the flags, or a function that reads the arguments. Imported for --help, so it must not import
    torch. Without it, ``function`` takes the arguments."""
    exits_at_once: bool = False
    """Whether the process ends without waiting for threads of libraries (`entry_point.end_process`)."""


SUBCOMMANDS = {
    "prepare": Subcommand(
        "Turn text into a tokenizer and token shards.", "data.report:prepare_and_report", "data.settings:PrepareConfig"
    ),
    "doctor": Subcommand(
        "Predict the memory, time and disk of a run, and report everything that is wrong.",
        "doctor.report:run_doctor", "doctor.settings:parse_doctor_command",
    ),
    "pretrain": Subcommand("Train a model, or resume a run that was stopped.", "pretrain:main"),
    "export": Subcommand(
        "Write a checkpoint as a model for transformers.",
        "training.convert:export_run", "training.settings:ExportConfig",
    ),
    "import": Subcommand(
        "Turn a checkpoint of transformers into initial weights.",
        "training.convert:import_weights", "training.settings:ImportConfig",
    ),
    "annotate entropy": Subcommand(
        "Store a teacher's entropy of every token beside the shards.",
        "annotate:annotate_entropy", "teacher.annotation_settings:EntropyAnnotation",
    ),
    "annotate targets": Subcommand(
        "Store samples of a teacher's predictions at the targets of a run.",
        "annotate:annotate_targets", "config.cli:parse_target_annotation",
    ),
    "show-masks": Subcommand(
        "Show sentences under every masking strategy, with entropies.",
        "analysis.show_masks:show_masks", "analysis.settings:ShowMasksConfig",
    ),
    "analyze-rank": Subcommand(
        "Compare the rank of the hidden states of [MASK] and of real tokens.",
        "analysis.rank_analysis:analyze_rank", "analysis.settings:RankConfig",
    ),
    "inspect": Subcommand(
        "Report what a run folder contains and what a resume would do.",
        "checkpoint.inspect:print_report", "checkpoint.settings:InspectConfig",
    ),
    "replay": Subcommand(
        "Repeat a step of a run and compare it with the log.",
        "replay:replay_run", "checkpoint.settings:ReplayConfig", exits_at_once=True,
    ),
    "evaluate": Subcommand(
        "Evaluate an encoder: GLUE and other tasks, SQuAD, BLiMP.",
        "evaluation.evaluate:run_evaluation", "evaluation.settings:EvaluateConfig", exits_at_once=True,
    ),
    "bench": Subcommand(
        "Measure tokens per second beside the Hugging Face Trainer.",
        "bench.benchmark:bench", "bench.settings:BenchConfig", exits_at_once=True,
    ),
    "bench-gpu": Subcommand(
        "Measure everything that needs a GPU, in an hour or less.",
        "bench.gpu.run_parts:bench_gpu", "bench.gpu.settings:GpuBenchConfig", exits_at_once=True,
    ),
    "study": Subcommand(
        "Train and evaluate every arm of a plan with every seed, and report the differences.",
        "study.study:run_study", "study.settings:StudyConfig",
    ),
}  # fmt: skip
"""By what the user types; in the order of use."""
PRINTS_ONLY = {"-h", "--help", "--list-recipes"}
"""Flags of `megamask pretrain` that need no torch."""
FIRST_RUN = ["--deepspeed", "zero2", "--time-budget", "4m"]
"""Flags of `megamask pretrain` without flags, as in the Makefile."""


@entry_point.command
def main(arguments: Sequence[str]) -> int:
    """Run a subcommand with its flags; returns the exit code."""
    name, rest = find_subcommand(arguments)
    if name is None:
        return _print_subcommands(rest)
    command = SUBCOMMANDS[name]
    settings = _read_settings(command, rest) if command.settings else rest
    return _load(command.function)(settings) or 0


def find_subcommand(arguments: Sequence[str]) -> tuple[str | None, list[str]]:
    """The subcommand that ``arguments`` begin with, else None, and the arguments after it.

    `help NAME` and `--help NAME` are `NAME --help`.
    """
    if arguments and arguments[0] in ("help", "-h", "--help"):
        arguments = [*arguments[1:], "--help"]
    for name in SUBCOMMANDS:
        words = name.split()
        if list(arguments[: len(words)]) == words:
            return name, list(arguments[len(words) :])
    return None, list(arguments)


def _read_settings(command: Subcommand, arguments: list[str]) -> Any:
    import tyro  # `megamask --help` needs none of these

    from megamask.errors.setting_help import has_positional, with_help
    from megamask.errors.setting_rules import settings_problems

    kind = _load(command.settings)
    if not is_dataclass(kind):
        return kind(arguments)
    if arguments and not arguments[0].startswith("-") and not has_positional(kind):
        command_name, flag = Path(sys.argv[0]).name, fields(kind)[0].name
        raise ConfigError(
            f"{arguments[0]!r} has no flag before it. Write `--{flag}` before the value of `{flag}`; "
            f"`{command_name} --help` lists all flags."
        )
    settings = tyro.cli(with_help(kind), args=arguments, prog=Path(sys.argv[0]).name)
    raise_all(ConfigError, settings_problems(settings))
    return settings


def _load(name: str) -> Any:
    """The object ``module:name`` of megamask."""
    module, _, attribute = name.partition(":")
    return getattr(import_module(f"megamask.{module}"), attribute)


def _print_subcommands(arguments: list[str]) -> int:
    """Print the subcommands, or those that begin with ``arguments``; ConfigError for one that is not known."""
    words = [word for word in arguments if word not in ("-h", "--help")]
    if words == ["--version"]:
        print(import_module("megamask").__version__)
        return 0
    shown = {name: command.summary for name, command in SUBCOMMANDS.items() if not words or name.split()[:-1] == words}
    if not shown:
        raise ConfigError(unknown(" ".join(words[: 1 + (words[0] == "annotate")]), SUBCOMMANDS))
    print("usage: megamask COMMAND [flags]\n       megamask COMMAND --help\n")
    print("\n".join(f"  {name:{max(map(len, shown))}}  {summary}" for name, summary in shown.items()))
    return 0


def run_subcommand(subcommand: str = "") -> NoReturn:
    """Run the command line of this process and end it; a script that stands for a ``subcommand`` names it."""
    # the deepspeed launcher adds a flag; ranks come from the environment
    arguments = [word for word in sys.argv[1:] if not word.startswith(("--local_rank=", "--local-rank="))]
    name, rest = (subcommand, arguments) if subcommand else find_subcommand(arguments)
    if name and not subcommand:
        sys.argv = [f"megamask {name}", *rest]  # what usage lines and the record of a launch show
    if name == "pretrain":
        _pretrain(rest)
    entry_point.begin()
    action = partial(main, [*subcommand.split(), *arguments])
    if name and SUBCOMMANDS[name].exits_at_once:
        entry_point.run(action, entry_point.end_process)
    entry_point.run(action)


def _pretrain(arguments: list[str]) -> NoReturn:
    """Run `megamask pretrain`. A signal asks it to save and stop, so it is handled before torch is imported."""
    entry_point.begin(stop_on_signals=False)
    try:
        launch_environment.launch_variables()
    except LaunchError as error:
        entry_point.print_error(error)
        sys.exit(error.exit_code)
    if not arguments:
        arguments = FIRST_RUN
        sys.argv += arguments  # for the record of the launch
        if launch_environment.is_main():
            print(f"No flags: this is the first run, `megamask pretrain {' '.join(arguments)}`.", file=sys.stderr)
    stop = _load("health.stop_signals:StopRequest")()
    stop.__enter__()
    stop.loading = launch_environment.world() == 1
    # when another rank is gone, the watchdog says which and why; the messages of sockets do not help
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    if PRINTS_ONLY.intersection(arguments):
        entry_point.run(partial(_load("config.cli:show"), arguments))
    entry_point.run(lambda: _load(SUBCOMMANDS["pretrain"].function)(arguments, stop), _end_rank)


def _end_rank(code: int) -> NoReturn:
    ranks = sys.modules.get("megamask.runtime.ranks")  # absent if torch could not be imported
    (ranks.exit_process if ranks else entry_point.end_process)(code)
    raise AssertionError("the process has ended")


if __name__ == "__main__":
    run_subcommand()
