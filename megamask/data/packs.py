"""Packs: pieces of documents laid one behind the other until ``tokens`` rows are full.

A document that fits into ``length`` rows with its [CLS] and [SEP] stays whole; a longer one is cut, and its tail is
packed too. Which pieces share a pack is worked out once from the lengths of the documents, by best-fit decreasing in
windows, and does not depend on the seed; a seed and an epoch only order the packs. So pack number n is found in O(1),
and is a function of (seed, n) alone. The index costs 12 bytes a piece on disk and is mapped, not loaded; making it
runs at hundreds of millions of tokens a second, opening a pack at more than 50 million a second and core.
"""

from __future__ import annotations

import secrets
import shutil
from bisect import bisect_left, insort
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int32, Int64
from torch import Tensor

from megamask import records
from megamask.arrays import mapped, rising
from megamask.batch import Layout, PackedBatch
from megamask.data.order import Permutation
from megamask.data.shards import Shards, file_hash
from megamask.errors import ConfigError, DataError, must, raise_all

FULL = 0.9
"""A pack filled less is left out: too few rows to draw an exact budget of targets from."""
WINDOW_ROWS, WINDOW_PACKS = 2**22, 256
# part of the name of a cached index: change it with whatever changes which pieces share a pack, or what is kept
METHOD = 2
KINDS = {"starts": "int64", "sizes": "int32", "first": "int64"}
HASHES = "hashes.json"


