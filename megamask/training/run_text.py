"""Open and check the text of a run: one folder of shards, the sources of a mixture, or text of this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from megamask.config.pretrain_config import PretrainConfig
from megamask.config.settings import MixtureConfig
from megamask.config.sources import data_folders, source_names
from megamask.data import prepare
from megamask.data.length_phases import PhasedPacks, SourcePacks
from megamask.data.manifest import Split
from megamask.data.mixed_sources import MixedPacks, MixedShards, TextPacks, one_tokenizer_problems
from megamask.data.mixture import AnnealedOrder, SourceOrder, block_quotas, smoothed_shares
from megamask.data.packs import Packs, text_number
from megamask.data.shards import Shards
from megamask.entropy.frequency import unigram_surprisal
from megamask.errors import DataError, raise_all
from megamask.masking.masker import EVALUATION
from megamask.runtime import ranks
from megamask.training.validation import SEED

Name = TypeVar("Name")
Result = TypeVar("Result")
Phases = tuple[Packs | None, Packs]
"""The packs of a source in short sequences, if a run begins with them, and in long ones."""


@dataclass(frozen=True)
class RunText:
    """The text of a run, checked, and its packs."""

    train: Shards
    packs: TextPacks
    held_out: dict[str, Packs]
    """The packs of the validation split of each source, by its name."""
    unigram: Float[Tensor, " V"]
    """The cross-entropy of a guess by frequency, for each token, in nats."""


def open_run_text(config: PretrainConfig, early: Callable[[], AbstractContextManager] = nullcontext) -> RunText:
    """Open and check the shards; without `data`, those of the English text on this machine. Collective.

    Long work runs inside ``early()``, collectives outside of it. An error on one rank is raised on all.
    """

    def prepare_text() -> Path:
        with early():
            return prepare.local_data(prepare.CACHE)

    def open_text(*, verify: bool) -> RunText:
        with early():
            return open_sources(config, folders, verify=verify)

    folders = data_folders(config.data) or (ranks.on_rank_zero(prepare_text),)
    # rank 0 verifies the shards and makes the index of packs, then the other ranks open both
    first: list[RunText] = []
    ranks.on_rank_zero(lambda: first.append(open_text(verify=config.verify)))
    return ranks.all_ranks_or_none(lambda: first[0] if first else open_text(verify=False))


def open_sources(
    config: PretrainConfig, folders: tuple[Path, ...], *, store: bool = True, verify: bool = False
) -> RunText:
    """The text of a run in ``folders``. DataError with every problem. ``store`` is that of `Packs`.

    Compares each folder with its manifest once; ``verify`` compares each sha256.
    """
    train = open_splits(folders, "train", verify=verify)
    valid = _each(train, lambda name: train[name].of_split("valid"))
    problems: list[str] = []
    packs, held_out = None, {}
    try:
        packs = training_packs(config, train, store=store)
    except DataError as error:
        problems.extend(error.problems)
    sizes, targets = config.packs, EVALUATION.most_targets(config.packs.tokens)
    try:
        held_out = _each(
            valid,
            lambda name: Packs(
                valid[name], tokens=sizes.tokens, length=sizes.length, seed=SEED, targets=targets, store=store
            ),
        )
    except DataError as error:
        problems.extend(error.problems)
    raise_all(DataError, problems)
    assert packs
    return RunText(packs.shards, packs, held_out, unigram_surprisal(torch.from_numpy(packs.shards.unigram)))


def open_splits(folders: tuple[Path, ...], split: Split, *, verify: bool = False) -> dict[str, Shards]:
    """The ``split`` of each source by its name. DataError with the problems of all, or if tokenizers differ."""
    by_name = dict(zip(source_names(folders), folders, strict=True))
    opened = _each(by_name, lambda name: Shards.open(by_name[name], split, verify=verify))
    raise_all(DataError, one_tokenizer_problems(list(opened.values())))
    return opened


def training_packs(config: PretrainConfig, sources: dict[str, Shards], *, store: bool = True) -> TextPacks:
    """The packs of a run with ``config``, of one source or mixed. DataError with every problem. ``store`` is that of
    `Packs`."""
    if config.masking.unit != "token":
        _each(sources, lambda name: sources[name].check_words())
    sizes = config.packs
    how = {
        "tokens": sizes.tokens,
        "targets": config.masking.most_targets(sizes.tokens, None if config.time_budget else config.steps),
    }
    step = {"per_step": sizes.per_step, "views": sizes.masks_per_text}
    boundary = sizes.per_step * sizes.short_steps  # the first pack of long sequences

    def phases(shards: Shards, seed: int, **more: int) -> Phases:
        def of(length: int) -> Packs:
            return Packs(shards, length=length, seed=seed, **how, **more, store=store)

        return of(sizes.start_length) if sizes.start_length else None, of(sizes.length)

    if len(sources) == 1:
        (shards,) = sources.values()
        return _in_phases(phases(shards, config.seed, **step), boundary)
    # a permutation of its own for each source; `seed` is below 2**63
    seeds = {name: config.seed + (place << 63) for place, name in enumerate(sources)}
    opened = _each(sources, lambda name: phases(sources[name], seeds[name]))
    total = text_number(config.steps * sizes.per_step, **step)
    order = _source_order(config.mixture, [len(each[-1]) for each in opened.values()], total)
    boundaries = order.counts(text_number(boundary, **step)).tolist()
    packs = {name: _in_phases(opened[name], count) for name, count in zip(sources, boundaries, strict=True)}
    mean = order.counts(total) / total if isinstance(order, AnnealedOrder) else order.shares_at(0)
    return MixedPacks(MixedShards.join(sources, mean.tolist()), packs, order, **step)


def _source_order(mixture: MixtureConfig, sizes: list[int], total: int) -> SourceOrder | AnnealedOrder:
    """The order of sources of ``sizes`` packs in a run of ``total`` texts."""
    if mixture.alpha_end is not None:
        return AnnealedOrder.by_alpha(sizes, mixture.alpha, mixture.alpha_end, total)
    return SourceOrder(block_quotas(mixture.shares or smoothed_shares(sizes, mixture.alpha).tolist()))


def _in_phases(packs: Phases, boundary: int) -> SourcePacks:
    short, long = packs
    return PhasedPacks(short, long, boundary) if short else long


def _each(names: Iterable[Name], act: Callable[[Name], Result]) -> dict[Name, Result]:
    """``act`` of each of ``names``, by name. DataError with the problems of all."""
    results: dict[Name, Result] = {}
    problems: list[str] = []
    for name in names:
        try:
            results[name] = act(name)
        except DataError as error:
            problems.extend(error.problems)
    raise_all(DataError, problems)
    return results
