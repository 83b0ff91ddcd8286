"""The phases of a run, from its settings: where each begins, and what is wrong with them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise

from megamask.basic_types import TokenIds
from megamask.config.pretrain_config import PretrainConfig
from megamask.config.settings import PhaseConfig
from megamask.config.sources import data_folders
from megamask.errors import Removable, must
from megamask.schedules import RunPhase as RunPhase
from megamask.schedules import RunPhases as RunPhases


def run_phases(config: PretrainConfig) -> RunPhases:
    """The phases of a run whose settings have no problems; those without a step are left out."""
    packs = config.packs
    return RunPhases(
        [
            RunPhase(
                first_step=begin,
                per_step=phase.per_step or packs.per_step,
                length=phase.length or packs.length,
                mask_ratio=phase.mask_ratio,
                shares=phase.shares,
                alpha=phase.alpha,
            )
            for begin, end, phase in _spans(config)
            if end is None or end > begin
        ],
        packs.masks_per_text,
    )


def phase_ends(config: PretrainConfig) -> list[int]:
    """The number of steps after which each of `phases` ends."""
    return [end for _, end, _ in _spans(config) if end is not None]


def reading_phases(config: PretrainConfig) -> list[tuple[int, PhaseConfig]]:
    """The first step and the settings of each phase, the rest of the run included, as far as they decide what is read.

    A phase that only changes the masking rate belongs to the phase before it.
    """
    parts = [(begin, replace(phase, until=None, steps=None, mask_ratio=None)) for begin, _, phase in _spans(config)]
    return parts[:1] + [part for before, part in pairwise(parts) if part[1] != before[1]]


def run_tokens(config: PretrainConfig) -> int:
    """Tokens of the whole run, padding included."""
    return run_phases(config).packs_before(config.steps) * config.packs.tokens


def longest_sequence(config: PretrainConfig) -> int:
    """The longest sequences of any phase, in tokens."""
    return max([config.packs.length, *(phase.length or 0 for phase in config.phases)])


def most_phase_targets(config: PretrainConfig) -> int:
    """The largest number of targets in a pack of the run, in any phase."""
    return max(phase_targets(config))


def phase_targets(config: PretrainConfig) -> set[int]:
    """The numbers of targets that packs of the run have, in any phase."""
    masking, rows = config.masking, config.packs.tokens
    ratios = [phase.mask_ratio for phase in config.phases if phase.mask_ratio is not None]
    numbers = masking.numbers_of_targets(rows, None if config.time_budget else config.steps)
    return numbers.union(masking.targets(0.0, rows, ratio) for ratio in ratios)


def phase_problems(config: PretrainConfig) -> list[str]:
    """Sentences for phases that do not fit together or to the other settings, if each value is in its range."""
    phases = config.phases
    wrong_ends = [
        must(f"phases.{place}", "have either `until` or `steps`", _named(phase))
        for place, phase in enumerate(phases)
        if (phase.until is None) == (phase.steps is None)
    ]
    if wrong_ends:
        return wrong_ends
    problems = []
    for (one, first), (two, second) in pairwise((n, p.until) for n, p in enumerate(phases) if p.until is not None):
        if first >= second:
            problems.append(must(f"phases.{two}.until", f"be above `phases.{one}.until` ({first})", second))
    for place, (phase, following) in enumerate(pairwise([*phases, PhaseConfig()])):
        if _content(phase, config) == _content(following, config):
            rest = "the rest of the run" if place + 1 == len(phases) else f"`phases.{place + 1}`"
            problems.append(f"`phases.{place}` has no effect: {rest} has the same settings. Remove it, or join them.")
        problems += _size_problems(f"phases.{place}", phase, config) + _mixture_problems(
            f"phases.{place}", phase, config
        )
    return problems + _fixed_number_problems(config)


def late_phases(config: PretrainConfig) -> dict[str, str]:
    """A sentence by the name of the setting if phases end after the run, or are too short for a step of it."""
    spans = [(begin, end) for begin, end, _ in _spans(config) if end is not None]
    if all(begin < end < config.steps for begin, end in spans):
        return {}
    ends = ", ".join(f"{end:,}" for _, end in spans)
    rule = f"each have a step and end before `steps` ({config.steps:,})"
    return {"phases": f"`phases` must {rule}, but end after {ends} steps."}


def _spans(config: PretrainConfig) -> Iterator[tuple[int, int | None, PhaseConfig]]:
    """First step, first step behind, and settings of each phase; then those of the rest of the run, without an end."""
    begin = 0
    for phase in config.phases:
        end = begin + phase.steps if phase.steps is not None else max(begin, round((phase.until or 0) * config.steps))
        yield begin, end, phase
        begin = end
    yield begin, None, PhaseConfig()


def _named(phase: PhaseConfig) -> dict[str, object]:
    return {name: value for name, value in vars(phase).items() if value is not None}


def _content(phase: PhaseConfig, config: PretrainConfig) -> tuple[object, ...]:
    """What a phase asks of its steps."""
    packs, mixture, ratio = config.packs, config.mixture, config.masking.ratio
    plain = ratio.start if ratio.kind == "constant" else None
    shares = phase.shares or (None if phase.alpha is not None else mixture.shares)
    total = sum(shares) if shares else 0
    return (
        phase.length or packs.length,
        phase.per_step or packs.per_step,
        plain if phase.mask_ratio is None else phase.mask_ratio,
        tuple(share / total for share in shares) if shares and total else None,
        None if shares else mixture.alpha if phase.alpha is None else phase.alpha,
    )


def _size_problems(name: str, phase: PhaseConfig, config: PretrainConfig) -> list[str]:
    if phase.length is None:
        return []
    limits = {"packs.tokens": config.packs.tokens}
    if not config.init:
        limits["model.max_positions"] = config.model.shape(TokenIds(1, 0, 0, 0, 0, ())).max_positions
    return [
        must(f"{name}.length", f"be at most `{setting}` ({limit})", phase.length)
        for setting, limit in limits.items()
        if phase.length > limit
    ]


def _mixture_problems(name: str, phase: PhaseConfig, config: PretrainConfig) -> list[str]:
    given = [part for part in ("shares", "alpha") if getattr(phase, part) is not None]
    folders = len(data_folders(config.data))
    if not given:
        return []
    if folders < 2:
        return [f"`{name}.{part}` has no effect with a single folder in `data`. Remove it." for part in given]
    problems = []
    if len(given) > 1:
        problems.append(f"`{name}.alpha` has no effect with `{name}.shares`. Remove one of them.")
    if phase.shares is not None and len(phase.shares) != folders:
        rule = f"have a share for each of the {folders} folders of `data`"
        problems.append(must(f"{name}.shares", rule, list(phase.shares)))
    if phase.shares is not None and sum(phase.shares) <= 0:
        problems.append(must(f"{name}.shares", "have a sum above 0", list(phase.shares)))
    if config.mixture.alpha_end is not None:
        why = f"moves over the whole run, but `{name}.{given[0]}` sets shares for a phase"
        problems.append(Removable("mixture.alpha_end", why, None))
    return problems


def _fixed_number_problems(config: PretrainConfig) -> list[str]:
    """Sentences for phases of which packs, masks or sequences must be known otherwise."""
    phases, problems = config.phases, []
    if config.time_budget is not None:
        problems += [
            f"`phases.{place}.until` is a share of the steps, but `time_budget` ends the run by the clock. Use `steps`."
            for place, phase in enumerate(phases)
            if phase.until is not None
        ]
    if phases and config.distill.stored is not None:
        problems.append("`phases` has no masks for `distill.stored`, which was computed for a run without them.")
    if config.entropy.source == "sidecar" and any(phase.length is not None for phase in phases):
        problems.append(
            "`phases` has sequences of several lengths, but `entropy.source` 'sidecar' was computed with one. Remove "
            "one of them."
        )
    return problems
