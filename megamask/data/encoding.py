"""Documents -> ids, unit by unit: a unit is a few megabytes of text that a worker process turns into one file.

A unit is finished once its file has its final name, so finished units survive a kill. Units are joined in order, so the
bytes do not depend on the number of workers.
"""

from __future__ import annotations

import io
import json
import os
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path

import numpy as np
from jaxtyping import Int64

from megamask.data import pos_tagger, shards
from megamask.data.corpus import Document
from megamask.data.lost_text.counter import CoverageCounter
from megamask.data.lost_text.coverage import KEPT, Coverage, sum_coverage
from megamask.data.manifest import Split
from megamask.data.pos_tagger import Tagger
from megamask.data.shard_writer import EncodedDocuments
from megamask.data.tokenizer import Tokenizer, disable_parallelism, load_tokenizer, token_offsets
from megamask.data.word_boundaries import piece_starts, word_rule, word_starts
from megamask.errors import DataError
from megamask.storage import atomic_write
from megamask.storage import workdir as working

UNIT_BYTES = 2**22
MAX_WAITING_BYTES = 2**27
"""Characters in the unfinished units of all subsets; above it, the largest unit ends early."""


def encode(documents: Iterable[Document], tokenizer: Tokenizer, work: Path, workers: int, tags: str | None) -> None:
    """Write the ids of every unit of ``documents`` that is not yet in ``work``, and with ``tags`` their tags.

    Raises DataError if a worker process is killed.
    """
    (work / "units").mkdir(exist_ok=True)
    if not (work / "encoder").exists():
        with atomic_write.atomic_folder(work / "encoder") as folder:
            tokenizer.save(folder)
    if tags != pos_tagger.CONLLU:  # workers need no words
        documents = (replace(document, words=None) for document in documents)
    units = enumerate(_units(documents))
    missing = ((number, unit) for number, unit in units if not _unit_file(work, number).exists())
    workers = workers or len(os.sched_getaffinity(0))
    if workers == 1:
        _load(work, tags)
        for number, unit in missing:
            _encode_unit(work, number, unit)
        return
    pending: deque[Future] = deque()
    with working.processes(workers, _start, work, tags) as pool:
        for number, unit in missing:
            pending.append(pool.submit(_encode_unit, work, number, unit))
            if len(pending) > 2 * workers:  # limits how many units are in memory
                pending.popleft().result()
        for future in pending:
            future.result()


