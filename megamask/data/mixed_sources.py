"""The text of several sources as one: their shards, and their packs in the order of a mixture.

Costs an array look-up for each pack. Pack n is pack k of one source, where k counts the packs of that source before n
(`data.mixture`). Each source has its own permutation for each of its epochs, so it begins again when it is exhausted,
independently of the others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, get_args

import numpy as np
from jaxtyping import Int64

from megamask.batch import PackedBatch
from megamask.data.compare_tokenizers import tokenizer_differences
from megamask.data.length_phases import SourcePacks
from megamask.data.lost_text.coverage import Coverage, sum_coverage
from megamask.data.manifest import Manifest, Split
from megamask.data.mixture import AnnealedOrder, SourceOrder
from megamask.data.shards import Shards
from megamask.data.tokenizer import TOKENIZER
from megamask.errors import DataError
from megamask.schedules import RunPhases


def joined_fingerprint(sources: Sequence[Shards]) -> str:
    """The fingerprint of one source, or the sha256 of those of several; it depends neither on paths nor on shares."""
    if len(sources) == 1:
        return sources[0].fingerprint
    return hashlib.sha256(json.dumps([shards.fingerprint for shards in sources]).encode()).hexdigest()


def one_tokenizer_problems(sources: Sequence[Shards]) -> list[str]:
    """Sentences for sources whose tokenizer is not that of the first. Compares contents only if a hash differs."""
    first, *others = sources
    problems = []
    for other in others:
        if other.manifest["tokenizer"] != first.manifest["tokenizer"]:
            one, two = first.folder / TOKENIZER, other.folder / TOKENIZER
            problems += tokenizer_differences(one, str(one), two, str(two))
        elif other.token_ids != first.token_ids:
            problems.append(f"The manifests of {first.folder} and {other.folder} have different ids of special tokens.")
    if not problems:
        return []
    cure = f"Prepare every source with `megamask prepare --tokenizer {first.folder / TOKENIZER}`."
    return ["The sources of a mixture must have one tokenizer:", *problems, cure]


@dataclass(frozen=True)
class MixedShards(Shards):
    """The train splits of several sources as one text: their counts and facts, and the tokenizer of all.

    ``folder`` is that of the first source. Tokens are read source by source (`MixedPacks`).
    """

    mixed: tuple[Shards, ...] = ()
    shares: tuple[float, ...] = ()
    """The share of each source in the packs of a run; the sum is 1."""

    @classmethod
    def join(cls, sources: Mapping[str, Shards], shares: Sequence[float]) -> MixedShards:
        """The ``sources``, by name, with their ``shares``."""
        first = next(iter(sources.values()))
        return cls(first.folder, first.split, _joined_manifest(sources), tuple(sources.values()), tuple(shares))

    @property
    def sources(self) -> tuple[Shards, ...]:
        """The sources, in the order of `data`."""
        return self.mixed

    @cached_property
    def fingerprint(self) -> str:
        """The same for the same sources in the same order, under any shares and paths."""
        return joined_fingerprint(self.mixed)

    @cached_property
    def unigram(self) -> Int64[np.ndarray, " V"]:
        """How often each id occurs in a text as long as all sources together, that is mixed by the shares."""
        frequencies = [shards.unigram / max(1, shards.unigram.sum()) for shards in self.mixed]
        mean = sum(share * each for share, each in zip(self.shares, frequencies, strict=True))
        return np.round(self.tokens * mean).astype(np.int64)

    def check_words(self) -> None:
        """DataError if a source does not show where words begin."""
        for shards in self.mixed:
            shards.check_words()

    def sidecar(self, name: str) -> list[np.ndarray] | None:
        """The sidecars of all sources, or None unless all have one with the same facts."""
        facts = [shards.sidecar_facts(name) for shards in self.mixed]
        parts = [shards.sidecar(name) for shards in self.mixed]
        if None in facts or None in parts or any(each != facts[0] for each in facts):
            return None
        return [part for each in parts for part in each or ()]

    def sidecar_facts(self, name: str) -> dict[str, Any] | None:
        """The facts about a sidecar of all sources; None if no source has one. DataError if the sources differ."""
        facts = {str(shards.folder): shards.sidecar_facts(name) for shards in self.mixed}
        first, *others = facts.values()
        if all(each == first for each in others):
            return first
        lacking = ", ".join(folder for folder, each in facts.items() if each is None)
        raise DataError(
            f"The sources of the mixture have different sidecars {name!r}"
            + (f": {lacking} have none." if lacking else ", made in different ways.")
            + " Make all of them in the same way."
        )


def _joined_manifest(sources: Mapping[str, Shards]) -> Manifest:
    """A manifest with the sums of the counts, and the files of each source under its name."""
    manifests = {name: shards.manifest for name, shards in sources.items()}
    first = next(iter(manifests.values()))
    splits = {split: _sums(split, list(manifests.values())) for split in get_args(Split)}
    lost = {split: counts for split in get_args(Split) if (counts := _lost(split, manifests.values()))}
    files = {f"{name}/{file}": entry for name, each in manifests.items() for file, entry in each["files"].items()}
    kept = ("format", "version", "tokenizer", "token_ids", "dtype")
    joined = {"splits": splits, "coverage": lost, "files": files, "sources": list(manifests)}
    return {key: first[key] for key in kept} | joined


def _sums(split: Split, manifests: list[Manifest]) -> dict[str, Any]:
    parts = [manifest["splits"].get(split, {}) for manifest in manifests]
    return {unit: sum(part.get(unit, 0) for part in parts) for unit in ("documents", "tokens")} | {"shards": []}


def _lost(split: Split, manifests: Iterable[Manifest]) -> dict[str, Any] | None:
    """What the tokenizer lost in ``split`` of all sources; None if shards of an earlier version did not count it."""
    records = [manifest.get("coverage", {}).get(split) for manifest in manifests]
    return sum_coverage(map(Coverage.of_record, records)).record() if all(records) else None


class MixedPacks:
    """The packs of several sources in the order of a mixture, by number; used like `Packs`."""

    def __init__(
        self,
        shards: MixedShards,
        sources: Mapping[str, SourcePacks],
        order: SourceOrder | AnnealedOrder,
        phases: RunPhases,
    ):
        """``sources``: the packs of each source by name, opened without ``per_step`` and ``masks_per_text``."""
        self.shards, self.sources, self.order, self._phases = shards, dict(sources), order, phases
        self.token_ids = shards.token_ids
        self._packs = list(self.sources.values())
        # all packs have the same shapes
        entries = max(packs.entries for packs in self._packs)
        for packs in self._packs:
            packs.entries = entries

    def __len__(self) -> int:
        """The packs in one epoch of every source."""
        return sum(map(len, self._packs))

    @property
    def left_out(self) -> int:
        """Tokens of text in no pack, of all sources."""
        return sum(packs.left_out for packs in self._packs)

    @property
    def short(self) -> int:
        """Packs of all sources that are left out because too few of their tokens can be masked."""
        return sum(packs.short for packs in self._packs)

    @property
    def short_tokens(self) -> int:
        """Tokens of text in these packs."""
        return sum(packs.short_tokens for packs in self._packs)

    @property
    def shortage(self) -> str:
        """Sentences about these packs, source by source; or ""."""
        return " ".join(filter(None, (packs.shortage for packs in self._packs)))

    @property
    def shares(self) -> dict[str, float]:
        """The share of each source, rounded to a pack in a block; the mean over the run if shares change."""
        return dict(zip(self.sources, self.shards.shares, strict=True))

    def shares_at(self, number: int) -> dict[str, float]:
        """The share of each source around pack ``number``."""
        return dict(zip(self.sources, self.order.shares_at(self.text_of(number)).tolist(), strict=True))

    def source_of(self, number: int) -> int:
        """The place of the source of pack ``number`` in `sources`."""
        return self.order[self.text_of(number)][0]

    def text_of(self, number: int) -> int:
        """The number of the text in pack ``number``: the same, unless a step shows each text several times."""
        return self._phases.text_of(number)

    def batch(self, number: int) -> PackedBatch:
        """Pack ``number`` (from 0) as CPU tensors; see `Packs.batch`."""
        text = self.text_of(number)
        source, index = self.order[text]
        return self._packs[source].read(index, number, text)

    def source_epochs(self, number: int) -> dict[str, float]:
        """How often each source is read by the packs below ``number``, the first of a step."""
        counts = self.order.counts(self.text_of(number))
        return {
            name: packs.epochs(int(count)) for (name, packs), count in zip(self.sources.items(), counts, strict=True)
        }


TextPacks = SourcePacks | MixedPacks
"""The packs of one source or of a mixture."""
