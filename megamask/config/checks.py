"""Find every problem of a configuration before any device is used: of its settings, between its sections, and of the
DeepSpeed file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megamask.basic_types import TokenIds
from megamask.config import time_budget
from megamask.config.phases import late_phases, phase_problems
from megamask.config.pretrain_config import PretrainConfig, as_dict, resolve_phases
from megamask.config.settings import PhaseConfig
from megamask.config.sizes_of_init import init_problems
from megamask.config.sources import data_folders, data_problems
from megamask.engine import ds_file
from megamask.errors import ConfigError, Removable, must, raise_all
from megamask.errors.setting_rules import settings_problems
from megamask.masking.settings import STEPS
from megamask.storage.dotted import flatten
from megamask.teacher import settings as teachers


def check_config(config: PretrainConfig, deepspeed: Path | None, world: int) -> dict[str, Any]:
    """The content of the DeepSpeed file; ConfigError with every problem of it, ``config`` and the number of ranks."""
    ds, problems = find_problems(config, deepspeed, world)
    raise_all(ConfigError, problems)
    return ds


def find_problems(config: PretrainConfig, deepspeed: Path | None, world: int) -> tuple[dict[str, Any], list[str]]:
    """What `check_config` returns, and the sentences that it raises."""
    default = ds_file.default_ds_config(config.optimizer), list[str]()
    ds, problems = ds_file.parse_ds_config(deepspeed) if deepspeed else default
    problems += config_problems(config)
    if ds is not None and ds_file.stage_is_known(ds):
        problems += ds_file.ds_problems(config.optimizer, ds)
    if config.entropy.ema_decay is not None and ds_file.zero_stage(ds or {}) == 3:
        problems.append(
            "`entropy.ema_decay` needs whole weights on every rank, which ZeRO 3 does not keep: use stage 0, 1 or 2."
        )
    return ds or {}, problems + _rank_problems(config, world)


def config_problems(config: PretrainConfig) -> list[str]:
    """Sentences for what is wrong with ``config``, whatever it runs on; some of them are `Removable`."""
    config = resolve_phases(config)
    problems = [problem for name, value in flatten(as_dict(config)).items() for problem in _value_problems(name, value)]
    of_settings = settings_problems(config)
    problems += of_settings
    in_range = not any(problem.startswith("`phases.") for problem in of_settings)
    problems += phase_problems(config) if in_range else []
    problems += data_problems(config.data, config.mixture)
    problems += time_budget.time_budget_problems(config.time_budget)
    problems += _random_token_problems(config)
    problems += teachers.teacher_problems(config.teacher, config.distill, config.entropy)
    problems += _entropy_problems(config) + _objective_problems(config)
    problems += _stored_target_and_rewind_problems(config)
    if config.init is None:
        longest = config.model.shape(TokenIds(1, 0, 0, 0, 0, ())).max_positions
        if config.packs.length > longest:
            problems.append(must("packs.length", f"be at most `model.max_positions` ({longest})", config.packs.length))
    problems += init_problems(config)
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
    late = {
        name: must(name, f"be less than `steps` ({config.steps}), or {otherwise}", every)
        for name, (every, otherwise) in updates.items()
        if every is not None and every >= config.steps
    }
    if config.checkpoint.background and config.checkpoint.every >= config.steps:
        late["checkpoint.background"] = (
            f"`checkpoint.background` has no effect while `checkpoint.every` ({config.checkpoint.every}) is not less "
            f"than `steps` ({config.steps}): the last checkpoint is never written in the background. Lower "
            "`checkpoint.every`, or remove it."
        )
    return late | late_phases(config)


def _value_problems(name: str, value: object) -> list[str]:
    """Sentences for values that no setting accepts: strings that cannot be printed, integers beyond 64 bits."""
    if isinstance(value, str) and not value.isprintable():
        return [must(name, "contain only printable characters", value)]
    if isinstance(value, int) and abs(value) > 2**63:
        return [must(name, "lie below 2**63", value)]
    return []


def _rank_problems(config: PretrainConfig, world: int) -> list[str]:
    """Sentences for steps, in any phase, whose packs ``world`` ranks cannot share evenly."""
    steps = {f"phases.{place}.per_step": phase.per_step for place, phase in enumerate(config.phases)}
    masks_per_text, problems = config.packs.masks_per_text, []
    for name, per_step in ({"packs.per_step": config.packs.per_step} | steps).items():
        if per_step is None or per_step < 1:
            continue
        if per_step % world:
            more = -(-per_step // world) * world
            cure = f"{per_step} {_packs(per_step)} cannot be shared evenly: use {more}, or {_fitting(config)}."
            problems.append(must(name, f"be a multiple of the number of ranks ({world})", per_step, cure))
        if masks_per_text > 1 and per_step % (masks_per_text * world):
            rule = f"divide `{name}` ({per_step}) evenly among the ranks ({world})"
            problems.append(must("packs.masks_per_text", rule, masks_per_text, f"Use {_fitting(config)}."))
    return problems


def _packs(count: int) -> str:
    return "pack" if count == 1 else "packs"


def _fitting(config: PretrainConfig) -> str:
    """The numbers of ranks, up to a thousand, that can share a step of every phase evenly; as words."""
    masks_per_text = max(config.packs.masks_per_text, 1)
    steps = [config.packs.per_step, *(phase.per_step for phase in config.phases if phase.per_step)]
    fitting = [str(n) for n in range(1, 1001) if all(per_step % (n * masks_per_text) == 0 for per_step in steps)]
    return f"a number of ranks that fits ({', '.join(fitting)})" if fitting else "another `packs.masks_per_text`"


def _is_run(folder: Path) -> bool:
    return (Path(folder) / "checkpoints").is_dir()


def _entropy_problems(config: PretrainConfig) -> list[str]:
    """Sentences for conflicts between the score and the entropy source."""
    entropy, problems = config.entropy, []
    if config.masking.score == "entropy" and entropy.source == "none":
        problems.append("`masking.score` 'entropy' needs `entropy.source`. Name one, such as 'probe'.")
    if config.masking.score != "entropy" and entropy.source != "none":
        why = f"has no effect on the score {config.masking.score!r}"
        problems.append(Removable("entropy.source", why, "none", "Set `masking.score` to 'entropy', or remove it."))
    strategy = config.masking.entropy.strategy
    if entropy.candidates is not None and strategy not in ("high", "proportional"):
        why = f"must be left out with the strategy {strategy!r}, which takes tokens that the probe does not propose"
        problems.append(Removable("entropy.candidates", why, None))
    return problems


def _stored_target_and_rewind_problems(config: PretrainConfig) -> list[str]:
    """Sentences for orders and masks that must be known in advance and are not, and for rewinds without an old
    checkpoint.
    """
    problems: list[str] = []
    stored = config.distill.stored is not None
    if config.time_budget is not None and config.mixture.alpha_end is not None:
        why = "moves with the number of steps, but `time_budget` ends the run by the clock"
        problems.append(Removable("mixture.alpha_end", why, None))
    if config.time_budget is not None and stored and config.masking.ratio.kind != "constant":
        problems.append(
            "With `time_budget`, `masking.ratio` follows the clock, but `distill.stored` needs masks that are known in "
            "advance. Keep the ratio constant, or use `teacher.path` without `distill.stored`."
        )
    if stored:
        problems += fixed_mask_problems(config)
    if config.spikes.policy != "rewind":
        return problems
    if stored:
        problems.append(
            "`spikes.policy` 'rewind' changes which packs are read, but `distill.stored` covers fixed packs. Use "
            "'skip'."
        )
    reach = (config.checkpoint.keep - 1) * config.checkpoint.every
    if reach < config.spikes.rewind_steps:
        rule = f"be at most {reach}, the age that one of `checkpoint.keep` checkpoints always has"
        problems.append(must("spikes.rewind_steps", rule, config.spikes.rewind_steps, "Keep more checkpoints."))
    return problems


def fixed_mask_problems(config: PretrainConfig) -> list[str]:
    """A sentence if the masks of a run are not known before it starts."""
    if config.masking.score == "uniform":
        return []
    rule = "be 'uniform' with `distill.stored`, because other masks are not known in advance"
    return [must("masking.score", rule, config.masking.score)]


def _random_token_problems(config: PretrainConfig) -> list[str]:
    """Sentences for random tokens by source where there are no sources, or where masks were stored without them."""
    name = "masking.corruption.random_from"
    if config.masking.corruption.random_from != "source":
        return []
    problems: list[str] = []
    if len(data_folders(config.data)) < 2:
        problems.append(Removable(name, "'source' has no effect with a single folder in `data`", "vocabulary"))
    if config.distill.stored is not None:
        problems.append(must(name, "be 'vocabulary' with `distill.stored`", "source"))
    return problems


def _objective_problems(config: PretrainConfig) -> list[str]:
    """Sentences for conflicts of the objective with encoder and masks; with `init`, the encoder is checked later."""
    objective, masking = config.objective, config.masking
    problems = [] if config.init else objective.misfits("objective", config.model.shape(TokenIds(1, 0, 0, 0, 0, ())))
    if objective.decoder.dropout and config.model.attention == "varlen":
        rule = "be 0 when `model.attention` is 'varlen'"
        problems.append(must("objective.decoder.dropout", rule, objective.decoder.dropout))
    if not objective.late or settings_problems(masking):
        return problems
    if masking.corruption.mask == 0:
        why = f"{objective.kind!r} has no effect while `masking.corruption.mask` is 0"
        return [*problems, Removable("objective.kind", why, "mlm", "Set it to 'mlm'.")]
    problems += _budget_problems(config, PhaseConfig(), "")
    for place, phase in enumerate(config.phases):
        if phase.length is not None or phase.mask_ratio is not None:
            problems += _budget_problems(config, phase, f"phases.{place}.")
    return problems


def _budget_problems(config: PretrainConfig, phase: PhaseConfig, section: str) -> list[str]:
    """Sentences for too many or too few [MASK] in the sequences of ``phase``; [CLS] and [SEP] are never masked."""
    masking, mask, problems = config.masking, config.masking.corruption.mask, []
    name, length = f"{section}length", phase.length
    if length is None:
        name, length = "packs.length", config.packs.length
    if length < 8:  # has a sentence already
        return []
    # the shares of a sequence that are [MASK], over the run
    ratio, ratios = "masking.ratio", [masking.ratio(step / STEPS) for step in range(STEPS + 1)]
    if phase.mask_ratio is not None:
        ratio, ratios = f"{section}mask_ratio", [phase.mask_ratio]
    most, least = max(ratios) * mask, min(ratios) * mask
    if most * length > length - 3:
        rule = f"leave a token visible in a sequence of `{name}` ({length}) tokens"
        problems.append(must(ratio, rule, most, "Lower it."))
    if least * length < 1:
        rule = f"give a sequence of `{name}` ({length}) tokens a target under [MASK]"
        problems.append(must(ratio, rule, least, "Raise it, or lengthen sequences."))
    return problems
