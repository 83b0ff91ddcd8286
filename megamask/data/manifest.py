"""The manifest of a folder of shards, and the comparison of the folder with it: every file, every count, every name.

Comparing the size and the header of each file costs next to nothing; ``verify`` reads every byte, at the speed of the
disk. Hashes are compared before an array is opened.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from annotated_types import Ge, Lt
from pydantic import TypeAdapter, ValidationError

from megamask.basic_types import TokenIds
from megamask.data.lost_text.coverage import Coverage
from megamask.data.tokenizer import TOKENIZER, tokenizer_hash
from megamask.data.word_boundaries import WordLengths, WordRule
from megamask.errors import DataError, listed, must, raise_all
from megamask.errors.setting_rules import field_problem, setting_of
from megamask.storage import file_list, strict_json
from megamask.storage.file_list import FileList
from megamask.storage.npy import map_array

FORMAT, VERSION = "megamask shards", 1
NAME = "manifest.json"
CURE = "Prepare the data again with `megamask prepare`."

Split = Literal["train", "valid"]
Manifest = dict[str, Any]
Count = Annotated[int, Ge(0), Lt(2**63)]


@dataclass(frozen=True)
class _Shard:
    name: str
    documents: Count
    tokens: Count
    largest: Count


@dataclass(frozen=True)
class _Split:
    documents: Count
    tokens: Count
    shards: list[_Shard]


@dataclass(frozen=True)
class _LostText:
    tokens: Count
    characters: Count
    unknown_tokens: Count
    unknown_characters: Count
    lost_characters: Count
    removed_characters: Count
    examples: list[tuple[str, Count]]
    bytes: Count = 0
    removed_examples: list[tuple[str, Count]] = field(default_factory=list)


@dataclass(frozen=True)
class _WordSizes:
    words: Count
    median: Count
    longest: Count


@dataclass(frozen=True)
class _Facts:
    """The required content of a manifest; it may have more."""

    tokenizer: str
    token_ids: TokenIds
    dtype: Literal["uint16", "uint32"]
    splits: dict[Split, _Split]
    files: FileList
    words: WordRule | None = None
    """None in a manifest of an earlier version."""
    coverage: dict[Split, _LostText] = field(default_factory=dict)
    word_sizes: dict[Split, _WordSizes] = field(default_factory=dict)
    switched_off: list[str] = field(default_factory=list)
    sidecars: dict[Literal["tags", "entropy"], dict[Split, FileList]] = field(default_factory=dict)


def read_shard_manifest(folder: Path) -> Manifest:
    """The manifest of ``folder``. Raises DataError if it is missing or has another format or version."""
    path = folder / NAME
    if not folder.is_dir():
        raise DataError(f"{folder} is not a folder. Prepare data into it with `megamask prepare`.")
    missing = f"{folder} contains no {NAME}, so no finished shards. {CURE}"
    if not path.exists() and (sources := sorted(source.parent.name for source in folder.glob(f"*/{NAME}"))):
        missing = (
            f"{folder} contains no {NAME}, but its folders {listed(sources)} do. Name one of them, or all as a mixture "
            f"(`--data {folder}/*`)."
        )
    manifest = strict_json.read_object(path, DataError, missing, CURE)
    if manifest.get("format") != FORMAT:
        raise DataError(f"{path} is not a manifest of megamask shards.")
    if manifest.get("version") != VERSION:
        raise DataError(must(f"{path}: version", f"be {VERSION}", str(manifest.get("version")), CURE))
    return manifest


def check_shard_manifest(folder: Path, *, verify: bool) -> Manifest:
    """The manifest of ``folder``, after comparing the folder with it. Raises DataError with every problem.

    Compares sizes, and with ``verify`` the sha256 of every file.
    """
    manifest = read_shard_manifest(folder)
    try:
        # by the rules of JSON, where a tuple is a list and true is not 1
        facts = TypeAdapter(_Facts).validate_json(strict_json.to_json(manifest), strict=True)
    except ValidationError as error:
        raise DataError(*validation_problems(_Facts, folder / NAME, error, CURE)) from None
    raise_all(DataError, [*_counts(folder / NAME, facts), *_files(folder, facts, verify)])
    return manifest


def validation_problems(kind: type, path: Path, error: ValidationError, cure: str) -> list[str]:
    """A sentence for each of the first fields of a record, the dataclass ``kind``, that are missing or wrong."""
    problems = [field_problem(kind, each, setting_of(kind, each)) for each in error.errors()[:10]]
    return [f"{path} is damaged: {problem} {cure}" for problem in problems]


def text_report(manifest: Manifest, split: str) -> list[str]:
    """Lines about the text of a split: what the tokenizer lost, and how long words are."""
    lost = manifest.get("coverage", {}).get(split)
    sizes = manifest.get("word_sizes", {}).get(split)
    return [
        Coverage.of_record(lost).sentence() if lost else "What the tokenizer lost was not counted.",
        *([WordLengths(**sizes).sentence()] if sizes and manifest.get("words") != "unknown" else ()),
    ]


def _counts(path: Path, facts: _Facts) -> Iterator[str]:
    """Sentences for numbers that contradict each other."""
    ids = facts.token_ids
    if ids.size - 1 > np.iinfo(facts.dtype).max:
        yield (
            f"{path}: a vocabulary of {ids.size} tokens does not fit into the shards' integer type {facts.dtype}. "
            f"{CURE}"
        )
    named = [ids.cls, ids.sep, ids.pad, ids.mask]
    if not all(0 <= number < ids.size for number in (*named, *ids.special)) or not set(named) <= set(ids.special):
        yield f"{path}: the id of a special token lies outside the vocabulary of {ids.size} tokens. {CURE}"
    if ids.mask in (ids.cls, ids.sep, ids.pad):
        yield f"{path}: the mask token has the id of another special token. {CURE}"
    seen: set[str] = set()
    for name, split in facts.splits.items():
        for shard in split.shards:
            if shard.name in seen:
                yield f"{path} lists the shard {shard.name!r} twice. {CURE}"
            seen.add(shard.name)
            if shard.largest >= ids.size:
                yield (
                    f"{path.parent / shard.name} contains the id {shard.largest}, but the vocabulary has {ids.size}. "
                    f"{CURE}"
                )
        for unit in ("documents", "tokens"):
            total, counted = getattr(split, unit), sum(getattr(shard, unit) for shard in split.shards)
            if total != counted:
                yield f"{path}: {name} must have {counted} {unit}, as its shards have, but has {total}. {CURE}"


def _files(folder: Path, facts: _Facts, verify: bool) -> Iterator[str]:
    """Sentences for files that differ from the manifest."""
    path = folder / NAME
    files = facts.files | {
        name: entry
        for splits in facts.sidecars.values()
        for listed in splits.values()
        for name, entry in listed.items()
    }
    expected = dict(_expected(facts))
    for name in sorted(expected.keys() - files.keys()):
        yield f"{path} does not list {name}. {CURE}"
    present = {file.name for file in folder.glob("*.tokens.npy") if not file.name.startswith(".")}
    for name in sorted(present - files.keys()):
        yield f"{folder / name} is not listed in {NAME}: it is not part of these shards. Remove it, or: {CURE}"
    problems = file_problems(folder, dict(sorted(files.items())), verify)
    yield from problems.values()
    for name in sorted(expected.keys() & files.keys() - problems.keys()):
        yield from _array_problems(folder / name, *expected[name])
    if not problems and tokenizer_hash(folder / TOKENIZER) != facts.tokenizer:
        yield f"{folder / TOKENIZER} is not the tokenizer that made these shards. {CURE}"


def file_problems(folder: Path, files: FileList, verify: bool, cure: str = CURE) -> dict[str, str]:
    """A sentence for each file of ``folder`` that differs from its entry, by name; ``verify`` compares every byte."""
    problems: dict[str, str] = {}
    for name, entry in files.items():
        try:
            damage = file_list.damage(folder, {name: entry}, verify)
            problems |= {name: f"{problem} Copy it again, or: {cure}" for name, problem in damage.items()}
        except OSError as error:
            problems[name] = f"{folder / name} cannot be read: {error.strerror}."
    return problems


def _expected(facts: _Facts) -> Iterator[tuple[str, tuple[str, int]]]:
    """Each required array, with its type and length."""
    yield "starts_word.npy", ("bool", facts.token_ids.size)
    yield "train.unigram.npy", ("int64", facts.token_ids.size)
    for split in facts.splits.values():
        for shard in split.shards:
            yield f"{shard.name}.tokens.npy", (facts.dtype, shard.tokens)
            yield f"{shard.name}.offsets.npy", ("int64", shard.documents + 1)
            if facts.words == "pre_tokenizer":
                yield f"{shard.name}.starts.npy", ("bool", shard.tokens)
    for name, splits in facts.sidecars.items():
        for split_name in splits:
            for shard in facts.splits[split_name].shards if split_name in facts.splits else ():
                yield f"{shard.name}.{name}.npy", ("uint8", shard.tokens)


def _array_problems(file: Path, dtype: str, length: int) -> Iterator[str]:
    try:
        array = map_array(file)
    except (ValueError, OSError) as error:
        yield f"{file} is not an array: {error}. {CURE}"
        return
    if array.dtype != dtype or array.shape != (length,):
        yield f"{file} must have {length} numbers of type {dtype}, but has {array.shape} of {array.dtype}. {CURE}"


def size_problems(folder: Path, manifest: Manifest) -> list[str]:
    """Sentences for files whose size has changed: a read beyond the end of a mapped file kills the process."""
    problems = file_problems(
        folder, file_list.from_record(manifest["files"]), verify=False, cure="Start the run again."
    )
    return [f"The file was changed during the run: {problem}" for problem in problems.values()]


def manifest_changes(before: Manifest, now: Manifest) -> list[str]:
    """A phrase for each file that differs between two manifests."""
    old, new = before["files"], now["files"]
    changes = {name: "is missing" for name in old.keys() - new.keys()}
    changes |= {name: "is new" for name in new.keys() - old.keys()}
    changes |= {name: "has other bytes" for name in old.keys() & new.keys() if old[name] != new[name]}
    return [f"{name} {change}" for name, change in sorted(changes.items())]