class Packs:
    """The packs of a split, by number. Number n is pack ``n % len(self)`` of the order of epoch ``n // len(self)``."""

    def __init__(
        self, shards: Shards, *, tokens: int, length: int, seed: int, per_step: int = 1, views: int = 1
    ) -> None:
        """``tokens`` rows a pack, pieces of at most ``length`` rows; raises ConfigError, DataError.

        With ``views``, the ``per_step`` packs of a step hold ``per_step / views`` texts, each that many times.
        """
        raise_all(ConfigError, _problems(tokens, length))
        assert per_step % views == 0
        self.shards, self.tokens, self.length, self.seed = shards, tokens, length, seed
        self.per_step, self.views = per_step, views
        self.token_ids = shards.token_ids
        self._index = index = _cached_index(shards, tokens, length)
        self._check()
        rows = np.add.reduceat(index.sizes, index.first[:-1], dtype=np.int64) + 2 * np.diff(index.first)
        self.fill = float(rows.mean() / tokens)
        """Share of all rows that hold text, [CLS] or [SEP]."""
        sequences = np.diff(index.first) - (rows - tokens) // length
        self._entries = int(sequences.max()) + 1
        self._order = lru_cache(maxsize=2)(self._begin)
        self._rows = np.arange(tokens)
        self._starts_word = shards.starts_word
        self._is_text = np.ones(self.token_ids.size, bool)
        self._is_text[list(self.token_ids.special)] = False
        self._sidecars = {name: shards.sidecar(name) for name in ("tags", "entropy")}

    def __len__(self) -> int:
        """Packs in an epoch."""
        return len(self._index.first) - 1

    @property
    def left_out(self) -> int:
        """Tokens of text in no pack, because theirs was filled under 90 %."""
        return self.shards.tokens - int(self._index.sizes.sum(dtype=np.int64))

    def text_of(self, number: int) -> int:
        """The number of the text that pack ``number`` holds: its own, unless a step shows each text several times."""
        if self.views == 1:
            return number
        step, place = divmod(number, self.per_step)
        texts = self.per_step // self.views
        return step * texts + place % texts

    def batch(self, number: int) -> PackedBatch:
        """Pack ``number`` (from 0, over all epochs) as CPU tensors.

        Rows left over are sequences of [PAD] of at most ``length`` rows. Special tokens are not maskable; they begin
        words, as does the first token of each piece. Sidecars hold 0 at special tokens.
        """
        places, begins, ends = self._stream(number)
        used = len(places)

        tokens = np.full(self.tokens, self.token_ids.pad, np.int64)
        tokens[:used] = self.shards.read(self.shards.parts, places)
        tokens[begins], tokens[ends - 1] = self.token_ids.cls, self.token_ids.sep
        try:
            starts_word, maskable = self._starts_word[tokens], self._is_text[tokens]
        except IndexError:
            raise self.shards.stray(places) from None
        starts_word[begins + 1] = True

        padding = np.arange(used, self.tokens, self.length)
        begins = np.concatenate([begins, padding])
        cu_seqlens = np.full(self._entries, self.tokens, np.int32)
        cu_seqlens[: len(begins)] = begins
        positions = self._rows - np.repeat(begins, np.diff(begins, append=self.tokens))
        layout = Layout(torch.from_numpy(cu_seqlens), self.length, torch.from_numpy(positions.astype(np.int32)))
        return PackedBatch(
            number, torch.from_numpy(tokens), layout, torch.from_numpy(starts_word), torch.from_numpy(maskable),
            **{name: self._beside(parts, places, maskable) for name, parts in self._sidecars.items()},
            text=self.text_of(number),
        )  # fmt: skip

    def places(self, number: int) -> Int64[Tensor, " T"]:
        """Where each row of pack ``number`` stands in the split's stream of tokens; -1 for a row that is no text."""
        inside, begins, ends = self._stream(number)
        inside[begins] = inside[ends - 1] = -1
        places = np.full(self.tokens, -1)
        places[: len(inside)] = inside
        return torch.from_numpy(places)

    def _begin(self, epoch: int) -> Permutation:
        """The order of an epoch. A file that became shorter since would kill the process without a word: SIGBUS."""
        self.shards.check_sizes()
        return Permutation(len(self), seed=self.seed, epoch=epoch)

    def _stream(self, number: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The place in the stream of tokens of each row up to the padding; where the pieces of the pack begin and end.

        [CLS] and [SEP] look at their piece's first token.
        """
        epoch, place = divmod(self.text_of(number), len(self))
        pack = self._order(epoch)[place]
        pieces = slice(self._index.first[pack], self._index.first[pack + 1])
        sizes, starts = self._index.sizes[pieces].astype(np.int64), self._index.starts[pieces]
        ends = np.cumsum(sizes + 2)
        begins = ends - sizes - 2
        places = np.repeat(starts - begins - 1, sizes + 2) + self._rows[: ends[-1]]
        places[begins] = places[ends - 1] = starts
        return places, begins, ends

    def _beside(self, parts, places: np.ndarray, maskable: np.ndarray) -> Tensor | None:
        if parts is None:
            return None
        values = np.zeros(self.tokens, np.uint8)
        values[: len(places)] = self.shards.read(parts, places)
        return torch.from_numpy(values * maskable)

    def _check(self) -> None:
        """Refuse a text that makes no pack, or leaves out much of it."""
        found, lost = self.shards.tokens, self.left_out
        if found < self.tokens and len(self) == 0:
            raise DataError(
                f"{self.shards.folder} holds {found} tokens in the split {self.shards.split!r}, fewer than one pack "
                f"of {self.tokens}. Give more text, or smaller packs."
            )
        # poorly filled packs end every text; many of them mean that its pieces do not fit together
        if len(self) == 0 or lost > max(4 * self.tokens, found // 4):
            raise DataError(
                f"Packs of {self.tokens} rows cannot be filled to {FULL:.0%} with pieces of at most {self.length} rows "
                f"of {self.shards.folder}: {lost} of {found} tokens would be left out. Make packs longer."
            )


def _problems(tokens: int, length: int) -> list[str]:
    found = []
    if length < 3:
        found.append(must("length", "be at least 3, for [CLS], a token and [SEP]", length))
    if not length <= tokens < 2**31:
        found.append(must("tokens", f"lie between the length of a sequence ({length}) and 2**31", tokens))
    return found


# ---- the index: which pieces make a pack


@dataclass(frozen=True)
class Index:
    """Pieces, sorted by pack: where each begins in the stream of tokens, how many tokens it has; each pack's first."""

    starts: Int64[np.ndarray, " pieces"]
    sizes: Int32[np.ndarray, " pieces"]
    first: Int64[np.ndarray, " packs1"]


def _cached_index(shards: Shards, tokens: int, length: int) -> Index:
    """The index kept beside the shards, or a new one, which is kept if the folder can be written."""
    name = f"{shards.split}-{tokens}-{length}-{METHOD}-{shards.fingerprint[:16]}"
    folder = shards.folder / "packs" / name
    with suppress(Exception):  # not there, or damaged, of which a parser may raise of every kind
        return _load(folder, shards.tokens, tokens, length)
    index = make_index(shards, tokens=tokens, length=length)
    if len(index.first) > 1:
        _keep(index, folder)
    return index


def _load(folder: Path, text: int, tokens: int, length: int) -> Index:
    """The index in ``folder``, whole and of packs that can be; one flipped bit would be another text."""
    hashes = records.read_json(folder / HASHES)
    found = []
    for name, kind in KINDS.items():
        if file_hash(folder / f"{name}.npy") != hashes[name]:
            raise ValueError(name)
        array = mapped(folder / f"{name}.npy")
        if array.dtype != kind or array.ndim != 1:
            raise ValueError(name)
        found.append(array)
    starts, sizes, first = found
    rows = np.add.reduceat(sizes, first[:-1], dtype=np.int64) + 2 * np.diff(first)
    if not (
        len(starts) == len(sizes) == first[-1] and first[0] == 0 and rising(first, strictly=True)
        and sizes.min() > 0 and sizes.max() <= length - 2
        and starts.min() >= 0 and (starts <= np.int64(text) - sizes).all() and rows.max() <= tokens
    ):  # fmt: skip
        raise ValueError(folder)
    return Index(starts, sizes, first)


def _keep(index: Index, folder: Path) -> None:
    beside = folder.with_name(f".{secrets.token_hex(8)}")
    try:
        beside.mkdir(parents=True)
        hashes = {}
        for name in KINDS:
            np.save(beside / f"{name}.npy", getattr(index, name), allow_pickle=False)
            hashes[name] = file_hash(beside / f"{name}.npy")
        (beside / HASHES).write_bytes(records.as_json(hashes))
        if folder.exists():
            shutil.rmtree(folder)  # damaged; whoever has it open keeps it
        beside.rename(folder)
    except OSError:  # read-only, full, or another process was first: the index in memory does as well
        shutil.rmtree(beside, ignore_errors=True)


def make_index(shards: Shards, *, tokens: int, length: int) -> Index:
    """Pack all pieces of ``shards``, window by window.

    Packs that stay under 90 % are packed again with the next window; those of the last are left out.
    """
    window_rows = max(WINDOW_ROWS, WINDOW_PACKS * tokens)
    kept: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    over = np.empty(0, np.int64), np.empty(0, np.int64)
    for window in windows(pieces(shards, length), window_rows):
        starts, sizes = (np.concatenate(pair) for pair in zip(over, window, strict=True))
        pack = best_fit(sizes + 2, tokens)
        rows = np.bincount(pack, weights=sizes + 2)
        full = rows >= FULL * tokens
        in_order = np.argsort(pack, kind="stable")
        in_order = in_order[full[pack[in_order]]]
        kept.append((starts[in_order], sizes[in_order], np.bincount(pack, minlength=len(rows))[full]))
        again = ~full[pack]
        # pieces that do not fit together in one window will not in the next: do not gather them without end
        over = (starts[again], sizes[again]) if rows[~full].sum() < window_rows / 2 else (starts[:0], sizes[:0])
    starts, sizes, counts = (np.concatenate(column) for column in zip(*kept, strict=True))
    return Index(starts, sizes.astype(np.int32), np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))


