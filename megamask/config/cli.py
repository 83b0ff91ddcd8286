"""The command line of pretrain.py: a recipe, then a file of overrides, then flags; later ones win."""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated

import tyro

from megamask.config import ineffective_settings, recipes, removed
from megamask.config import pretrain_config as configuration
from megamask.config.pretrain_config import PretrainConfig
from megamask.errors import ConfigError, must, raise_all
from megamask.errors.setting_rules import with_rules
from megamask.runtime import entry_point, launch_environment
from megamask.storage.dotted import flatten
from megamask.storage.old_setting_names import renamed_problems, with_new_names
from megamask.teacher.annotation_settings import SampleAnnotation


@dataclass(frozen=True)
class Command:
    """Pretrain a masked-language-model encoder. Without any argument: the tiny model, on text this machine holds."""

    recipe: str = "tiny"
    """Experiment to start from; --list-recipes shows them."""
    config: Path | None = None
    """TOML or JSON file of settings that differ from the recipe, which it may name too; a run's own config.json is
    one."""
    deepspeed: Path | None = None
    """DeepSpeed file, or the name of one in ds_configs/, such as zero2; without one: plain data parallel in fp32."""
    resume: str = "auto"
    """auto: resume the run in OUTPUT, or start; must: only resume; never: only start; or a checkpoint's path."""
    change: tuple[str, ...] = ()
    """Settings that this launch may change in a resumed run, such as steps optimizer.lr.peak; others may not."""
    profile: int = 0
    """Trace this many steps with torch.profiler, after 5 steps of warm-up; the file goes to OUTPUT/logs. 0: none."""
    list_recipes: bool = False
    """Print the recipes, a line each, and end."""
    print_config: bool = False
    """Check the whole resolved configuration, print it, and end."""
    notes: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()
    """A line for each setting that was left out or has an old name."""
    run: Annotated[PretrainConfig, tyro.conf.arg(name="")] = field(default_factory=PretrainConfig)


def parse_command(arguments: list[str] | None = None) -> Command:
    """The command, checked for unknown flags and values; ConfigError for an unknown recipe or a bad file."""
    arguments = sys.argv[1:] if arguments is None else arguments
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--recipe")
    first.add_argument("--config", type=Path)
    for name in removed.SETTINGS:
        first.add_argument(f"--{name}", f"--{name.replace('_', '-')}", dest=name, nargs="*")
    known, _ = first.parse_known_args(arguments)
    problems = renamed_problems(ineffective_settings.flags_in(arguments)) + removed.removed_values(vars(known))
    raise_all(ConfigError, problems)
    written = configuration.read_settings(known.config) if known.config else {}
    renamed = [] if ineffective_settings.is_record(written) else renamed_problems(flatten(written))
    settings = with_new_names(written)
    named = settings.pop("recipe", Command.recipe)
    recipe = known.recipe or str(named)
    base = configuration.override_settings(recipes.find_recipe(recipe), settings, str(known.config))
    default = Command(recipe, run=base)
    prints, prog = launch_environment.is_main(), Path(sys.argv[0]).name
    command = tyro.cli(with_rules(Command), args=arguments, default=default, prog=prog, console_outputs=prints)
    if command.profile < 0:
        raise ConfigError(must("profile", "be 0 or more", command.profile))
    typed = ineffective_settings.typed(command.run, arguments, settings)
    run, notes = ineffective_settings.leave_out(command.run, typed, recipe)
    late = {
        "entropy.audit.every": configuration.late_audit(run),
        "masking.token_type.every": configuration.late_update(run),
    }
    raise_all(ConfigError, [sentence for name, sentence in late.items() if sentence and name in typed])
    notes += filter(None, late.values())
    notes = [f"{known.config}: {line}" for line in renamed] + notes
    return replace(command, run=configuration.resolve_phases(run), notes=tuple(notes))


@dataclass(frozen=True)
class TargetAnnotation:
    """Store samples of a teacher's predictions at the targets of a run: `megamask annotate targets --data DIR
    --teacher.path PATH --distill.stored DIR --distill.weight.start 0.5 [other flags of the run]`.

    Takes the flags of `megamask pretrain`, so that the masks are those of the run, and the flags below. Then start the
    run with the same flags, without --teacher.path.
    """

    run: PretrainConfig
    samples: SampleAnnotation


def parse_target_annotation(arguments: list[str]) -> TargetAnnotation:
    """The settings of `megamask annotate targets`."""
    parser = argparse.ArgumentParser(
        Path(sys.argv[0]).name, description=inspect.getdoc(TargetAnnotation), allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--draws", type=int, help="tokens drawn at each target; 32 if not given")
    parser.add_argument("--packs", type=int, help="packs, from number 0; all packs of the run if not given")
    parser.add_argument("--workers", type=int, help="processes; one for each GPU or core if not given")
    own, rest = parser.parse_known_args(arguments)
    samples = {name: value for name, value in vars(own).items() if value is not None}
    return TargetAnnotation(parse_command(rest).run, SampleAnnotation(**samples))


def show_recipes() -> str:
    """The recipes, a line each."""
    listed = recipes.list_recipes()
    width = max(len(name) for name in listed)
    return "\n".join(f"{name:{width}}  {said}" for name, said in listed.items())


def show_config(config: PretrainConfig) -> str:
    """The configuration as JSON that --config takes."""
    return json.dumps(configuration.as_dict(config), indent=2)


@entry_point.command
def show(arguments: list[str] | None = None) -> int:
    """Print the help or the recipes, without torch."""
    parse_command(arguments)  # ends here for --help
    print(show_recipes())
    return 0
