"""The story of preparation: raw text -> tokenizer -> shards.

One process reads, cleans, drops duplicates and splits; worker processes turn units of a few megabytes of text into
ids; at the end the units are joined into shards, in order. So the bytes do not depend on the number of workers. What
is finished is kept in a hidden folder beside the output, so a killed preparation goes on where it was; the output
appears whole, by a rename. Costs: reading runs at 20 to 100 MB of text a second and encoding at about 3 MB a second
and worker; a new tokenizer needs a second reading; memory for duplicates is about 100 bytes a document.

With `tags` the units have a part of speech for each token too, which becomes a sidecar of the shards; the shards and
their fingerprint are the same with and without. A spaCy pipeline then sets the pace: about 0.1 MB a second and worker.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import heapq
import json
import multiprocessing
import os
import shutil
import threading
from collections import Counter, deque
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Literal, get_args

import numpy as np
from tqdm import tqdm

from megamask.data import local_text, shards, tagger, text
from megamask.data.conllu import Tagged
from megamask.data.shards import Shards, Split, Unit
from megamask.data.tagger import Tagger, Words
from megamask.data.text import Bad, Reading, Source
from megamask.data.tokenizer import Kind, Tokenizer, load, quiet, token_ids, train
from megamask.errors import ConfigError, DataError, StorageError, must, raise_all

UNIT_BYTES = 2**22
VOCAB_SIZE = 32_768
FEW = 10_000
"""Documents below which `bad_share` is of this many."""
# part of the identity of a result: change it with whatever changes the bytes that are written
METHOD = 1


@dataclass(frozen=True)
class PrepareConfig:
    """What to prepare, and how."""

    input: tuple[str, ...]
    """Files (.txt, .jsonl, .parquet, .conllu, each also .gz, .xz, .zst), folders of them, or data sets as
    NAME[:CONFIG]."""
    output: Path
    """The folder to make."""
    tokenizer: str = "wordpiece"
    """`wordpiece`, `bpe` (byte-level), `sentencepiece` (unigram) or `sentencepiece-bpe` to train one; else the folder
    or name of an existing fast tokenizer."""
    vocab_size: int | None = None
    """Tokens of a new tokenizer, 32,768 if not given."""
    lowercase: bool = False
    """Whether a new tokenizer turns all letters into small ones (and wordpiece drops accents, as BERT does)."""
    tokenizer_bytes: int = 100_000_000
    """Bytes of text, drawn from all train documents, that a new tokenizer learns from."""
    valid_share: float = 0.005
    """Share of documents, chosen by their hash, that make the validation split."""
    documents: text.Documents = "blocks"
    """In .txt files: a document per block between blank lines, or per file; in .conllu files `# newdoc` or file."""
    text_field: str = "text"
    """The field of .jsonl records and column of .parquet files and data sets that holds the text."""
    dataset_split: str = "train"
    """The split of a data set that is read."""
    on_bad_document: Literal["stop", "skip"] = "stop"
    """What to do at a document that cannot be read: stop with its place, or count it and go on."""
    bad_share: float = 0.001
    """Share of the documents read so far (of 10,000, if there are fewer) that `skip` may count until it stops too."""
    tags: str | None = None
    """Parts of speech for the score `part_of_speech`: the name or folder of a spaCy pipeline (needs megamask[tags]), or
    `conllu` for those of .conllu files; none if not given."""
    workers: int = 0
    """Processes that encode text; 0 is one for each core. The result does not depend on it."""

    @property
    def trains(self) -> bool:
        """Whether a new tokenizer is trained."""
        return self.tokenizer in get_args(Kind)

    def problems(self) -> list[str]:
        """Sentences for what is wrong."""
        found = []
        if not self.input:
            found.append("`input` must name at least one file, folder or data set, but is empty.")
        if not 0 <= self.valid_share < 1:
            found.append(must("valid_share", "lie in [0, 1)", self.valid_share))
        if not 0 <= self.bad_share <= 1:
            found.append(must("bad_share", "lie in [0, 1]", self.bad_share))
        if self.on_bad_document == "stop" and self.bad_share != PrepareConfig.bad_share:
            found.append("`bad_share` has no effect while `on_bad_document` is 'stop'. Remove one.")
        if self.workers < 0:
            found.append(must("workers", "be 0 or more", self.workers))
        if self.tokenizer_bytes < 1:
            found.append(must("tokenizer_bytes", "be at least 1", self.tokenizer_bytes))
        if self.trains and self.vocab_size is not None and not 16 <= self.vocab_size < 2**31:
            found.append(must("vocab_size", "lie between 16 and 2**31", self.vocab_size))
        if not self.trains:
            for name in ("vocab_size", "lowercase", "tokenizer_bytes"):
                if getattr(self, name) != getattr(PrepareConfig, name):
                    found.append(f"`{name}` has no effect on the existing tokenizer {self.tokenizer!r}. Remove it.")
        return found

    def settings(self) -> dict:
        """What the result depends on, beside the text."""
        without = asdict(self)
        # of tags the sidecar's facts speak; by the share nothing is decided but whether there is a result
        for name in ("input", "output", "workers", "tags", "bad_share"):
            del without[name]
        return without | {"vocab_size": self.vocab_size or (VOCAB_SIZE if self.trains else None)}


def prepare(config: PrepareConfig) -> Path:
    """Make the folder ``config.output`` and return it; do nothing if it is there, made of the same text.

    Raises ConfigError, DataError or StorageError.
    """
    raise_all(ConfigError, config.problems())
    existing = None if config.trains else load(config.tokenizer)
    if existing:
        token_ids(existing)
    sources = text.find(config.input)
    tags = _tag_facts(config, sources)
    request = {
        "inputs": [source.identity() for source in sources],
        "settings": config.settings() | ({"tokenizer": existing.hash()} if existing else {}),
        "versions": {name: version(name) for name in ("tokenizers", "sentencepiece")} | {"method": METHOD},
    }
    identity = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
    if _is_there(config.output, identity, tags):
        return config.output
    try:
        with _work_folder(config.output, identity + (json.dumps(tags, sort_keys=True) if tags else "")) as work:
            tokenizer = existing or _tokenizer(config, sources, work)
            read = _encode(config, sources, tokenizer, work)
            facts = request | {"request": identity, "read": dict(sorted(read.items()))}
            _publish(config, tokenizer, work, facts=facts, tags=tags)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise StorageError(f"{error.filename or config.output} cannot be written: {error.strerror}.") from None
    return config.output


def _tag_facts(config: PrepareConfig, sources: list[Source]) -> dict | None:
    """What tags there will be, and from where; None if none are wanted. Raises ConfigError, DataError."""
    if config.tags is None:
        return None
    if config.tags != tagger.GIVEN:
        return Tagger.load(config.tags).facts
    without = [source.name for source in sources if not source.path or text.kind_of(source.path) != ".conllu"]
    raise_all(
        DataError,
        [
            f"{name} has no tags: with `tags` {tagger.GIVEN!r} every input must be a .conllu file. Leave it out, or "
            "name a spaCy pipeline."
            for name in without
        ],
    )
    return tagger.given()


def _is_there(output: Path, identity: str, tags: dict | None) -> bool:
    """Whether ``output`` holds this very result; raises DataError if it holds anything else."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    cure = "Choose another `output`, or delete it."
    if not (output / "manifest.json").exists():
        raise DataError(f"{output} exists and holds no prepared data. {cure}")
    if shards.read_manifest(output).get("request") != identity:
        raise DataError(f"{output} was prepared from other text or with other settings. {cure}")
    if Shards.open(output).sidecar_facts("tags") != tags:
        raise DataError(f"{output} was prepared with other tags, or without or with any. {cure}")
    return True


