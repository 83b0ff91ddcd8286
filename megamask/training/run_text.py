"""Open and check the text of a run: one folder of shards, the sources of a mixture, or text of this machine."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from megamask.config.phases import most_phase_targets, run_phases
from megamask.config.pretrain_config import PretrainConfig
from megamask.config.sources import data_folders, source_names
from megamask.data import prepare
from megamask.data.length_phases import PhasedPacks
from megamask.data.manifest import Split
from megamask.data.mixed_sources import MixedPacks, MixedShards, TextPacks, one_tokenizer_problems
from megamask.data.packs import Packs
from megamask.data.shards import Shards
from megamask.entropy.frequency import unigram_surprisal
from megamask.errors import DataError, raise_all
from megamask.masking.masker import EVALUATION
from megamask.runtime import ranks
from megamask.training.source_order import mean_shares, source_order
from megamask.training.validation import SEED

Name = TypeVar("Name")
Result = TypeVar("Result")
ByLength = dict[int, Packs]
"""The packs of a source for each length of sequences that a run has."""


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
    phases, masks_per_text = run_phases(config), config.packs.masks_per_text
    lengths = dict.fromkeys(phase.length for phase in phases.phases)
    how = {"tokens": config.packs.tokens, "targets": most_phase_targets(config)}

    def of(shards: Shards, seed: int, **more: int) -> ByLength:
        return {length: Packs(shards, length=length, seed=seed, **how, **more, store=store) for length in lengths}

    if len(sources) == 1:
        (shards,) = sources.values()
        if len(phases.phases) == 1:
            (packs,) = of(shards, config.seed, per_step=config.packs.per_step, masks_per_text=masks_per_text).values()
            return packs
        return PhasedPacks(of(shards, config.seed), phases, phases.first_texts)
    # a permutation of its own for each source; `seed` is below 2**63
    seeds = {name: config.seed + (place << 63) for place, name in enumerate(sources)}
    opened = _each(sources, lambda name: of(sources[name], seeds[name]))
    order = source_order(config, [len(each[config.packs.length]) for each in opened.values()])
    starts = np.array([order.counts(text) for text in phases.first_texts]).T.tolist()
    by_source = {
        name: each[config.packs.length] if len(lengths) == 1 else PhasedPacks(each, phases, of_source, of_mixture=True)
        for (name, each), of_source in zip(opened.items(), starts, strict=True)
    }
    shares = mean_shares(config, order).tolist()
    return MixedPacks(MixedShards.join(sources, shares), by_source, order, phases)


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
