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
import hashlib
import json
import math
import os
from collections import Counter
from dataclasses import asdict, dataclass
from importlib.metadata import distributions, version
from pathlib import Path
from typing import Literal, get_args

from megamask.data import encoding, local_text, pos_tagger, shard_writer
from megamask.data.corpus import CUT, EMPTY, REASONS, Corpus, print_warning
from megamask.data.input_file import InputFile
from megamask.data.inputs import find_inputs
from megamask.data.lost_text.coverage import lost_share_problem, removal_warning, sum_coverage
from megamask.data.manifest import Split, read_shard_manifest
from megamask.data.pos_tagger import Tagger
from megamask.data.read_documents import Documents, ReadOptions, option_problems
from megamask.data.shards import INPUT_FILES, Shards
from megamask.data.tokenizer import TOKENIZER, Tokenizer, load_tokenizer, token_ids
from megamask.data.tokenizer_training import TokenizerKind, train_tokenizer
from megamask.data.word_boundaries import WordLengths
from megamask.errors import ConfigError, DataError, StorageError, must, raise_all
from megamask.runtime.progress_bar import ProgressBar, elapsed
from megamask.storage import workdir as working
from megamask.storage.durable import atomic_folder, write_atomic

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "megamask"
"""Where text that this machine holds anyway is kept once it is prepared."""
VOCAB_SIZE = 32_768
# part of the identity of a result: change it with whatever changes the bytes that are written
METHOD = 3


@dataclass(frozen=True)
class PrepareConfig:
    """Turn text into a tokenizer, unless there is one, and token shards."""

    input: tuple[str, ...]
    """Files (.txt, .jsonl, .json, .csv, .tsv, .parquet, .conllu, each also .gz, .bz2, .xz, .zst), folders of them, or
    data sets as NAME[:CONFIG]."""
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
    exclude: tuple[str, ...] = ()
    """Files of folders to leave out: patterns such as 'README*' or '*.pdf' for a name, or a path below the folder."""
    documents: Documents = "blocks"
    """In .txt files: a document per block between blank lines, per line, or per file; in .conllu files `# newdoc` or
    file."""
    text_field: str = "text"
    """The field of JSON records and column of .csv, .tsv and .parquet files and data sets that holds the text."""
    dataset_split: str = "train"
    """The split of a data set that is read."""
    on_bad_document: Literal["stop", "skip"] = "stop"
    """What to do at a document that cannot be read, or a file without one: stop with its place, or count it and go
    on."""
    bad_share: float = 0.001
    """Share of the documents read so far (of 10,000, if there are fewer) that `skip` may count until it stops too."""
    lost_share: float = 0.01
    """Largest share of the text that the tokenizer may lose: of the tokens, those that are unknown, or of the
    characters, those inside unknown tokens and those without a token, whichever share is larger."""
    tags: str | None = None
    """Parts of speech for the score `part_of_speech`: the name or folder of a spaCy pipeline (needs megamask[tags]), or
    `conllu` for those of .conllu files; none if not given."""
    workers: int = 0
    """Processes that encode text; 0 is one for each core. The result does not depend on it."""

    @property
    def trains(self) -> bool:
        """Whether a new tokenizer is trained."""
        return self.tokenizer in get_args(TokenizerKind)

    def problems(self) -> list[str]:
        """Sentences for what is wrong."""
        found = []
        if not self.input:
            found.append("`input` must name at least one file, folder or data set, but is empty.")
        if not 0 <= self.valid_share < 1:
            found.append(must("valid_share", "lie in [0, 1)", self.valid_share))
        if not 0 <= self.bad_share <= 1:
            found.append(must("bad_share", "lie in [0, 1]", self.bad_share))
        if not 0 <= self.lost_share <= 1:
            found.append(must("lost_share", "lie in [0, 1]", self.lost_share))
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
        # of tags the sidecar's facts speak; by the shares nothing is decided but whether there is a result
        for name in ("input", "exclude", "output", "workers", "tags", "bad_share", "lost_share"):
            del without[name]
        return without | {"vocab_size": self.vocab_size or (VOCAB_SIZE if self.trains else None)}