@contextmanager
def _work_folder(output: Path, identity: str) -> Iterator[Path]:
    """The hidden folder beside ``output`` with what is finished of this request; another request's is emptied."""
    work = output.parent / f".{output.name}.partial"
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise DataError(f"{output} is being prepared by another process. Wait for it.") from None
        name = work / "request"
        if not name.exists() or name.read_text() != identity:
            for leftover in work.iterdir():
                if leftover.is_dir():
                    shutil.rmtree(leftover)
                elif leftover.name != "lock":
                    leftover.unlink()
            name.write_text(identity)
        yield work
    shutil.rmtree(work)


# ---- reading


Kept = tuple[bytes, str, Words | None]
"""Hash and clean text of a document, and its words if they came with it."""


def _read(config: PrepareConfig, sources: list[Source], counts: Counter, label: str) -> Iterator[Kept]:
    """Each document that is kept; ``counts`` says what became of all the others."""
    reading = Reading(config.documents, config.text_field, config.dataset_split)
    seen: set[bytes] = set()
    done = 0
    with tqdm(total=sum(s.size for s in sources) or None, unit="B", unit_scale=True, desc=label, disable=None) as bar:
        for source in sources:
            with source.open() as raw:
                for found in text.documents(source, reading, raw):
                    counts["documents"] += 1
                    if isinstance(found, Bad):
                        if config.on_bad_document == "stop":
                            raise DataError(f"{found.problem} (`on_bad_document` skip would count it and go on.)")
                        counts["bad"] += 1
                        if counts["bad"] > config.bad_share * max(counts["documents"], FEW):
                            raise DataError(
                                f"{found.problem} It is the {counts['bad']}. bad one of {counts['documents']} "
                                f"documents, more than `bad_share` ({config.bad_share:g}) allows."
                            )
                        continue
                    clean, words = (
                        (found.text, found.words) if isinstance(found, Tagged) else (text.normalise(found), None)
                    )
                    digest = text.digest(clean)
                    if not clean:
                        counts["blank"] += 1
                    elif digest in seen:
                        counts["duplicate"] += 1
                    else:
                        seen.add(digest)
                        yield digest, clean, words
                    if raw is not None and not raw.closed:
                        bar.update(done + raw.tell() - bar.n)
            done += source.size