def _units(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """Runs of documents of one subset with about ``UNIT_BYTES`` of text."""
    units: dict[str, list[Document]] = {}
    sizes: Counter[str] = Counter()
    waiting = 0
    for document in documents:
        subset = document.subset
        units.setdefault(subset, []).append(document)
        sizes[subset] += len(document.text)
        waiting += len(document.text)
        if waiting > MAX_WAITING_BYTES:
            subset = max(sizes, key=sizes.__getitem__)
        if sizes[subset] >= UNIT_BYTES or waiting > MAX_WAITING_BYTES:
            waiting -= sizes.pop(subset)
            yield units.pop(subset)
    yield from units.values()


def _unit_file(work: Path, number: int) -> Path:
    return work / "units" / f"{number:07d}.npz"


# ---- in a worker process


_encoder: Tokenizer | None = None
_coverage: CoverageCounter | None = None
_starts: np.ndarray | None = None
"""Whether a token of each id begins a word; None if that depends on the text."""
_tagger: Tagger | None = None
_tags = False


def _start(work: Path, tags: str | None) -> None:
    disable_parallelism()
    _load(work, tags)


def _load(work: Path, tags: str | None) -> None:
    global _encoder, _coverage, _starts, _tagger, _tags
    _encoder, _tags = load_tokenizer(work / "encoder"), tags is not None
    _coverage = CoverageCounter(_encoder)
    _starts = None if word_rule(_encoder) == "pre_tokenizer" else word_starts(_encoder)
    _tagger = Tagger.load(tags) if tags not in (None, pos_tagger.CONLLU) else None


def _encode_unit(work: Path, number: int, unit: Sequence[Document]) -> None:
    """Write the ids, tags, lengths and word starts of a unit's documents, and what the tokenizer lost, by split.

    Documents without a token are left out, but their lost text is counted.
    """
    assert _encoder is not None and _coverage is not None
    texts = [document.text for document in unit]
    needs_encodings = _tags or _starts is None or _coverage.needs_encodings
    try:
        encodings = _encoder.encodings(texts) if needs_encodings else None
        encoded = [np.array(e.ids, np.int64) for e in encodings] if encodings is not None else _encoder.encode(texts)
    except DataError as error:
        raise _with_place(unit, error) from None
    tags: list[np.ndarray] = []
    if _tags:
        assert encodings is not None
        words = _tagger.words(texts) if _tagger else [document.words for document in unit]
        places = [token_offsets(encoding) for encoding in encodings]
        tags = [w.tags_of(*at.T) for w, at in zip(words, places, strict=True) if w is not None]
    arrays = {"subset": np.array(unit[0].subset if unit else "")}
    for split in shards.SPLITS:
        here = [at for at, document in enumerate(unit) if document.split == split]
        kept = [at for at in here if len(encoded[at])]
        tokens = np.concatenate([encoded[at] for at in kept]) if kept else np.empty(0, np.int64)
        lengths = np.array([len(encoded[at]) for at in kept], np.int64)
        if _starts is not None:
            starts = _starts[tokens]
        else:
            assert encodings is not None
            starts = np.concatenate([np.empty(0, bool), *(piece_starts(encodings[at]) for at in kept)])
            arrays[f"{split}_starts"] = starts
        lost = _coverage(
            [texts[at] for at in here], [encoded[at] for at in here], encodings and [encodings[at] for at in here]
        )
        arrays |= {
            f"{split}_tokens": tokens.astype(shards.id_type(_encoder.size)),
            f"{split}_lengths": lengths,
            f"{split}_without_tokens": np.array(len(here) - len(kept)),
            f"{split}_word_sizes": _word_sizes(starts, lengths),
            f"{split}_coverage": np.frombuffer(json.dumps(lost.record(KEPT)).encode(), np.uint8),
        }
        if _tags:
            arrays[f"{split}_tags"] = np.concatenate([tags[at] for at in kept]) if kept else np.empty(0, np.uint8)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    atomic_write.write_atomic(_unit_file(work, number), [buffer.getbuffer()])


def _word_sizes(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The number of words with 0, 1, 2, ... tokens. The first token of each document begins a word."""
    starts = starts.copy()
    starts[np.cumsum(lengths) - lengths] = True
    return np.bincount(np.diff(np.flatnonzero(starts), append=len(starts)))


def _with_place(unit: Sequence[Document], error: DataError) -> DataError:
    """The ``error`` of the tokenizer, with the first document and character that it cannot encode."""
    assert _encoder is not None
    for document in unit:
        if not _encodes(document.text):
            wrong = next((c for c in dict.fromkeys(document.text) if not c.isspace() and not _encodes(c)), None)
            what = f"the character {wrong!r} (U+{ord(wrong):04X})" if wrong else "a document"
            return DataError(
                f"The tokenizer cannot encode {what}, in {document.source}, in the document that begins with "
                f"{document.text[:40]!r}: {error.problems[0]} Choose a tokenizer with an unknown token or with bytes "
                "for such characters, or train one, for example with `tokenizer` bpe."
            )
    return error


def _encodes(text: str) -> bool:
    assert _encoder is not None
    try:
        _encoder.encode([text])
    except DataError:
        return False
    return True


# ---- units joined


def units_by_subset(work: Path) -> dict[str, list[Path]]:
    """The files of the units in ``work``, in order, by subset, sorted; without subsets all under ""."""
    files: dict[str, list[Path]] = {}
    for file in sorted((work / "units").glob("*.npz")):
        with np.load(file, allow_pickle=False) as unit:
            files.setdefault(str(unit["subset"]), []).append(file)
    return dict(sorted(files.items()))


def coverage(units: Sequence[Path], split: Split) -> Coverage:
    """What the tokenizer lost of a split."""
    return sum_coverage(Coverage.of_record(json.loads(unit[f"{split}_coverage"].tobytes())) for unit in _opened(units))


def word_sizes(units: Sequence[Path], split: Split) -> Int64[np.ndarray, " sizes"]:
    """The number of words of a split with 0, 1, 2, ... tokens."""
    sizes = np.zeros(1, np.int64)
    for unit in _opened(units):
        more = unit[f"{split}_word_sizes"]
        longer = max(len(sizes), len(more))
        sizes = np.pad(sizes, (0, longer - len(sizes))) + np.pad(more, (0, longer - len(more)))
    return sizes


def without_tokens(units: Sequence[Path]) -> int:
    """The number of documents without a token, in both splits."""
    return sum(int(unit[f"{split}_without_tokens"]) for unit in _opened(units) for split in shards.SPLITS)


def join_encoded(units: Sequence[Path], split: Split) -> Iterator[EncodedDocuments]:
    """The ids and lengths of each unit, in order, and its word starts if ids do not show them."""
    for unit in _opened(units):
        starts = unit.get(f"{split}_starts")
        yield EncodedDocuments(unit[f"{split}_tokens"], unit[f"{split}_lengths"], starts)


def tags_of(units: Sequence[Path], split: Split, sizes: Sequence[int]) -> Iterator[np.ndarray]:
    """The tags of each shard. ``sizes`` are the numbers of their tokens; a shard consists of whole units."""
    tags = (unit[f"{split}_tags"] for unit in _opened(units))
    for size in sizes:
        parts, count = [], 0
        while count < size:
            parts.append(next(tags))
            count += len(parts[-1])
        yield np.concatenate(parts)


def _opened(units: Sequence[Path]) -> Iterator[np.lib.npyio.NpzFile]:
    for file in units:
        with np.load(file, allow_pickle=False) as unit:
            yield unit
