"""From settings to a source. What a source needs of a run arrives as functions, so nothing here knows an engine."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from jaxtyping import Int64
from torch import Tensor

from megamask.batch import PackedBatch
from megamask.entropy.cache import Cache, Places
from megamask.entropy.exact import Exact
from megamask.entropy.frequency import Frequency
from megamask.entropy.probe import Probe
from megamask.entropy.sidecar import Sidecar, SidecarFacts, top_of
from megamask.entropy.source import Ask, EntropyConfig, Kind, Source
from megamask.errors import ConfigError


@dataclass(frozen=True)
class Given:
    """What a run has to offer its sources; what is None, the sources that need it cannot be built with."""

    counts: Int64[Tensor, " V"]
    """How often each token occurs in the training text."""
    mask_id: int
    seed: int
    device: torch.device
    ask: Ask | None = None
    """Asks the model itself, or its moving average if `EntropyConfig.average` says so."""
    teacher: Ask | None = None
    """Asks the teacher."""
    embed: Callable[[PackedBatch], Tensor] | None = None
    """The rows of the model's embedding of the unmasked text, and"""
    width: int | None = None
    """how wide they are."""
    facts: SidecarFacts | None = None
    """What the sidecar beside the shards holds."""
    packs: Places | None = None
    """The packs of the training text, and"""
    tokens: int | None = None
    """how many tokens that has."""
    folder: Path | None = None
    """The cache's folder in the run folder."""
    budget: Callable[[], int] | None = None
    """Targets of a pack in the step that comes."""


def build(config: EntropyConfig, given: Given, kind: Kind | None = None) -> Source | None:
    """The source that ``config`` names, or another ``kind`` to fall back to; None for `none`.

    Raises ConfigError if the run does not have what the source needs.
    """
    kind = kind or config.source
    if kind == "none":
        return None
    if kind == "frequency":
        return Frequency(given.counts)
    if kind == "probe":
        return _probe(given)
    if kind == "sidecar":
        return Sidecar(_need(given.facts, kind, "a sidecar of entropies beside the shards (tools/annotate_entropy.py)"))
    if kind == "cache":
        packs, folder = _need(given.packs, kind, "packs"), _need(given.folder, kind, "a run folder")
        top = top_of(config.measure, len(given.counts))
        return Cache(folder, packs, _need(given.tokens, kind, "the length of the text"), given.counts, top)
    ask = _need(given.teacher, kind, "a teacher") if kind == "teacher" else _need(given.ask, kind, "a model")
    exact = partial(Exact, ask, signal=config.signal, passes=config.passes, mask_id=given.mask_id, seed=given.seed)
    if kind == "teacher" or config.candidates is None:
        return exact()
    budget, times = _need(given.budget, kind, "a mask budget"), config.candidates
    return exact(propose=_probe(given), candidates=lambda: round(times * budget()))


def _probe(given: Given) -> Probe:
    embed, width = _need(given.embed, "probe", "an embedding"), _need(given.width, "probe", "its width")
    return Probe(embed, width, given.counts, seed=given.seed, device=given.device)


def _need(value, kind: str, what: str):
    if value is None:
        raise ConfigError(f"The entropy source {kind!r} needs {what}, but this run has none.")
    return value