def _split_of(config: PrepareConfig, digest: bytes) -> Split:
    return "valid" if text.is_valid(digest, config.valid_share) else "train"


# ---- the tokenizer


def _tokenizer(config: PrepareConfig, sources: list[Source], work: Path) -> Tokenizer:
    """The new tokenizer, trained once and kept in the work folder."""
    folder = work / "tokenizer"
    if not folder.exists():
        texts = _sample(config, sources)
        if not texts:
            raise DataError("No text is left to train a tokenizer on: every document is bad, blank or for validation.")
        kind: Kind = config.tokenizer  # type: ignore[assignment]
        tokenizer = train(kind, texts, size=config.vocab_size or VOCAB_SIZE, lowercase=config.lowercase)
        tokenizer.save(work / "tokenizer.part")
        (work / "tokenizer.part").rename(folder)
    # the saved one also in the run that trained it, so that a resumed run encodes with the same
    return load(folder)


def _sample(config: PrepareConfig, sources: list[Source]) -> list[str]:
    """Train documents of ``tokenizer_bytes`` in all, those with the smallest hashes: a fair and repeatable draw."""
    drawn: list[tuple[int, str]] = []
    size = 0
    for digest, clean, _ in _read(config, sources, Counter(), "reading for the tokenizer"):
        if _split_of(config, digest) == "train":
            heapq.heappush(drawn, (-int.from_bytes(digest[8:], "little"), clean))
            size += len(clean.encode())
            while size > config.tokenizer_bytes and len(drawn) > 1:
                size -= len(heapq.heappop(drawn)[1].encode())
    return [clean for _, clean in sorted(drawn, reverse=True)]


# ---- encoding, unit by unit


def _encode(config: PrepareConfig, sources: list[Source], tokenizer: Tokenizer, work: Path) -> Counter:
    """Write the ids of every unit that is not yet there; returns what became of all documents that were read."""
    counts: Counter = Counter(documents=0, bad=0, blank=0, duplicate=0)
    (work / "units").mkdir(exist_ok=True)
    if not (work / "encoder").exists():
        tokenizer.save(work / "encoder.part")
        (work / "encoder.part").rename(work / "encoder")
    workers = config.workers or len(os.sched_getaffinity(0))
    units = enumerate(_units(config, _read(config, sources, counts, "encoding")))
    missing = ((number, unit) for number, unit in units if not _unit_file(work, number).exists())
    if workers == 1:
        _start_worker(work, config.tags)
        for number, unit in missing:
            _encode_unit(work, number, unit)
        return counts
    context = multiprocessing.get_context("spawn")
    under_way: deque[Future] = deque()
    try:
        with ProcessPoolExecutor(workers, context, _start_worker, (work, config.tags)) as pool:
            for number, unit in missing:
                under_way.append(pool.submit(_encode_unit, work, number, unit))
                if len(under_way) > 2 * workers:
                    under_way.popleft().result()
            for future in under_way:
                future.result()
    except BrokenProcessPool:
        raise DataError(
            "A worker process was killed, perhaps for want of memory. Start again with fewer `workers`: "
            "what is finished is kept."
        ) from None
    return counts


Document = tuple[Split, str, Words | None]


def _units(config: PrepareConfig, read: Iterator[Kept]) -> Iterator[list[Document]]:
    """Runs of documents with about ``UNIT_BYTES`` of text."""
    unit: list[Document] = []
    size = 0
    for digest, clean, words in read:
        unit.append((_split_of(config, digest), clean, words if config.tags == tagger.GIVEN else None))
        size += len(clean)
        if size >= UNIT_BYTES:
            yield unit
            unit, size = [], 0
    if unit:
        yield unit


def _unit_file(work: Path, number: int) -> Path:
    return work / "units" / f"{number:07d}.npz"


_encoder: Tokenizer | None = None
_tagger: Tagger | None = None
_tags = False