def prepare(config: PrepareConfig) -> Path:
    """Make the folder ``config.output`` and return it; do nothing if it is there, made of the same text.

    Raises ConfigError, DataError or StorageError.
    """
    raise_all(ConfigError, config.problems())
    existing = None if config.trains else load_tokenizer(config.tokenizer)
    if existing:
        token_ids(existing)
    inputs = find_inputs(config.input, exclude=config.exclude, skip_empty=config.on_bad_document == "skip")
    sources = inputs.sources
    reading = ReadOptions(config.documents, config.text_field, config.dataset_split)
    raise_all(DataError, option_problems(sources, reading))
    for line in (inputs.sentence(), *inputs.warnings()):
        if line:
            print_warning(line)
    intake = Corpus(sources, reading, config.on_bad_document, config.bad_share, config.valid_share)
    tags = _tag_facts(config, sources)
    request = {
        "inputs": _identities(sources),
        "settings": config.settings() | ({"tokenizer": existing.hash()} if existing else {}),
        "versions": {name: version(name) for name in ("tokenizers", "sentencepiece")} | {"method": METHOD},
    }
    identity = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
    if _is_there(config.output, identity, tags):
        return config.output
    try:
        partial = config.output.parent / f".{config.output.name}.partial"
        tagged = identity + (json.dumps(tags, sort_keys=True) if tags else "")
        with working.folder(partial, tagged, config.output) as work:
            tokenizer = existing or _tokenizer(config, intake, work)
            read: Counter[str] = Counter()
            encoding.encode(intake.documents(read, "encoding"), tokenizer, work, config.workers, config.tags)
            files = inputs.facts() | {"empty": read.pop(EMPTY), "cut": read.pop(CUT)}
            facts = request | {"request": identity, "read": dict(sorted(read.items())), INPUT_FILES: files}
            facts |= _counted(config, tokenizer, work)
            _publish(config, tokenizer, work, facts=facts, tags=tags)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise StorageError(f"{error.filename or config.output} cannot be written: {error.strerror}.") from None
    return config.output


def _identities(sources: list[InputFile]) -> list[dict[str, str | int]]:
    """Name and content of each source. Reads every byte."""
    with ProgressBar("hashing", sum(source.size for source in sources) or None, "byte") as bar:
        return [source.identity(bar) for source in sources]


def _tag_facts(config: PrepareConfig, sources: list[InputFile]) -> dict | None:
    """What tags there will be, and from where; None if none are wanted. Raises ConfigError, DataError."""
    if config.tags is None:
        return None
    if config.tags != pos_tagger.CONLLU:
        return Tagger.load(config.tags).facts
    without = [source.name for source in sources if source.kind != ".conllu"]
    raise_all(
        DataError,
        [
            f"{name} has no tags: with `tags` {pos_tagger.CONLLU!r} every input must be a .conllu file. "
            "Leave it out, or name a spaCy pipeline."
            for name in without
        ],
    )
    return pos_tagger.conllu_facts()


def _is_there(output: Path, identity: str, tags: dict | None) -> bool:
    """Whether ``output`` holds this very result; raises DataError if it holds anything else."""
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    cure = "Choose another `output`, or delete it."
    if not (output / "manifest.json").exists():
        raise DataError(f"{output} exists and holds no prepared data. {cure}")
    if read_shard_manifest(output).get("request") != identity:
        raise DataError(f"{output} was prepared from other text or with other settings. {cure}")
    if Shards.open(output).sidecar_facts("tags") != tags:
        raise DataError(f"{output} was prepared with other tags, or without or with any. {cure}")
    return True


# ---- the tokenizer


