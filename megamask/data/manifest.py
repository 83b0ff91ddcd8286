"""The manifest of a folder of shards, and whether the folder is as it says: every file, every count, every name.

A look at the size and the header of each file costs next to nothing; ``verify`` reads every byte, at the speed of the
disk. Hashes are compared before an array is opened.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, TypeAdapter, ValidationError

from megamask.basic_types import TokenIds
from megamask.data.lost_text.coverage import Coverage
from megamask.data.tokenizer import TOKENIZER, tokenizer_hash
from megamask.data.word_boundaries import WordLengths, WordRule
from megamask.errors import DataError, must, raise_all
from megamask.storage import strict_json
from megamask.storage.file_list import sha256
from megamask.storage.npy import mapped

FORMAT, VERSION = "megamask shards", 1
NAME = "manifest.json"
CURE = "Prepare the data again with `megamask prepare`."

Split = Literal["train", "valid"]
Manifest = dict[str, Any]
Count = Annotated[int, Field(ge=0, lt=2**63)]
_PLAIN = re.compile(r"\w[\w.-]{0,200}(/\w[\w.-]{0,200}){0,3}", re.ASCII)


@dataclass(frozen=True)
class _Shard:
    name: str
    documents: Count
    tokens: Count
    largest: Count


@dataclass(frozen=True)
class _Part:
    documents: Count
    tokens: Count
    shards: list[_Shard]


@dataclass(frozen=True)
class File:
    """What a manifest says of a file."""

    bytes: Count
    sha256: str


@dataclass(frozen=True)
class _Lost:
    tokens: Count
    characters: Count
    unknown_tokens: Count
    unknown_characters: Count
    lost_characters: Count
    removed_characters: Count
    examples: list[tuple[str, Count]]
    removed_examples: list[tuple[str, Count]] = field(default_factory=list)


@dataclass(frozen=True)
class _Words:
    words: Count
    median: Count
    longest: Count


@dataclass(frozen=True)
class _Facts:
    """What a manifest must say; more may stand there."""

    tokenizer: str
    token_ids: TokenIds
    dtype: Literal["uint16", "uint32"]
    splits: dict[Split, _Part]
    files: dict[str, File]
    words: WordRule | None = None
    """None in a manifest of an earlier version."""
    coverage: dict[Split, _Lost] = field(default_factory=dict)
    word_sizes: dict[Split, _Words] = field(default_factory=dict)
    switched_off: list[str] = field(default_factory=list)
    sidecars: dict[Literal["tags", "entropy"], dict[Split, dict[str, File]]] = field(default_factory=dict)


def read_shard_manifest(folder: Path) -> Manifest:
    """The manifest of ``folder``; raises DataError if there is none of this format and version."""
    path = folder / NAME
    if not folder.is_dir():
        raise DataError(f"{folder} is no folder. Prepare data into it with `megamask prepare`.")
    try:
        manifest = strict_json.read_json(path)
    except FileNotFoundError:
        raise DataError(f"{folder} holds no {NAME}, so no finished shards. {CURE}") from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    except strict_json.BadRecord as error:
        raise DataError(f"{path} is damaged: {error}. {CURE}") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise DataError(f"{path} is no manifest of megamask shards.")
    if manifest.get("version") != VERSION:
        raise DataError(must(f"{path}: version", f"be {VERSION}", str(manifest.get("version")), CURE))
    return manifest


def check_shard_manifest(folder: Path, *, verify: bool) -> Manifest:
    """The manifest of ``folder``, if all splits are as it says; DataError with every problem.

    ``verify`` holds every byte against its sha256; else sizes are compared.
    """
    manifest = read_shard_manifest(folder)
    try:
        # by the rules of JSON, in which a tuple is a list and true is no 1
        facts = TypeAdapter(_Facts).validate_json(strict_json.to_json(manifest), strict=True)
    except ValidationError as error:
        places = [(".".join(str(part) for part in one["loc"]), one["msg"]) for one in error.errors()[:10]]
        raise DataError(*(f"{folder / NAME} is damaged: `{at}`: {why}. {CURE}" for at, why in places)) from None
    raise_all(DataError, [*_counts(folder / NAME, facts), *_files(folder, facts, verify)])
    return manifest


def text_report(manifest: Manifest, split: str) -> list[str]:
    """What a checked manifest says of the text of a split: what the tokenizer lost, and how long words are."""
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
        yield f"{path}: a special token's id lies outside the vocabulary of {ids.size} tokens. {CURE}"
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
                    f"{path.parent / shard.name} holds the id {shard.largest}, but the vocabulary has {ids.size}. "
                    f"{CURE}"
                )
        for unit in ("documents", "tokens"):
            total, found = getattr(split, unit), sum(getattr(shard, unit) for shard in split.shards)
            if total != found:
                yield f"{path}: {name} must have {found} {unit}, as its shards have, but has {total}. {CURE}"


def _files(folder: Path, facts: _Facts, verify: bool) -> Iterator[str]:
    """Sentences for files that are not as they should be."""
    path = folder / NAME
    files = dict(facts.files)
    for sidecar in facts.sidecars.values():
        for listed in sidecar.values():
            files |= listed
    expected = dict(_expected(facts))
    for name in sorted(expected.keys() - files.keys()):
        yield f"{path} does not list {name}. {CURE}"
    present = {file.name for file in folder.glob("*.tokens.npy") if not file.name.startswith(".")}
    for name in sorted(present - files.keys()):
        yield f"{folder / name} is not listed in {NAME}: it is not of these shards. Remove it, or: {CURE}"
    sound = True
    for name, fact in sorted(files.items()):
        wrong = file_problem(folder, name, fact, verify)
        if wrong:
            yield wrong
        elif name in expected:
            yield from _array_problems(folder / name, *expected[name])
        sound = sound and not wrong
    if sound and tokenizer_hash(folder / TOKENIZER) != facts.tokenizer:
        yield f"{folder / TOKENIZER} is not the tokenizer that these shards were made with. {CURE}"


def file_problem(folder: Path, name: str, fact: File, verify: bool, cure: str = CURE) -> str | None:
    """The sentence for a file of ``folder`` that is not what its manifest says."""
    file = folder / name
    out = f"{folder / NAME} lists {name!r}, which leads out of the folder. Do not use this folder."
    if not _PLAIN.fullmatch(name):
        return out
    try:
        if not file.is_file():
            return f"{file} is missing. {cure}"
        if not file.resolve().is_relative_to(folder.resolve()):
            return out
        if (size := file.stat().st_size) != fact.bytes:
            return f"{file} must have {fact.bytes} bytes, but has {size}. Copy it again, or: {cure}"
        if verify and sha256(file) != fact.sha256:
            return f"{file} is damaged: its sha256 is not that in {NAME}. Copy it again, or: {cure}"
    except OSError as error:
        return f"{file} cannot be read: {error.strerror}."
    return None


def _expected(facts: _Facts) -> Iterator[tuple[str, tuple[str, int]]]:
    """Each array that there must be, with its type and length."""
    yield "starts_word.npy", ("bool", facts.token_ids.size)
    yield "train.unigram.npy", ("int64", facts.token_ids.size)
    for split in facts.splits.values():
        for shard in split.shards:
            yield f"{shard.name}.tokens.npy", (facts.dtype, shard.tokens)
            yield f"{shard.name}.offsets.npy", ("int64", shard.documents + 1)
            if facts.words == "pre_tokenizer":
                yield f"{shard.name}.starts.npy", ("bool", shard.tokens)
    for name, splits in facts.sidecars.items():
        for part in splits:
            for shard in facts.splits[part].shards if part in facts.splits else ():
                yield f"{shard.name}.{name}.npy", ("uint8", shard.tokens)


def _array_problems(file: Path, dtype: str, length: int) -> Iterator[str]:
    try:
        array = mapped(file)
    except (ValueError, OSError) as error:
        yield f"{file} is no array: {error}. {CURE}"
        return
    if array.dtype != dtype or array.shape != (length,):
        yield f"{file} must hold {length} numbers of type {dtype}, but holds {array.shape} of {array.dtype}. {CURE}"


def size_problems(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Sentences for files that are no longer as long as they were: reading behind the end of one kills a process."""
    for name, fact in manifest["files"].items():
        try:
            size = os.stat(folder / name).st_size
        except OSError as error:
            yield f"{folder / name} cannot be read any more: {error.strerror}."
            continue
        if size != fact["bytes"]:
            yield f"{folder / name} must have {fact['bytes']} bytes, but has {size} now: it was changed during the run."


def manifest_changes(before: Manifest, now: Manifest) -> list[str]:
    """In words, each file of which two manifests do not say the same."""
    old, new = before["files"], now["files"]
    said = {name: "is gone" for name in old.keys() - new.keys()} | {name: "is new" for name in new.keys() - old.keys()}
    said |= {name: "has other bytes" for name in old.keys() & new.keys() if old[name] != new[name]}
    return [f"{name} {what}" for name, what in sorted(said.items())]