def _start_worker(work: Path, tags: str | None) -> None:
    """Load tokenizer and tagger; in a worker process, also see to it that it does not outlive its parent."""
    global _encoder, _tagger, _tags
    _encoder, _tags = load(work / "encoder"), tags is not None
    _tagger = Tagger.load(tags) if tags not in (None, tagger.GIVEN) else None
    parent = multiprocessing.parent_process()
    if parent is not None:
        quiet()

        def follow() -> None:
            parent.join()
            os._exit(1)

        threading.Thread(target=follow, daemon=True).start()


def _encode_unit(work: Path, number: int, unit: list[Document]) -> None:
    """Write the ids, tags and lengths of a unit's documents, by split; documents without a token are left out."""
    assert _encoder is not None
    texts = [clean for _, clean, _ in unit]
    tags: list[np.ndarray] = []
    if _tags:
        places = _encoder.encode_with_places(texts)
        encoded = [ids for ids, _ in places]
        words = _tagger.words(texts) if _tagger else [given for _, _, given in unit]
        tags = [w.tags_of(*at.T) for w, (_, at) in zip(words, places, strict=True) if w is not None]
    else:
        encoded = _encoder.encode(texts)
    arrays: dict[str, np.ndarray] = {}
    for split in shards.SPLITS:
        here = [at for at, (where, _, _) in enumerate(unit) if where == split]
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


# ---- the end


def _publish(config: PrepareConfig, tokenizer: Tokenizer, work: Path, *, facts: dict, tags: dict | None) -> None:
    """Join the units into shards and give the whole folder its name."""
    files = sorted((work / "units").glob("*.npz"))
    without = sum(int(found[f"{split}_without_tokens"]) for found in _opened(files) for split in shards.SPLITS)
    if without == facts["read"]["documents"] - sum(facts["read"][why] for why in ("bad", "blank", "duplicate")):
        raise DataError(f"No document is left of the {facts['read']['documents']} that were read.")
    facts["read"]["without_tokens"] = without
    splits: tuple[Split, ...] = get_args(Split) if config.valid_share else ("train",)
    ready = work / "ready"
    shutil.rmtree(ready, ignore_errors=True)
    ready.mkdir()
    shards.write(ready, tokenizer, {split: _joined(files, split) for split in splits}, facts=facts)
    written = shards.read_manifest(ready)["splits"]
    for split in splits:
        if not written[split]["tokens"]:
            count = sum(found["documents"] for found in written.values())
            raise DataError(
                f"None of the {count} documents fell into the split {split!r}: "
                + must("valid_share", "be larger, or 0" if split == "valid" else "be smaller", config.valid_share)
            )
    for split in splits if tags else ():
        sizes = [shard["tokens"] for shard in written[split]["shards"]]
        shards.write_sidecar(ready, "tags", split, _tags_of(files, split, sizes), tags)
    if config.output.exists():
        config.output.rmdir()  # it is empty
    ready.rename(config.output)


def _opened(files: list[Path]) -> Iterator[np.lib.npyio.NpzFile]:
    for file in files:
        with np.load(file, allow_pickle=False) as found:
            yield found


def _joined(files: list[Path], split: Split) -> Iterator[Unit]:
    return ((found[f"{split}_tokens"], found[f"{split}_lengths"]) for found in _opened(files))


def _tags_of(files: list[Path], split: Split, sizes: list[int]) -> Iterator[np.ndarray]:
    """The tags of each shard, of which ``sizes`` are the tokens; a shard holds whole units."""
    units = (found[f"{split}_tags"] for found in _opened(files))
    for size in sizes:
        some, count = [], 0
        while count < size:
            some.append(next(units))
            count += len(some[-1])
        yield np.concatenate(some)


# ---- text that is always there


def local_data(cache: Path, vocab_size: int = 8192) -> Path:
    """English that this machine holds anyway, prepared once below ``cache``: for a run without data of its own.

    The text is that of ``data.local_text``, so it depends on which packages are installed. Takes under a minute.
    """
    installed = sorted(f"{found.name}=={found.version}" for found in distributions())
    key = hashlib.sha256(json.dumps([installed, local_text.METHOD, METHOD, vocab_size]).encode()).hexdigest()[:12]
    output = cache / f"local-{key}"
    if (output / "manifest.json").exists():
        Shards.open(output)
        return output
    cache.mkdir(parents=True, exist_ok=True)
    collected = cache / f"local-{key}.jsonl"
    if not collected.exists():
        beside = collected.with_suffix(f".{os.getpid()}")
        with beside.open("w", encoding="utf-8") as file:
            for document in local_text.collect():
                file.write(json.dumps({"text": document}) + "\n")
        beside.rename(collected)
    return prepare(PrepareConfig((str(collected),), output, vocab_size=vocab_size, valid_share=0.02, workers=1))
