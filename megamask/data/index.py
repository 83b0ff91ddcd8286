"""The index of a split: which pieces of documents make a pack, and how many tokens of each pack can be masked.

It is computed once from the lengths of the documents, by best-fit decreasing in windows, and from one reading of their
tokens. It depends on neither seed nor epoch. It takes 12 bytes for a piece and 12 for a pack on disk, is stored beside
the shards with its hashes, and is memory-mapped. With several ranks, rank 0 makes it and the others open it.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int32, Int64

from megamask.data.shards import Shards
from megamask.runtime import ranks
from megamask.storage import strict_json
from megamask.storage.atomic_write import atomic_folder, write_atomic
from megamask.storage.file_list import sha256
from megamask.storage.npy import is_increasing, map_array, save_array

FULL = 0.9
"""Packs with a smaller share of text are left out: they have too few tokens for an exact budget of targets."""
WINDOW_ROWS, WINDOW_PACKS = 2**22, 256
# part of the name of a stored index: increase it when the choice of pieces that share a pack changes
METHOD = 2
KINDS = {"starts": "int64", "sizes": "int32", "first": "int64", "maskable": "int32"}
HASHES = "hashes.json"


@dataclass(frozen=True)
class PackIndex:
    """Pieces, sorted by pack: where each begins in the stream of tokens, how many tokens it has; each pack's first.

    ``maskable`` counts, for each pack, the tokens of its text that are not special: those that can be masked.
    """

    starts: Int64[np.ndarray, " pieces"]
    sizes: Int32[np.ndarray, " pieces"]
    first: Int64[np.ndarray, " packs1"]
    maskable: Int32[np.ndarray, " packs"]

    @property
    def rows(self) -> Int64[np.ndarray, " packs"]:
        """The number of tokens of each pack that are text, [CLS] or [SEP]."""
        return np.add.reduceat(self.sizes, self.first[:-1], dtype=np.int64) + 2 * np.diff(self.first)


def is_text(shards: Shards) -> Bool[np.ndarray, " V"]:
    """For each token id, whether it is not special, so that a token of it can be masked."""
    text = np.ones(shards.token_ids.size, bool)
    text[list(shards.token_ids.special)] = False
    return text


def cached_index(shards: Shards, tokens: int, length: int, *, store: bool = True) -> PackIndex:
    """The index stored beside the shards, or a new one, which rank 0 stores if it can write the folder and ``store``.

    Raises DataError for a token id outside of the vocabulary.
    """
    name = f"{shards.split}-{tokens}-{length}-{METHOD}-{shards.fingerprint[:16]}"
    folder = shards.folder / "packs" / name
    with suppress(Exception):  # it is missing or damaged, for which parsers raise errors of many kinds
        return _load(folder, shards.tokens, tokens, length)
    index = make_index(shards, tokens=tokens, length=length)
    if store and len(index.first) > 1 and ranks.is_main():
        _store(index, folder)
    return index


def _load(folder: Path, text_tokens: int, tokens: int, length: int) -> PackIndex:
    """The index in ``folder``, after a check of every hash and value. ValueError or OSError if it is not valid."""
    hashes = strict_json.read_json(folder / HASHES)
    arrays = []
    for name, kind in KINDS.items():
        if sha256(folder / f"{name}.npy") != hashes[name]:
            raise ValueError(name)
        array = map_array(folder / f"{name}.npy")
        if array.dtype != kind or array.ndim != 1:
            raise ValueError(name)
        arrays.append(array)
    index = PackIndex(*arrays)
    starts, sizes, first, maskable = arrays
    if not (
        len(starts) == len(sizes) == first[-1] and first[0] == 0 and is_increasing(first, strictly=True)
        and sizes.min() > 0 and sizes.max() <= length - 2
        and starts.min() >= 0 and (starts <= np.int64(text_tokens) - sizes).all() and index.rows.max() <= tokens
        and len(maskable) == len(first) - 1
        and maskable.min() >= 0 and (maskable <= index.rows - 2 * np.diff(first)).all()
    ):  # fmt: skip
        raise ValueError(folder)
    return index


def _store(index: PackIndex, folder: Path) -> None:
    # if the folder cannot be written, the run uses the index in memory
    with suppress(OSError), atomic_folder(folder) as temporary:
        hashes = {name: save_array(temporary / f"{name}.npy", getattr(index, name)).sha256 for name in KINDS}
        write_atomic(temporary / HASHES, strict_json.to_json(hashes))


def make_index(shards: Shards, *, tokens: int, length: int) -> PackIndex:
    """Pack all pieces of ``shards``, window by window.

    Packs that stay under 90 % are packed again with the next window; those of the last are left out.
    """
    window_rows = max(WINDOW_ROWS, WINDOW_PACKS * tokens)
    kept: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    over = np.empty(0, np.int64), np.empty(0, np.int64)
    for window in windows(document_pieces(shards, length), window_rows):
        starts, sizes = (np.concatenate(pair) for pair in zip(over, window, strict=True))
        pack = best_fit(sizes + 2, tokens)
        rows = np.bincount(pack, weights=sizes + 2)
        full = rows >= FULL * tokens
        in_order = np.argsort(pack, kind="stable")
        in_order = in_order[full[pack[in_order]]]
        kept.append((starts[in_order], sizes[in_order], np.bincount(pack, minlength=len(rows))[full]))
        again = ~full[pack]
        # pieces that do not fit together in one window will not fit in the next: keeping all would fill the memory
        over = (starts[again], sizes[again]) if rows[~full].sum() < window_rows / 2 else (starts[:0], sizes[:0])
    starts, sizes, counts = (np.concatenate(column) for column in zip(*kept, strict=True))
    first = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
    every, free = _maskable(shards, length)
    maskable = np.add.reduceat(free[np.searchsorted(every, starts)], first[:-1], dtype=np.int32)
    return PackIndex(starts, sizes.astype(np.int32), first, maskable)


def _maskable(shards: Shards, length: int) -> tuple[Int64[np.ndarray, " n"], Int32[np.ndarray, " n"]]:
    """Where each piece of the split begins, ascending, and how many of its tokens can be masked."""
    table = is_text(shards)
    begins, counts = [np.empty(0, np.int64)], [np.empty(0, np.int32)]
    for starts, sizes in windows(document_pieces(shards, length), WINDOW_ROWS):
        shard = int(np.searchsorted(shards.starts, starts[0], side="right")) - 1
        first, end = starts[0] - shards.starts[shard], starts[-1] + sizes[-1] - shards.starts[shard]
        try:
            free = table[shards.parts[shard][first:end]]  # pieces follow each other without a gap
        except IndexError:
            raise shards.invalid_id_error(np.arange(starts[0], starts[-1] + sizes[-1])) from None
        begins.append(starts)
        counts.append(np.add.reduceat(free, starts - starts[0], dtype=np.int32))
    return np.concatenate(begins), np.concatenate(counts)


Pieces = tuple[np.ndarray, np.ndarray]
"""Where pieces begin in the stream of tokens, and how many tokens each has; both int64."""


def document_pieces(shards: Shards, length: int) -> Iterator[Pieces]:
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

    From the largest piece to the smallest, each goes into the pack where it leaves the least space. Pieces of one size
    and packs of one space are handled together, so the cost depends on the number of sizes, not of pieces.
    """
    order = np.argsort(-rows, kind="stable")
    sizes, counts = np.unique(rows, return_counts=True)
    pack_of = np.empty(len(rows), np.int64)
    open_packs: dict[int, list[np.ndarray]] = {}
    spaces: list[int] = []  # the keys of open_packs, ascending

    def leave(space: int, packs: np.ndarray) -> None:
        if len(packs) and space:
            if space not in open_packs:
                insort(spaces, space)
            open_packs.setdefault(space, []).append(packs)

    begun = placed = 0
    for size, count in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while count:
            at = bisect_left(spaces, size)
            if at < len(spaces):
                space = spaces.pop(at)
                packs = np.concatenate(open_packs.pop(space))
            else:
                space = capacity
                packs = np.arange(begun, begun - (-count // (capacity // size)))
                begun += len(packs)
            each = space // size
            used = min(len(packs), -(-count // each))
            now = min(count, used * each)
            pack_of[order[placed : placed + now]] = np.repeat(packs[:used], each)[:now]
            last = now - (used - 1) * each
            leave(space - each * size, packs[: used - 1])
            leave(space - last * size, packs[used - 1 : used])
            leave(space, packs[used:])
            placed, count = placed + now, count - now
    return pack_of