Pieces = tuple[np.ndarray, np.ndarray]
"""Where pieces begin in the stream of tokens, and how many tokens each has; both int64."""


def pieces(shards: Shards, length: int) -> Iterator[Pieces]:
    """The pieces of each shard, in the order of the text."""
    body = length - 2
    for shard, offsets in zip(shards.starts, shards.offsets(), strict=False):
        lengths = np.diff(offsets)
        counts = -(-lengths // body)
        cut = body * (np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts))
        yield shard + np.repeat(offsets[:-1], counts) + cut, np.minimum(body, np.repeat(lengths, counts) - cut)


def windows(shards: Iterator[Pieces], rows: int) -> Iterator[Pieces]:
    """Runs of consecutive pieces with about ``rows`` rows."""
    for starts, sizes in shards:
        ends = np.cumsum(sizes + 2)
        total = int(ends[-1]) if len(ends) else 0
        cuts = np.searchsorted(ends, np.arange(0, total, rows), side="left")
        for begin, end in zip(cuts, [*cuts[1:], len(sizes)], strict=True):
            yield starts[begin:end], sizes[begin:end]


def best_fit(rows: Int64[np.ndarray, " n"], capacity: int) -> Int64[np.ndarray, " n"]:
    """Best-fit decreasing: the number of the pack that each piece of ``rows`` rows goes into.

    From the largest piece to the smallest, each goes where it leaves the least room. Pieces of one size and packs of
    one room are treated at once, so the cost depends on how many sizes there are, not on how many pieces.
    """
    order = np.argsort(-rows, kind="stable")
    sizes, counts = np.unique(rows, return_counts=True)
    pack_of = np.empty(len(rows), np.int64)
    open_packs: dict[int, list[np.ndarray]] = {}
    rooms: list[int] = []  # the keys of open_packs, ascending

    def leave(room: int, packs: np.ndarray) -> None:
        if len(packs) and room:
            if room not in open_packs:
                insort(rooms, room)
            open_packs.setdefault(room, []).append(packs)

    begun = placed = 0
    for size, count in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count:
            at = bisect_left(rooms, size)
            if at < len(rooms):
                room = rooms.pop(at)
                packs = np.concatenate(open_packs.pop(room))
            else:
                room = capacity
                packs = np.arange(begun, begun - (-count // (capacity // size)))
                begun += len(packs)
            each = room // size
            used = min(len(packs), -(-count // each))
            now = min(count, used * each)
            pack_of[order[placed : placed + now]] = np.repeat(packs[:used], each)[:now]
            last = now - (used - 1) * each
            leave(room - each * size, packs[: used - 1])
            leave(room - last * size, packs[used - 1 : used])
            leave(room, packs[used:])
            placed, count = placed + now, count - now
    return pack_of
