"""Packs: pieces of documents one after the other, until a pack has ``tokens`` tokens.

A document that fits into ``length`` tokens with its [CLS] and [SEP] stays whole; a longer one is cut, and its tail is
packed too. The index (`data.index`) says which pieces share a pack; seed and epoch only order the packs. So pack number
n is found in O(1) and depends on nothing but (seed, n). Opening packs runs at more than 50 million tokens a second and
core.

Every pack of a step has the same number of targets. A pack with fewer tokens that can be masked (its text is [UNK], or
very short documents with their [CLS] and [SEP]) is left out, and another is read instead. Which packs are left out is
known when the packs are opened. The numbers and the order of all others stay the same.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from megamask.batch import Layout, PackedBatch
from megamask.data import validation_share
from megamask.data.index import FULL, cached_index, is_text
from megamask.data.order import Permutation
from megamask.data.shards import Shards
from megamask.errors import ConfigError, DataError, must, raise_all
from megamask.schedules import text_number


class Packs:
    """The packs of a split, by number. Number n is pack ``n % len(self)`` of the order of epoch ``n // len(self)``."""

    def __init__(
        self,
        shards: Shards,
        *,
        tokens: int,
        length: int,
        seed: int,
        per_step: int = 1,
        masks_per_text: int = 1,
        targets: int = 0,
        store: bool = True,
    ) -> None:
        """Packs of ``tokens`` tokens, from pieces of at most ``length`` tokens. Raises ConfigError, DataError.

        The ``per_step`` packs of a step contain ``per_step / masks_per_text`` texts, each ``masks_per_text`` times.
        ``targets`` is the largest number of targets in a pack: packs with fewer tokens that can be masked are left
        out. If they are more than a quarter, DataError says why. ``store``: a new index is stored beside the shards.
        """
        raise_all(ConfigError, _problems(tokens, length))
        assert per_step % masks_per_text == 0
        self.shards, self.tokens, self.length, self.seed = shards, tokens, length, seed
        self.per_step, self.masks_per_text = per_step, masks_per_text
        self.token_ids = shards.token_ids
        self._index = index = cached_index(shards, tokens, length, store=store)
        self._check()
        rows = index.rows
        self.targets = targets
        enough = index.maskable >= targets
        self._short, self._kept = np.flatnonzero(~enough), np.flatnonzero(enough)
        if len(self._short) > max(1, len(self) // 4) or not len(self._kept):
            raise DataError(f"{self.shortage} {self._cure()}")
        self.fill = float(rows.mean() / tokens)
        """Share of all tokens that are text, [CLS] or [SEP]."""
        sequences = np.diff(index.first) - (rows - tokens) // length
        self.entries = int(sequences.max()) + 1
        """Boundaries of sequences in each pack; those that a pack does not need are repeats of its end."""
        self._order = lru_cache(maxsize=2)(self._begin)
        self._rows = _shared(np.arange(tokens))
        self._starts_word, self._is_text = _shared(shards.starts_word), _shared(is_text(shards))
        self._word_parts = shards.word_parts
        self._sidecars = shards.sidecar("tags"), shards.sidecar("entropy")

    def __len__(self) -> int:
        """Packs in an epoch."""
        return len(self._index.first) - 1

    @property
    def bytes_per_token(self) -> float | None:
        """See `Shards.bytes_per_token`."""
        return self.shards.bytes_per_token

    @property
    def left_out(self) -> int:
        """Tokens of text in no pack, because less than 90 % of their pack was filled."""
        return self.shards.tokens - int(self._index.sizes.sum(dtype=np.int64))

    @property
    def short(self) -> int:
        """Packs that are left out because too few of their tokens can be masked."""
        return len(self._short)

    @property
    def short_tokens(self) -> int:
        """Tokens of text in these packs."""
        rows = self._index.rows - 2 * np.diff(self._index.first)
        return int(rows[self._short].sum())

    @property
    def shortage(self) -> str:
        """Sentences about the packs that are left out because too few of their tokens can be masked; or ""."""
        if not self.short:
            return ""
        index, least = self._index, int(self._index.maskable.argmin())
        pieces = slice(index.first[least], index.first[least + 1])
        sequences, text = pieces.stop - pieces.start, int(index.sizes[pieces].sum())
        free, spare = int(index.maskable[least]), self.tokens - text - 2 * sequences
        document = self.shards.document(int(index.starts[pieces][self._least_maskable_piece(least)]))
        return (
            f"{self.short:,} of {len(self):,} packs of the split {self.shards.split!r} of {self.shards.folder} have "
            f"fewer than {self.targets} tokens that can be masked, the number of targets. The pack with the fewest has "
            f"{free}: it contains {document}, and of its {self.tokens} tokens {text - free} are [UNK] or another "
            f"special token of the text, {2 * sequences} are [CLS] and [SEP] of {sequences} pieces of documents, "
            f"{spare} are padding."
        )

    def text_of(self, number: int) -> int:
        """The number of the text in pack ``number``: the same, unless a step shows each text several times."""
        return text_number(number, self.per_step, self.masks_per_text)

    def epochs(self, number: int) -> float:
        """How often the text is read by the packs below ``number``, the first of a step."""
        return self.text_of(number) / len(self)

    def batch(self, number: int) -> PackedBatch:
        """Pack ``number`` (from 0, over all epochs) as CPU tensors."""
        text = self.text_of(number)
        return self.read(text, number, text)

    def read(self, text: int, number: int, source_pack: int) -> PackedBatch:
        """The pack with text ``text`` (from 0, over all epochs) of this source, under its numbers in the whole run.

        The rest of a pack is sequences of at most ``length`` [PAD]. Special tokens are not maskable. [CLS], [SEP] and
        [PAD] begin words, as does the first token of each piece. Sidecars are 0 at special tokens.
        """
        places, begins, ends = self._stream(text)
        used = len(places)

        tokens = np.full(self.tokens, self.token_ids.pad, np.int64)
        tokens[:used] = self.shards.read(self.shards.parts, places)
        tokens[begins], tokens[ends - 1] = self.token_ids.cls, self.token_ids.sep
        try:
            starts_word, maskable = self._starts_word[tokens], self._is_text[tokens]
        except IndexError:
            raise self.shards.invalid_id_error(places) from None
        if self._word_parts is not None:
            starts_word[:used] = self.shards.read(self._word_parts, places)
        starts_word[begins] = starts_word[begins + 1] = starts_word[ends - 1] = True

        padding = np.arange(used, self.tokens, self.length)
        begins = np.concatenate([begins, padding])
        cu_seqlens = np.full(self.entries, self.tokens, np.int32)
        cu_seqlens[: len(begins)] = begins
        layout = Layout.of(torch.from_numpy(cu_seqlens), self.tokens, self.length)
        tags, entropy = (self._sidecar_values(parts, places, maskable) for parts in self._sidecars)
        return PackedBatch(
            number, torch.from_numpy(tokens), layout, torch.from_numpy(starts_word), torch.from_numpy(maskable),
            tags, entropy, source_pack,
        )  # fmt: skip

    def _begin(self, epoch: int) -> Permutation:
        """The order of an epoch. Checks sizes first: a file that became shorter would kill the process by SIGBUS."""
        self.shards.check_sizes()
        return Permutation(len(self), seed=self.seed, epoch=epoch)

    def _stream(self, text: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The place in the stream of each token up to the padding; where the pieces of the pack begin and end.

        [CLS] and [SEP] have the place of the first token of their piece.
        """
        epoch, place = divmod(text, len(self))
        pack = self._replacement(self._order(epoch)[place], epoch)
        pieces = slice(self._index.first[pack], self._index.first[pack + 1])
        sizes, starts = self._index.sizes[pieces].astype(np.int64), self._index.starts[pieces]
        ends = np.cumsum(sizes + 2)
        begins = ends - sizes - 2
        places = np.repeat(starts - begins - 1, sizes + 2) + self._rows[: ends[-1]]
        places[begins] = places[ends - 1] = starts
        return places, begins, ends

    def _replacement(self, pack: int, epoch: int) -> int:
        """``pack``, or the one that is read instead: spread evenly over all others, and different in each epoch."""
        rank = int(np.searchsorted(self._short, pack))
        if rank == self.short or self._short[rank] != pack:
            return pack
        stride = len(self._kept) // self.short
        return int(self._kept[(rank * max(1, stride) + epoch) % len(self._kept)])

    def _least_maskable_piece(self, pack: int) -> int:
        """The place in ``pack`` of the piece with the smallest share of tokens that can be masked; for a message."""
        index = self._index
        shares = []
        for piece in range(index.first[pack], index.first[pack + 1]):
            start, size = index.starts[piece], index.sizes[piece]
            tokens = self.shards.read(self.shards.parts, np.arange(start, start + size))
            shares.append(is_text(self.shards)[tokens].sum() / (size + 2))
        return int(np.argmin(shares))

    def _cure(self) -> str:
        """The cure for a text that leaves out too many packs."""
        index = self._index
        special = 2 * int(index.first[-1])
        lost = int(index.sizes.sum(dtype=np.int64)) - int(index.maskable.sum(dtype=np.int64))
        fits = int(np.sort(index.maskable)[len(self) // 4])
        cure = (
            "Prepare the text with a tokenizer that knows its characters" if lost > special
            else "Join short documents"
        )  # fmt: skip
        if self.shards.split == "valid" or not fits:
            return f"{cure}."
        return f"{cure}, or keep `masking.ratio` at {int(1000 * fits / self.tokens) / 1000} or below at all times."

    def _sidecar_values(self, parts, places: np.ndarray, maskable: np.ndarray) -> Tensor | None:
        if parts is None:
            return None
        values = np.zeros(self.tokens, np.uint8)
        values[: len(places)] = self.shards.read(parts, places)
        return torch.from_numpy(values * maskable)

    def _check(self) -> None:
        """DataError for a text that gives no pack, or much of which is left out."""
        total, lost = self.shards.tokens, self.left_out
        if total < self.tokens and len(self) == 0:
            raise DataError(
                f"{self.shards.folder} has {total} tokens in the split {self.shards.split!r}, fewer than one pack "
                f"of {self.tokens}. "
                + (
                    validation_share.validation_cure(self.shards.manifest, self.tokens)
                    if self.shards.split == "valid"
                    else "Give more text, or smaller packs (`--packs.tokens`)."
                )
            )
        # every text ends with poorly filled packs; many of them mean that its pieces do not fit together
        if len(self) == 0 or lost > max(4 * self.tokens, total // 4):
            raise DataError(
                f"Packs of {self.tokens} tokens cannot be filled to {FULL:.0%} with pieces of at most {self.length} "
                f"tokens of {self.shards.folder}: {lost} of {total} tokens would be left out. Make packs longer."
            )


def _shared(table: np.ndarray) -> np.ndarray:
    """``table`` as a read-only array, one for all equal tables: so the sources of a mixture share the CPU's cache."""
    return _array(table.dtype.str, table.tobytes())


@lru_cache(maxsize=8)
def _array(kind: str, content: bytes) -> np.ndarray:
    return np.frombuffer(content, kind)


def _problems(tokens: int, length: int) -> list[str]:
    problems = []
    if length < 3:
        problems.append(must("length", "be at least 3, for [CLS], a token and [SEP]", length))
    if not length <= tokens < 2**31:
        problems.append(must("tokens", f"lie between the length of a sequence ({length}) and 2**31", tokens))
    return problems
