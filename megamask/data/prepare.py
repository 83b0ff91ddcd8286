"""Preparation: raw text -> tokenizer -> shards.

One process reads, cleans, removes duplicates and splits. Worker processes turn units of a few megabytes of text into
ids. At the end the units are joined into shards, in order, so the bytes do not depend on the number of workers. A
hidden folder beside the output keeps what is finished, so a preparation that was killed continues where it stopped. The
output appears as a whole, by a rename. Reading runs at 20 to 100 MB of text a second and encoding at about 3 MB a
second and worker. A new tokenizer needs a second reading. Duplicates take about 100 bytes of memory a document.

With `split_by` a unit has documents of one subset, and each subset becomes a folder of shards in the output. A new
tokenizer then needs a third reading.

With `tags` the units also have a part of speech for each token, which becomes a sidecar of the shards. The shards and
their fingerprint are the same with and without. A spaCy pipeline then limits the speed to about 0.1 MB a second and
worker.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict
from importlib.metadata import distributions, version
from pathlib import Path
from typing import get_args

from megamask.data import encoding, local_text, pos_tagger, shard_writer
from megamask.data.corpus import CUT, EMPTY, REASONS, Corpus, print_warning
from megamask.data.input_file import InputFile
from megamask.data.inputs import find_inputs
from megamask.data.lost_text.coverage import lost_share_problem, removal_warning, sum_coverage
from megamask.data.manifest import Manifest, Split, read_shard_manifest
from megamask.data.pos_tagger import Tagger
from megamask.data.read_documents import ReadOptions, option_problems
from megamask.data.settings import VOCAB_SIZE, PrepareConfig, TokenizerKind
from megamask.data.shard_writer import EncodedDocuments
from megamask.data.shards import INPUT_FILES, Shards
from megamask.data.subsets import empty_subsets_problem
from megamask.data.tokenizer import TOKENIZER, Tokenizer, load_tokenizer, token_ids
from megamask.data.tokenizer_training import train_tokenizer
from megamask.data.validation_share import LARGEST, MEASURABLE, validation_share
from megamask.data.word_boundaries import WordLengths
from megamask.errors import ConfigError, DataError, StorageError, must, raise_all
from megamask.errors.setting_rules import settings_problems
from megamask.runtime.progress_bar import ProgressBar, elapsed
from megamask.storage import workdir as working
from megamask.storage.atomic_write import atomic_folder, write_atomic

CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "megamask"
"""The folder for the prepared text of this machine."""
# part of the identity of a result: increase it when the bytes that are written change
METHOD = 4


def prepare(config: PrepareConfig) -> Path:
    """Make the folder ``config.output`` and return it. Does nothing if it exists and was made from the same text.

    Raises ConfigError, DataError or StorageError.
    """
    raise_all(ConfigError, settings_problems(config))
    existing = None if config.trains else load_tokenizer(config.tokenizer)
    if existing:
        token_ids(existing)
    inputs = find_inputs(config.input, exclude=config.exclude, skip_empty=config.on_bad_document == "skip")
    sources = inputs.sources
    reading = ReadOptions(config.documents, config.text_field, config.dataset_split, config.split_by)
    raise_all(DataError, option_problems(sources, reading))
    for line in (inputs.sentence(), *inputs.warnings()):
        if line:
            print_warning(line)
    corpus = Corpus(sources, reading, config.on_bad_document, config.bad_share, config.valid_share)
    tags = _tag_facts(config, sources)
    request = {
        "inputs": _identities(sources),
        "settings": config.settings() | ({"tokenizer": existing.hash()} if existing else {}),
        "versions": {name: version(name) for name in ("tokenizers", "sentencepiece")} | {"method": METHOD},
    }
    identity = hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()
    if _is_prepared(config, identity, tags):
        return config.output
    try:
        partial = config.output.parent / f".{config.output.name}.partial"
        tagged = identity + (json.dumps(tags, sort_keys=True) if tags else "")
        with working.folder(partial, tagged, config.output) as work:
            tokenizer = existing or _tokenizer(config, corpus, work)
            read: Counter[str] = Counter()
            encoding.encode(corpus.documents(read, "encoding"), tokenizer, work, config.workers, config.tags)
            files = inputs.facts() | {"empty": read.pop(EMPTY), "cut": read.pop(CUT)}
            facts = request | {"request": identity, "read": dict(sorted(read.items())), INPUT_FILES: files}
            _publish(config, tokenizer, work, facts=facts, tags=tags)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise StorageError(f"{error.filename or config.output} cannot be written: {error.strerror}.") from None
    return config.output


def _identities(sources: list[InputFile]) -> list[dict[str, str | int]]:
    """Name and hash of each source. Reads every byte."""
    with ProgressBar("hashing", sum(source.size for source in sources) or None, "byte") as bar:
        return [source.identity(bar) for source in sources]


def _tag_facts(config: PrepareConfig, sources: list[InputFile]) -> dict | None:
    """The tags and their source; None without tags. Raises ConfigError, DataError."""
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


def _is_prepared(config: PrepareConfig, identity: str, tags: dict | None) -> bool:
    """Whether ``config.output`` is exactly this result. Raises DataError if it contains anything else."""
    output = config.output
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    cure = "Choose another `output`, or delete it."
    folders = prepared_folders(output)
    if not all((folder / "manifest.json").exists() for folder in folders) or len(folders) == 0:
        raise DataError(f"{output} exists and does not contain prepared data. {cure}")
    manifests = {folder.name: read_shard_manifest(folder) for folder in folders}
    if any(manifest.get("request") != identity for manifest in manifests.values()):
        raise DataError(f"{output} was prepared from other text or with other settings. {cure}")
    if config.split_by is not None and any(facts["subsets"] != sorted(manifests) for facts in manifests.values()):
        raise DataError(f"{output} lacks some of the folders that were prepared, or has more. {cure}")
    if any(Shards.open(folder).sidecar_facts("tags") != tags for folder in folders):
        raise DataError(f"{output} was prepared with other tags, or only one of the two has tags. {cure}")
    return True


def prepared_folders(output: Path) -> list[Path]:
    """The folders of shards in ``output``: itself, or its visible folders if `split_by` made them."""
    if (output / "manifest.json").exists() or not output.is_dir():
        return [output]
    return sorted(path for path in output.iterdir() if not path.name.startswith("."))


# ---- the tokenizer


def _tokenizer(config: PrepareConfig, corpus: Corpus, work: Path) -> Tokenizer:
    """The new tokenizer, trained once and saved in the work folder."""
    folder = work / TOKENIZER
    if not folder.exists():
        texts = corpus.sample(config.tokenizer_bytes, config.tokenizer_alpha)
        if not texts:
            raise DataError("No text is left to train a tokenizer on: every document is bad, blank or for validation.")
        kind: TokenizerKind = config.tokenizer  # type: ignore[assignment]
        size = sum(len(text.encode()) for text in texts)
        with elapsed(f"training the {kind} tokenizer on {size / 1e6:,.1f} MB of text"):
            tokenizer = train_tokenizer(kind, texts, size=config.vocab_size or VOCAB_SIZE, lowercase=config.lowercase)
        with atomic_folder(folder) as temporary:
            tokenizer.save(temporary)
    # load it in the run that trained it too, so that a resumed run encodes with the same tokenizer
    return load_tokenizer(folder)


# ---- the end


def _counted(config: PrepareConfig, tokenizer: Tokenizer, units: dict[str, list[Path]]) -> dict[str, dict]:
    """Of each subset: what the tokenizer lost, how long words are, and which options of the tokenizer are off.

    Raises DataError if the tokenizer lost too much of the text or of one subset.
    """
    splits: tuple[Split, ...] = get_args(Split)
    facts, problems = {}, []
    for subset, files in units.items():
        lost = {split: encoding.coverage(files, split) for split in splits}
        whole = sum_coverage(lost.values())
        prefix = f"{config.split_by} {subset}: " if subset else ""
        if warning := removal_warning(whole):
            print_warning(prefix + warning)
        if problem := lost_share_problem(whole, config.lost_share):
            problems.append(prefix + problem)
        facts[subset] = {
            "coverage": {split: counts.record() for split, counts in lost.items() if counts.characters},
            "word_sizes": {split: asdict(WordLengths.of(encoding.word_sizes(files, split))) for split in splits},
            "switched_off": list(tokenizer.switched_off),
        }
    raise_all(DataError, problems)
    return facts


def _publish(config: PrepareConfig, tokenizer: Tokenizer, work: Path, *, facts: dict, tags: dict | None) -> None:
    """Join the units into shards and write them to the output folder as a whole."""
    units = encoding.units_by_subset(work) or {"": []}
    counted = _counted(config, tokenizer, units)
    without = sum(encoding.without_tokens(files) for files in units.values())
    if without == facts["read"]["documents"] - sum(facts["read"][why] for why in REASONS):
        raise DataError(f"No document is left of the {facts['read']['documents']} that were read.")
    facts["read"]["without_tokens"] = without
    splits: tuple[Split, ...] = get_args(Split) if config.valid_share else ("train",)
    with atomic_folder(config.output, work / "ready") as output:
        with elapsed("writing shards"):
            for subset, files in units.items():
                more = {"subset": subset, "subsets": list(units)} if config.split_by else {}
                parts: dict[Split, Iterable[EncodedDocuments]] = {s: encoding.join_encoded(files, s) for s in splits}
                shard_writer.write_shards(output / subset, tokenizer, parts, facts=facts | counted[subset] | more)
        written = {subset: read_shard_manifest(output / subset)["splits"] for subset in units}
        for split in splits:
            empty = {
                subset: sum(counts["documents"] for counts in each.values())
                for subset, each in written.items()
                if not each[split]["tokens"]
            }
            if empty and config.split_by:
                raise DataError(empty_subsets_problem(config.split_by, split, empty, config.valid_share))
            if empty:
                raise DataError(_empty_split(split, empty[""], config, read_shard_manifest(output)))
        for split in splits if tags else ():
            sizes = [shard["tokens"] for shard in written[""][split]["shards"]]
            shard_writer.write_sidecar(output, "tags", split, encoding.tags_of(units[""], split, sizes), tags)


def _empty_split(split: Split, documents: int, config: PrepareConfig, manifest: Manifest) -> str:
    """The sentence for a split without documents, of the text in ``manifest``."""
    if documents == 1:
        return (
            "The text is one document, and two splits need two. Split it into documents (`--documents`: blocks between "
            "blank lines, or lines), or set `--valid-share 0`."
        )
    rule = "be larger, or 0" if split == "valid" else "be smaller"
    # with such a large share, a split without documents is unlikely, and one that is too small for a run
    share = max(min(0.5, math.ceil(500 / documents) / 100), validation_share(manifest, MEASURABLE) or LARGEST)
    cure = f"Try `--valid-share {share:g}`." if split == "valid" else ""
    return f"None of the {documents} documents fell into the split {split!r}: " + must(
        "valid_share", rule, config.valid_share, cure
    )


# ---- text of this machine


def local_data(cache: Path, vocab_size: int = 8192) -> Path:
    """English text that every machine has, prepared once below ``cache``: for a run without data of its own.

    `data.local_text` collects it, so it depends on the installed packages. Takes less than a minute.
    """
    output = local_folder(cache, vocab_size)
    if (output / "manifest.json").exists():
        Shards.open(output)
        return output
    cache.mkdir(parents=True, exist_ok=True)
    collected = output.with_suffix(".jsonl")
    if not collected.exists():
        with elapsed("collecting text of this machine"):
            write_atomic(
                collected, ((json.dumps({"text": text}) + "\n").encode() for text in local_text.collect_local_text())
            )
    return prepare(PrepareConfig((str(collected),), output, vocab_size=vocab_size, valid_share=0.02, workers=1))


def local_folder(cache: Path, vocab_size: int = 8192) -> Path:
    """The folder that `local_data` prepares, whether or not it exists."""
    installed = sorted(f"{package.name}=={package.version}" for package in distributions())
    key = hashlib.sha256(json.dumps([installed, local_text.METHOD, METHOD, vocab_size]).encode()).hexdigest()[:12]
    return cache / f"local-{key}"