def _tokenizer(config: PrepareConfig, intake: Corpus, work: Path) -> Tokenizer:
    """The new tokenizer, trained once and kept in the work folder."""
    folder = work / TOKENIZER
    if not folder.exists():
        texts = intake.sample(config.tokenizer_bytes)
        if not texts:
            raise DataError("No text is left to train a tokenizer on: every document is bad, blank or for validation.")
        kind: TokenizerKind = config.tokenizer  # type: ignore[assignment]
        size = sum(len(one.encode()) for one in texts)
        with elapsed(f"training the {kind} tokenizer on {size / 1e6:,.1f} MB of text"):
            tokenizer = train_tokenizer(kind, texts, size=config.vocab_size or VOCAB_SIZE, lowercase=config.lowercase)
        with atomic_folder(folder) as temporary:
            tokenizer.save(temporary)
    # the saved one also in the run that trained it, so that a resumed run encodes with the same
    return load_tokenizer(folder)


# ---- the end


def _counted(config: PrepareConfig, tokenizer: Tokenizer, work: Path) -> dict:
    """What the tokenizer lost, how long words are, and what of it was switched off; DataError if it lost too much."""
    splits: tuple[Split, ...] = get_args(Split)
    lost = {split: encoding.coverage(work, split) for split in splits}
    whole = sum_coverage(lost.values())
    if warning := removal_warning(whole):
        print_warning(warning)
    problem = lost_share_problem(whole, config.lost_share)
    raise_all(DataError, [problem] if problem else [])
    return {
        "coverage": {split: counts.record() for split, counts in lost.items() if counts.characters},
        "word_sizes": {split: asdict(WordLengths.of(encoding.word_sizes(work, split))) for split in splits},
        "switched_off": list(tokenizer.switched_off),
    }


def _publish(config: PrepareConfig, tokenizer: Tokenizer, work: Path, *, facts: dict, tags: dict | None) -> None:
    """Join the units into shards and give the whole folder its name."""
    without = encoding.without_tokens(work)
    if without == facts["read"]["documents"] - sum(facts["read"][why] for why in REASONS):
        raise DataError(f"No document is left of the {facts['read']['documents']} that were read.")
    facts["read"]["without_tokens"] = without
    splits: tuple[Split, ...] = get_args(Split) if config.valid_share else ("train",)
    with atomic_folder(config.output, work / "ready") as folder:
        with elapsed("writing shards"):
            shard_writer.write_shards(
                folder, tokenizer, {split: encoding.join_encoded(work, split) for split in splits}, facts=facts
            )
        written = read_shard_manifest(folder)["splits"]
        for split in splits:
            if not written[split]["tokens"]:
                raise DataError(_empty_split(split, sum(counts["documents"] for counts in written.values()), config))
        for split in splits if tags else ():
            sizes = [shard["tokens"] for shard in written[split]["shards"]]
            shard_writer.write_sidecar(folder, "tags", split, encoding.tags_of(work, split, sizes), tags)


def _empty_split(split: Split, documents: int, config: PrepareConfig) -> str:
    """The sentence for a split without documents."""
    if documents == 1:
        return (
            "The text is one document, and two splits need two. Cut it into documents (`--documents`: blocks between "
            "blank lines, or lines), or set `valid_share` to 0."
        )
    rule = "be larger, or 0" if split == "valid" else "be smaller"
    # with so large a share a split without documents is unlikely
    cure = f"Try `--valid-share {min(0.5, math.ceil(500 / documents) / 100):g}`." if split == "valid" else ""
    return f"None of the {documents} documents fell into the split {split!r}: " + must(
        "valid_share", rule, config.valid_share, cure
    )


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
        with elapsed("collecting text of this machine"):
            write_atomic(
                collected, ((json.dumps({"text": text}) + "\n").encode() for text in local_text.collect_local_text())
            )
    return prepare(PrepareConfig((str(collected),), output, vocab_size=vocab_size, valid_share=0.02, workers=1))
