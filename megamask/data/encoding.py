"""Documents -> ids, unit by unit: a unit is a few megabytes of text that a worker process turns into one file.

A unit counts once its file has its name, so what is finished outlives a kill. Units are joined in their order, so the
bytes do not depend on the number of workers.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import numpy as np

from megamask import work as working
from megamask.data import shards, tagger
from megamask.data.intake import Document
from megamask.data.shards import Split, Unit
from megamask.data.tagger import Tagger
from megamask.data.tokenizer import Tokenizer, load, quiet

UNIT_BYTES = 2**22


def encode(documents: Iterable[Document], tokenizer: Tokenizer, work: Path, workers: int, tags: str | None) -> None:
    """Write the ids of every unit of ``documents`` that is not yet in ``work``; with ``tags``, their tags too.

    Raises DataError if a worker process is killed.
    """
    (work / "units").mkdir(exist_ok=True)
    if not (work / "encoder").exists():
        tokenizer.save(work / "encoder.part")
        (work / "encoder.part").rename(work / "encoder")
    if tags != tagger.GIVEN:  # workers need no words
        documents = (replace(document, words=None) for document in documents)
    units = enumerate(_units(documents))
    missing = ((number, unit) for number, unit in units if not _unit_file(work, number).exists())
    workers = workers or len(os.sched_getaffinity(0))
    if workers == 1:
        _load(work, tags)
        for number, unit in missing:
            _encode_unit(work, number, unit)
        return
    under_way: deque[Future] = deque()
    with working.processes(workers, _start, work, tags) as pool:
        for number, unit in missing:
            under_way.append(pool.submit(_encode_unit, work, number, unit))
            if len(under_way) > 2 * workers:  # no more is read ahead
                under_way.popleft().result()
        for future in under_way:
            future.result()


def _units(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Runs of documents with about ``UNIT_BYTES`` of text."""
    unit: list[Document] = []
    size = 0
    for document in documents:
        unit.append(document)
        size += len(document.text)
        if size >= UNIT_BYTES:
            yield unit
            unit, size = [], 0
    if unit:
        yield unit


def _unit_file(work: Path, number: int) -> Path:
    return work / "units" / f"{number:07d}.npz"


# ---- in a worker process


_encoder: Tokenizer | None = None
_tagger: Tagger | None = None
_tags = False


def _start(work: Path, tags: str | None) -> None:
    quiet()
    _load(work, tags)


def _load(work: Path, tags: str | None) -> None:
    global _encoder, _tagger, _tags
    _encoder, _tags = load(work / "encoder"), tags is not None
    _tagger = Tagger.load(tags) if tags not in (None, tagger.GIVEN) else None


def _encode_unit(work: Path, number: int, unit: Sequence[Document]) -> None:
    """Write the ids, tags and lengths of a unit's documents, by split; documents without a token are left out."""
    assert _encoder is not None
    texts = [document.text for document in unit]
    tags: list[np.ndarray] = []
    if _tags:
        places = _encoder.encode_with_places(texts)
        encoded = [ids for ids, _ in places]
        words = _tagger.words(texts) if _tagger else [document.words for document in unit]
        tags = [w.tags_of(*at.T) for w, (_, at) in zip(words, places, strict=True) if w is not None]
    else:
        encoded = _encoder.encode(texts)
    arrays: dict[str, np.ndarray] = {}
    for split in shards.SPLITS:
        here = [at for at, document in enumerate(unit) if document.split == split]
        kept = [at for at in here if len(encoded[at])]
        tokens = np.concatenate([encoded[at] for at in kept]) if kept else np.empty(0, np.int64)
        arrays |= {
            f"{split}_tokens": tokens.astype(shards.id_type(_encoder.size)),
            f"{split}_lengths": np.array([len(encoded[at]) for at in kept], np.int64),
            f"{split}_without_tokens": np.array(len(here) - len(kept)),
        }
        if _tags:
            arrays[f"{split}_tags"] = np.concatenate([tags[at] for at in kept]) if kept else np.empty(0, np.uint8)
    file = _unit_file(work, number)
    beside = file.with_suffix(f".{os.getpid()}")
    with beside.open("wb") as opened:
        np.savez(opened, **arrays)  # type: ignore[arg-type]
        opened.flush()
        os.fsync(opened.fileno())
    beside.rename(file)


# ---- units joined


def without_tokens(work: Path) -> int:
    """How many documents had no token, in both splits."""
    return sum(int(unit[f"{split}_without_tokens"]) for unit in _opened(work) for split in shards.SPLITS)


def joined(work: Path, split: Split) -> Iterator[Unit]:
    """The ids and lengths of each unit, in order."""
    return ((unit[f"{split}_tokens"], unit[f"{split}_lengths"]) for unit in _opened(work))


def tags_of(work: Path, split: Split, sizes: Sequence[int]) -> Iterator[np.ndarray]:
    """The tags of each shard, of which ``sizes`` are the tokens; a shard holds whole units."""
    units = (unit[f"{split}_tags"] for unit in _opened(work))
    for size in sizes:
        some, count = [], 0
        while count < size:
            some.append(next(units))
            count += len(some[-1])
        yield np.concatenate(some)


def _opened(work: Path) -> Iterator[np.lib.npyio.NpzFile]:
    for file in sorted((work / "units").glob("*.npz")):
        with np.load(file, allow_pickle=False) as found:
            yield found
