"""The text of one source in phases with sequences of different length.

BERT trains 90 % of its steps on sequences of 128 tokens and the rest on 512 (Devlin et al. 2019, appendix A.2). Here a
pack has the same number of tokens in all phases, so a micro-step costs about the same, and only attention gets longer.
Each length has its own packs in their own order, which read the text from the beginning. A phase continues where the
earlier phase with the same length ended. The phase of a pack follows from its number alone, by a bisection.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence

from megamask.batch import PackedBatch
from megamask.data.packs import Packs
from megamask.schedules import RunPhases


class PhasedPacks:
    """The packs of a source in a run with ``phases``, each by its length; used like `Packs`."""

    def __init__(
        self, by_length: Mapping[int, Packs], phases: RunPhases, starts: Sequence[int], *, of_mixture: bool = False
    ):
        """``by_length``: packs of each length, opened without ``per_step`` and ``masks_per_text``. ``starts``: the
        texts of this source before each phase. ``of_mixture``: packs are read by the number of their text in this
        source, else by their number in the run.
        """
        self._phases, self._starts, self._of_mixture = phases, tuple(starts), of_mixture
        self._packs, self._lengths = dict(by_length), [phase.length for phase in phases.phases]
        self._last = last = self._packs[self._lengths[-1]]
        self._read_before: list[int] = []
        """For each phase, the texts that earlier phases read in its length."""
        read = dict.fromkeys(self._lengths, 0)
        for length, start, end in zip(self._lengths, starts, [*starts[1:], starts[-1]], strict=True):
            self._read_before.append(read[length])
            read[length] += end - start
        self.shards, self.token_ids, self.fill = last.shards, last.token_ids, last.fill
        self.entries = max(packs.entries for packs in self._packs.values())  # so that all packs have the same shapes

    def __len__(self) -> int:
        """Packs in an epoch of sequences as they are at the end of the run."""
        return len(self._last)

    @property
    def entries(self) -> int:
        """Boundaries of sequences in each pack of all phases."""
        return self._last.entries

    @entries.setter
    def entries(self, count: int) -> None:
        for packs in self._packs.values():
            packs.entries = count

    @property
    def bytes_per_token(self) -> float | None:
        """See `Shards.bytes_per_token`."""
        return self.shards.bytes_per_token

    @property
    def left_out(self) -> int:
        """Tokens of text in no pack of the last phase."""
        return self._last.left_out

    @property
    def short(self) -> int:
        """Packs of all lengths that are left out because too few of their tokens can be masked."""
        return sum(packs.short for packs in self._packs.values())

    @property
    def short_tokens(self) -> int:
        """Tokens of text in these packs."""
        return sum(packs.short_tokens for packs in self._packs.values())

    @property
    def shortage(self) -> str:
        """Sentences about these packs; or ""."""
        return " ".join(filter(None, (packs.shortage for packs in self._packs.values())))

    def text_of(self, number: int) -> int:
        """The number of the text in pack ``number``: the same, unless a step shows each text several times."""
        return number if self._of_mixture else self._phases.text_of(number)

    def batch(self, number: int) -> PackedBatch:
        """Pack ``number`` (from 0) as CPU tensors; see `Packs.batch`."""
        text = self.text_of(number)
        return self.read(text, number, text)

    def read(self, text: int, number: int, source_pack: int) -> PackedBatch:
        """The pack with text ``text`` of this source, under its numbers in the whole run; see `Packs.read`."""
        phase = bisect_right(self._starts, text) - 1
        place = text - self._starts[phase] + self._read_before[phase]
        return self._packs[self._lengths[phase]].read(place, number, source_pack)

    def epochs(self, number: int) -> float:
        """How often the text is read by the packs below ``number``, the first of a step."""
        text, ends = self.text_of(number), [*self._starts[1:], None]
        read = 0.0
        for length, start, end in zip(self._lengths, self._starts, ends, strict=True):
            read += max(0, (text if end is None else min(end, text)) - start) / len(self._packs[length])
        return read


SourcePacks = Packs | PhasedPacks
"""The packs of one source."""
