"""The text of one source in two phases: first in short sequences, then in longer ones.

BERT trains 90 % of its steps on sequences of 128 tokens and the rest on 512 (Devlin et al. 2019, appendix A.2). Here a
pack has the same number of tokens in both phases, so a step costs about the same, holds the same number of masked
tokens, and only attention gets longer. Each phase has packs of its own, in an order of its own, and reads the text from
the beginning. The phase of a pack follows from its number alone.
"""

from __future__ import annotations

from dataclasses import replace

from megamask.batch import PackedBatch
from megamask.data.packs import Packs


class PhasedPacks:
    """The packs of ``short`` below the number ``boundary``, those of ``long`` from there on; used like `Packs`."""

    def __init__(self, short: Packs, long: Packs, boundary: int):
        """``boundary`` is the number of the first pack of a step, if packs are opened with ``per_step``."""
        self.short_phase, self.long_phase, self.boundary = short, long, boundary
        self.shards, self.token_ids, self.fill = long.shards, long.token_ids, long.fill
        self.entries = max(short.entries, long.entries)  # so that all packs have the same shapes

    def __len__(self) -> int:
        """Packs in an epoch of long sequences."""
        return len(self.long_phase)

    @property
    def entries(self) -> int:
        """Boundaries of sequences in each pack of both phases."""
        return self.long_phase.entries

    @entries.setter
    def entries(self, count: int) -> None:
        self.short_phase.entries = self.long_phase.entries = count

    @property
    def bytes_per_token(self) -> float | None:
        """See `Shards.bytes_per_token`."""
        return self.shards.bytes_per_token

    @property
    def left_out(self) -> int:
        """Tokens of text in no pack of long sequences."""
        return self.long_phase.left_out

    @property
    def short(self) -> int:
        """Packs of both phases that are left out because too few of their tokens can be masked."""
        return self.short_phase.short + self.long_phase.short

    @property
    def short_tokens(self) -> int:
        """Tokens of text in these packs."""
        return self.short_phase.short_tokens + self.long_phase.short_tokens

    @property
    def shortage(self) -> str:
        """Sentences about these packs; or ""."""
        return " ".join(filter(None, (self.short_phase.shortage, self.long_phase.shortage)))

    def text_of(self, number: int) -> int:
        """The number of the text in pack ``number``: the same, unless a step shows each text several times."""
        if number < self.boundary:
            return self.short_phase.text_of(number)
        return self.short_phase.text_of(self.boundary) + self.long_phase.text_of(number - self.boundary)

    def batch(self, number: int) -> PackedBatch:
        """Pack ``number`` (from 0) as CPU tensors; see `Packs.batch`."""
        if number < self.boundary:
            return self.short_phase.batch(number)
        batch = self.long_phase.batch(number - self.boundary)
        return replace(batch, number=number, source_pack=self.text_of(number))

    def epochs(self, number: int) -> float:
        """How often the text is read by the packs below ``number``, the first of a step."""
        short = min(number, self.boundary)
        return self.short_phase.epochs(short) + self.long_phase.epochs(number - short)


SourcePacks = Packs | PhasedPacks
"""The packs of one source."""
