"""The command line of pretrain.py: a recipe, then a file of overrides, then flags; later ones win."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from megamask.config import ineffective_settings, recipes, removed
from megamask.config.checks import find_problems, late_settings
from megamask.config.flags import corrected_flags, flags_in
from megamask.config.overrides import override_settings, read_settings
from megamask.config.phase_flags import phase_flag_problems
from megamask.config.pretrain_config import PretrainConfig, as_dict, resolve_phases
from megamask.config.sizes_of_init import decided_by_init
from megamask.config.sources import has_shares
from megamask.errors import ConfigError, must, raise_all
from megamask.errors.setting_help import with_help
from megamask.errors.setting_rules import CountOrZero, settings_problems
from megamask.runtime import entry_point, launch_environment
from megamask.storage.dotted import flatten
from megamask.storage.old_setting_names import renamed_problems
from megamask.teacher.annotation_settings import SampleAnnotation


@dataclass(frozen=True)
class RunFlags:
    """The flags of every command that takes the configuration of a run."""

    recipe: str = "tiny"
    """Experiment to start from; `megamask pretrain --list-recipes` lists them."""
    config: Path | None = None
    """TOML or JSON file with settings that override those of the recipe, such as the config.json of a run. The file
    may name the recipe too."""
    notes: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()
    """A line for each setting that was left out or has an old name."""
    run: Annotated[PretrainConfig, tyro.conf.arg(name="")] = field(default_factory=PretrainConfig)

    @property
    def num_ranks(self) -> int:
        """The number of processes of the run."""
        return launch_environment.world()

    def problems(self) -> list[str]:
        """Sentences for what is wrong with flags outside of the configuration."""
        return []


@dataclass(frozen=True)
class Command(RunFlags):
    """Pretrain a masked-language-model encoder. Without arguments: the tiny model, on text found on this machine."""

    deepspeed: Path | None = None
    """DeepSpeed file, or the name of one in ds_configs/, such as zero2. Without one: plain data parallel in fp32."""
    resume: str = "auto"
    """auto: resume the run in OUTPUT, or start it; must: only resume; never: only start; or the path of a
    checkpoint."""
    change: tuple[str, ...] = ()
    """Names of settings that may differ from the run that is resumed, such as steps optimizer.lr.peak."""
    profile: CountOrZero = 0
    """Number of steps to trace with torch.profiler, after 5 steps of warm-up. The trace is in OUTPUT/logs. 0: none."""
    list_recipes: bool = False
    """Print the recipes, one per line, then exit."""
    print_config: bool = False
    """Check the whole resolved configuration and print it, then exit."""

    def problems(self) -> list[str]:
        """Sentences for what is wrong with flags outside of the configuration."""
        return [must("profile", "be 0 or more", self.profile)] if self.profile < 0 else []


@dataclass(frozen=True)
class TargetAnnotation(RunFlags):
    """Store samples of a teacher's predictions at the targets of a run: `megamask annotate targets --data DIR
    --teacher.path PATH --distill.stored DIR --distill.weight.start 0.5 [other flags of the run]`.

    The flags of the configuration are those of `megamask pretrain`, so that the masks are those of the run. Then start
    the run with the same flags, without --teacher.path.
    """

    samples: Annotated[SampleAnnotation, tyro.conf.arg(name="")] = field(default_factory=SampleAnnotation)

    def problems(self) -> list[str]:
        """Sentences for what is wrong with flags outside of the configuration."""
        return settings_problems(self.samples)


Flags = TypeVar("Flags", bound=RunFlags)


def parse_command(arguments: list[str] | None = None) -> Command:
    """The command `megamask pretrain`; ConfigError with all problems of flags, recipe and file."""
    return parse_flags(Command, sys.argv[1:] if arguments is None else arguments)


def parse_target_annotation(arguments: list[str]) -> TargetAnnotation:
    """The command `megamask annotate targets`; ConfigError with all problems of flags, recipe and file."""
    return parse_flags(TargetAnnotation, arguments)


def parse_flags(kind: type[Flags], arguments: list[str]) -> Flags:
    """A command with the configuration of a run; ConfigError with all problems of flags, recipe and file."""
    known = _first_flags(arguments)
    problems = [*renamed_problems(flags_in(arguments)), *removed.removed_values(vars(known)).values()]
    problems += phase_flag_problems(arguments)
    of_flags = len(problems)
    settings: dict[str, Any] = {}
    base, recipe = PretrainConfig(), known.recipe or kind.recipe
    with _collect(problems):
        settings = read_settings(known.config) if known.config else {}
        recipe = known.recipe or str(settings.get("recipe", recipe))
    with _collect(problems):
        base = recipes.find_recipe(recipe)
    settings.pop("recipe", None)
    with _collect(problems):
        base = override_settings(base, settings, str(known.config))
    whole = len(problems) == of_flags
    command = _read_flags(kind, corrected_flags(arguments), kind(recipe, run=base), problems)
    typed = ineffective_settings.typed(command.run, corrected_flags(arguments), settings)
    run, notes = ineffective_settings.leave_out(command.run, typed, recipe)
    for name, sentence in late_settings(run).items():
        (problems if name in typed else notes).append(sentence)
    problems += [sentence for name, sentence in decided_by_init(run).items() if name in typed]
    if has_shares(command.run.data) and "mixture.shares" in flags_in(arguments):
        problems.append("`data` has shares, and so has `mixture.shares`. Remove one of them.")
    problems += command.problems()
    if problems and whole:  # report the other problems too; without the settings of the file, they may not be real
        deepspeed = command.deepspeed if isinstance(command, Command) else None
        problems += find_problems(run, deepspeed, command.num_ranks)[1]
    raise_all(ConfigError, problems)
    renamed = [] if ineffective_settings.is_record(settings) else renamed_problems(flatten(settings))
    notes = [f"{known.config}: {line}" for line in renamed] + notes
    return replace(command, run=resolve_phases(run), notes=tuple(notes))


def _first_flags(arguments: list[str]) -> argparse.Namespace:
    """The flags that name the recipe and the file that other flags override, and flags that may have removed values."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe", nargs="?")
    first.add_argument("--config", nargs="?", type=Path)
    for name in removed.SETTINGS:
        first.add_argument(f"--{name}", f"--{name.replace('_', '-')}", dest=name, nargs="*")
    return first.parse_known_args(arguments)[0]


@contextmanager
def _collect(problems: list[str]) -> Iterator[None]:
    """Add the sentences of a ConfigError to ``problems``."""
    try:
        yield
    except ConfigError as error:
        problems += error.problems


def _read_flags(kind: type[Flags], arguments: list[str], default: Flags, problems: list[str]) -> Flags:
    """The flags as tyro reads them. It ends the process after --help or an error, here with all ``problems``."""
    prints, prog = launch_environment.is_main(), Path(sys.argv[0]).name
    try:
        return tyro.cli(with_help(kind), args=arguments, default=default, prog=prog, console_outputs=prints)
    except SystemExit as end:
        if end.code:
            raise_all(ConfigError, problems)
        raise


def show_recipes() -> str:
    """The recipes, a line each."""
    listed = recipes.list_recipes()
    width = max(len(name) for name in listed)
    return "\n".join(f"{name:{width}}  {description}" for name, description in listed.items())


def show_config(config: PretrainConfig) -> str:
    """The configuration as JSON that --config takes."""
    return json.dumps(as_dict(config), indent=2)


@entry_point.command
def show(arguments: list[str] | None = None) -> int:
    """Print the help or the recipes, without torch."""
    parse_command(arguments)  # ends here for --help
    print(show_recipes())
    return 0
