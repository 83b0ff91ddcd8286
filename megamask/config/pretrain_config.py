"""The configuration of a whole run, and the checks between its sections.

Each section is a frozen dataclass in the `settings.py` of the package that uses it. This module composes them, reads
overrides from files, and finds every problem before any device is used. It builds nothing.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any

from annotated_types import Ge, Lt
from pydantic import TypeAdapter, ValidationError

from megamask.basic_types import TokenIds
from megamask.config import time_budget
from megamask.config.removed import removed_values
from megamask.config.settings import CheckpointConfig, LogConfig, MixtureConfig, PacksConfig, ValidationConfig
from megamask.config.sources import data_problems, has_shares, split_shares
from megamask.engine import ds_file
from megamask.engine.settings import OptimizerConfig
from megamask.entropy.settings import EntropyConfig
from megamask.errors import ConfigError, Removable, must, raise_all, unknown
from megamask.errors.setting_rules import Count, OnlyFor, field_problem, setting_of, settings_problems
from megamask.health.settings import SpikesConfig, WatchdogConfig
from megamask.masking.settings import STEPS, MaskingConfig
from megamask.model.shape import ModelConfig
from megamask.objectives.settings import ObjectiveConfig
from megamask.storage import strict_json
from megamask.storage.dotted import flatten, is_under, merged, names_in
from megamask.storage.old_setting_names import new_name, renamed_problems, with_new_names
from megamask.storage.strict_toml import read_toml
from megamask.teacher import settings as teachers
from megamask.teacher.settings import DistillConfig, TeacherConfig

MAY_DIFFER_ON_RESUME = frozenset(
    {"data", "verify", "output", "init", "log", "watchdog", "checkpoint", "validation", "export", "recipe", "deepspeed"}
    | {"spikes", "teacher.path", "teacher.deepspeed", "teacher.packs_per_pass", "teacher.precision"}
)
"""Settings that may change on resume. None of them affects training, except that DeepSpeed files change rounding, and
that a run may continue with another spike policy. Data and teacher are identified by hash instead of path."""
CHANGEABLE = frozenset(
    {"steps", "time_budget", "mixture", "masking.ratio", "masking.random_share"}
    | {"distill.weight", "distill.temperature"}
    | {
        f"optimizer.{part}"
        for part in ("lr", "muon_lr_scale", "beta1", "beta2", "eps", "weight_decay", "max_grad_norm")
    }
)
"""Settings that `--change` may change on resume: how far a step goes, and how often each source of a mixture is read,
but not the sources or the shape of the weights."""
RECORDED = frozenset({"deepspeed", "text"})
"""What config.json of a run records beside its settings: the content of its DeepSpeed file, the hash of its text."""


@dataclass(frozen=True)
class PretrainConfig:
    """A whole pretraining run."""

    data: Path | tuple[Path, ...] | None = None
    """Folder of token shards (`megamask prepare` makes it); without it, English text found on this machine. Several
    folders with one tokenizer are a mixture, each with its share, such as shards/wiki=0.7 shards/books=0.3, or without,
    by size (`mixture.alpha`)."""
    verify: bool = True
    """Verify the sha256 of every shard before the run starts; reads each of them once."""
    output: Path = Path("runs/tiny")
    """Folder of the run: configuration, logs, checkpoints, exported model."""
    steps: Count = 400
    """Optimizer steps of the whole run; with `time_budget`, most steps."""
    time_budget: str | None = None
    """Time to train for, such as 90m or 24h (s, m, h, d): every schedule runs on the time used, or on the steps done if
    they are further, and the run ends with them. Over restarts too; time in a queue does not count. A clock then
    decides, so the run cannot be repeated bit for bit."""
    seed: Annotated[int, Ge(0), Lt(2**63)] = 1
    """Seeds the initial weights, the order of the text, the masks and dropout."""
    init: Path | None = None
    """Folder of initial weights (`megamask import` makes it) or of a run, whose newest checkpoint they are; they
    then say the encoder's preset and size. Without it they are random."""
    init_layers: Annotated[tuple[int, ...] | None, OnlyFor("init")] = None
    """Layers of `init`, counted from 0, of which the initial weights are made, such as 0 2 4 6 8 10 for half of a
    teacher's (as DistilBERT does); None: all."""
    export: bool = True
    """Whether the finished model is written for transformers to OUTPUT/export."""
    mixture: MixtureConfig = field(default_factory=MixtureConfig)
    packs: PacksConfig = field(default_factory=PacksConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)
    entropy: EntropyConfig = field(default_factory=EntropyConfig)
    teacher: TeacherConfig = field(default_factory=TeacherConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    validation: ValidationConfig = field(default_factory=ValidationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    spikes: SpikesConfig = field(default_factory=SpikesConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)


def check_config(config: PretrainConfig, deepspeed: Path | None, world: int) -> dict[str, Any]:
    """What the DeepSpeed file says; ConfigError with every problem of it, of ``config`` and of the number of ranks."""
    ds, problems = find_problems(config, deepspeed, world)
    raise_all(ConfigError, problems)
    return ds


def find_problems(config: PretrainConfig, deepspeed: Path | None, world: int) -> tuple[dict[str, Any], list[str]]:
    """What `check_config` returns, and the sentences that it raises."""
    default = ds_file.default_ds_config(config.optimizer), list[str]()
    ds, problems = ds_file.parse_ds_config(deepspeed) if deepspeed else default
    problems += config_problems(config)
    problems += ds_file.ds_problems(config.optimizer, ds) if ds is not None else []
    if config.entropy.ema_decay is not None and ds_file.zero_stage(ds or {}) == 3:
        problems.append("`entropy.ema_decay` needs whole weights on every rank. ZeRO 3 keeps parts: use 0, 1 or 2.")
    per_step, views = config.packs.per_step, config.packs.masks_per_text
    if per_step >= 1 and per_step % world:
        cure = f"{per_step} packs cannot be shared evenly: use {-(-per_step // world) * world}, or {_fitting(config)}."
        problems.append(must("packs.per_step", f"be a multiple of the number of ranks ({world})", per_step, cure))
    if views > 1 and per_step >= 1 and per_step % (views * world):
        rule = f"divide `packs.per_step` ({per_step}) evenly among the ranks ({world})"
        problems.append(must("packs.masks_per_text", rule, views, f"Use {_fitting(config)}."))
    return ds or {}, problems


def config_problems(config: PretrainConfig) -> list[str]:
    """Sentences for what is wrong with ``config``, whatever it runs on; some of them are `Removable`."""
    config = resolve_phases(config)
    problems = [problem for name, value in flatten(as_dict(config)).items() for problem in _strange(name, value)]
    problems += settings_problems(config)
    problems += data_problems(config.data, config.mixture)
    problems += time_budget.time_budget_problems(config.time_budget)
    problems += teachers.teacher_problems(config.teacher, config.distill, config.entropy)
    problems += _guided(config) + _late(config) + _moved(config)
    if config.init is None:
        longest = config.model.shape(TokenIds(1, 0, 0, 0, 0, ())).max_positions
        if config.packs.length > longest:
            problems.append(must("packs.length", f"be at most `model.max_positions` ({longest})", config.packs.length))
    if config.init and not (config.init / "model.safetensors").is_file() and not _is_run(config.init):
        problems.append(
            f"`init` names {config.init}, which holds neither model.safetensors nor checkpoints/. Make it with "
            "`megamask import`, or name the folder of a run."
        )
    return problems


def late_settings(config: PretrainConfig) -> dict[str, str]:
    """Settings that would first act when the run is over, each with a sentence."""
    updates = {"entropy.audit.every": (config.entropy.audit.every, "there is no audit")}
    if config.masking.score == "token_type":
        updates["masking.token_type.every"] = (config.masking.token_type.every, "all masks are random")
    return {
        name: must(name, f"be less than `steps` ({config.steps}), or {otherwise}", every)
        for name, (every, otherwise) in updates.items()
        if every is not None and every >= config.steps
    }


def changeable(config: PretrainConfig) -> dict[str, object]:
    """The settings that a launch may change on purpose, by their full names."""
    return {name: value for name, value in flatten(as_dict(config)).items() if _may_change(name)}


def _may_change(name: str) -> bool:
    return is_under(name, CHANGEABLE)


def check_change(config: PretrainConfig, names: Sequence[str]) -> None:
    """ConfigError with each of ``names``, settings or sections, that is none or that no run may change on its way."""
    known, problems = names_in(as_dict(config)), []
    for name in names:
        if name not in known:
            problems += renamed_problems([name]) or [unknown(name, filter(_may_change, known), "`change`")]
        elif not _may_change(name):
            rule = f"name settings that may change on the way ({', '.join(sorted(CHANGEABLE))})"
            problems.append(must("change", rule, name, "For another, begin a new run with `init`."))
    raise_all(ConfigError, problems)


def _strange(name: str, value: object) -> list[str]:
    """Values that no setting takes: names that cannot be printed, integers beyond 64 bits."""
    if isinstance(value, str) and not value.isprintable():
        return [must(name, "hold only characters that can be printed", value)]
    if isinstance(value, int) and abs(value) > 2**63:
        return [must(name, "lie below 2**63", value)]
    return []


def _fitting(config: PretrainConfig) -> str:
    """The numbers of ranks that can share a step evenly, as words; of up to a thousand."""
    per_step, views = config.packs.per_step, max(config.packs.masks_per_text, 1)
    fitting = [str(n) for n in range(1, 1001) if per_step % (n * views) == 0]
    return f"a number of ranks that fits ({', '.join(fitting)})" if fitting else "another `packs.masks_per_text`"


def resolve_phases(config: PretrainConfig) -> PretrainConfig:
    """``config`` with numbers where schedules turn at a phase of the learning rate, and with the shares in `data`."""
    rate, masking, distill = config.optimizer.lr, config.masking, config.distill
    masking = replace(masking, ratio=masking.ratio.tied(rate), random_share=masking.random_share.tied(rate))
    data, mixture = split_shares(config.data, config.mixture)
    distill = replace(distill, weight=distill.weight.tied(rate))
    return replace(config, data=data, mixture=mixture, masking=masking, distill=distill)


def _is_run(folder: Path) -> bool:
    return (Path(folder) / "checkpoints").is_dir()


def _guided(config: PretrainConfig) -> list[str]:
    """What score and source of entropy cannot do together."""
    entropy, problems = config.entropy, []
    if config.masking.score == "entropy" and entropy.source == "none":
        problems.append("`masking.score` 'entropy' needs `entropy.source`. Name one, such as 'probe'.")
    if config.masking.score != "entropy" and entropy.source != "none":
        why = f"has no effect on the score {config.masking.score!r}"
        problems.append(Removable("entropy.source", why, "none", "Set `masking.score` to 'entropy', or remove it."))
    strategy = config.masking.entropy.strategy
    if entropy.candidates is not None and strategy not in ("high", "proportional"):
        why = f"must be left out with the strategy {strategy!r}, which takes rows that the probe does not propose"
        problems.append(Removable("entropy.candidates", why, None))
    return problems


def _moved(config: PretrainConfig) -> list[str]:
    """What cannot be done when a clock or a spike decides which packs a step reads, under which masks."""
    problems, stored = [], config.distill.stored is not None
    if config.time_budget is not None and stored and config.masking.ratio.kind != "constant":
        problems.append(
            "`time_budget` moves `masking.ratio` by the clock, but `distill.stored` was made under masks known in "
            "advance. Keep the ratio constant, or ask a teacher."
        )
    if stored:
        problems += fixed_mask_problems(config)
    if config.spikes.policy != "rewind":
        return problems
    if stored:
        problems.append("`spikes.policy` 'rewind' reads other packs than `distill.stored` speaks of. Use 'skip'.")
    reach = (config.checkpoint.keep - 1) * config.checkpoint.every
    if reach < config.spikes.rewind_steps:
        rule = f"be at most {reach}, the age that one of `checkpoint.keep` checkpoints always has"
        problems.append(must("spikes.rewind_steps", rule, config.spikes.rewind_steps, "Keep more checkpoints."))
    return problems


def fixed_mask_problems(config: PretrainConfig) -> list[str]:
    """Sentences for why the masks of a run are not known before it starts."""
    if config.masking.score == "uniform":
        return []
    rule = "be 'uniform' with `distill.stored`, because other masks are not known in advance"
    return [must("masking.score", rule, config.masking.score)]


def _late(config: PretrainConfig) -> list[str]:
    """What the objective cannot do with the encoder and with the masks; with `init`, the encoder is checked later."""
    objective, masking, length = config.objective, config.masking, config.packs.length
    problems = [] if config.init else objective.misfits("objective", config.model.shape(TokenIds(1, 0, 0, 0, 0, ())))
    if objective.decoder.dropout and config.model.attention == "varlen":
        rule = "be 0 when `model.attention` is 'varlen'"
        problems.append(must("objective.decoder.dropout", rule, objective.decoder.dropout))
    if not objective.late or settings_problems(masking) or length < 8:
        return problems
    if masking.corruption.mask == 0:
        why = f"{objective.kind!r} has no effect while `masking.corruption.mask` is 0"
        return [*problems, Removable("objective.kind", why, "mlm", "Set it to 'mlm'.")]
    # the shares of a sequence that are [MASK], over the run; [CLS] and [SEP] never are
    shares = [masking.ratio(step / STEPS) * masking.corruption.mask for step in range(STEPS + 1)]
    if max(shares) * length > length - 3:
        rule = f"leave a token in sight in a sequence of `packs.length` ({length}) rows"
        problems.append(must("masking.ratio", rule, max(shares), "Lower it."))
    if min(shares) * length < 1:
        rule = f"give a sequence of `packs.length` ({length}) rows a target under [MASK]"
        problems.append(must("masking.ratio", rule, min(shares), "Raise it, or lengthen sequences."))
    return problems


def read_settings(path: Path) -> dict[str, Any]:
    """The settings in a TOML or JSON file, such as a run's own config.json; `override_settings` checks them."""
    kind = path.suffix.lower().removeprefix(".")
    if kind not in ("toml", "json"):
        raise ConfigError(f"`{path}` must be a TOML or JSON file, with the ending .toml or .json. Convert it.")
    try:
        settings = read_toml(path) if kind == "toml" else strict_json.read_json(path, strict_json.LARGEST_SETTINGS)
    except OSError as error:
        raise ConfigError(f"`{path}` cannot be read: {error.strerror}.") from None
    except strict_json.BadRecord as error:
        raise ConfigError(f"`{path}` is not {kind.upper()}: {error}.") from None
    if not isinstance(settings, dict):
        raise ConfigError(must(str(path), "hold a table of settings", settings))
    return settings


def override_settings(base: PretrainConfig, values: dict[str, Any], source: str) -> PretrainConfig:
    """``base`` with ``values`` laid over it, which may have old names.

    ConfigError names every unknown key, wrong type and removed value, with the key as the file ``source`` has it.
    """
    if values.keys() >= RECORDED:
        values = {key: value for key, value in values.items() if key not in RECORDED}
    written = {new_name(name): name for name in names_in(values)}
    values = with_new_names(values)
    known = names_in(as_dict(base))
    removed = removed_values(flatten(values), source)
    wrong = [unknown(written[key], known, f"`{source}`") for key in names_in(values) if key not in known]
    try:
        # strict, by the rules of JSON: "3" does not count as 3, nor true as 1; a list is accepted for a tuple
        config = _schema().validate_json(json.dumps(merged(as_dict(base), values)), strict=True)
    except ValidationError as error:
        for each in error.errors(include_url=False):
            name = setting_of(PretrainConfig, each)
            old = written.get(name, name)
            shown = f"{name}`" if old == name else f"{old}` (now `{name}`)"
            if not is_under(name, removed):
                wrong.append(field_problem(PretrainConfig, each, f"{shown} in `{source}"))
    if has_shares(values.get("data")) and (values.get("mixture") or {}).get("shares"):
        wrong.append(f"`{source}` has shares in `data` and in `mixture.shares`. Remove one of them.")
    raise_all(ConfigError, list(dict.fromkeys([*removed.values(), *wrong])))  # a union has a problem for each member
    return config


@cache
def _schema() -> TypeAdapter:
    return TypeAdapter(PretrainConfig)


def as_dict(config: PretrainConfig) -> dict[str, Any]:
    """The configuration as JSON can hold it; `override` takes it back."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))
