"""Write token shards: arrays, tokenizer and, last, the manifest; and sidecars beside finished shards."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int64, Shaped

from megamask.data.manifest import FORMAT, NAME, VERSION, Manifest, Split, read_shard_manifest
from megamask.data.shards import Shards, id_type
from megamask.data.tokenizer import TOKENIZER, Tokenizer, token_ids, tokenizer_hash
from megamask.data.word_boundaries import word_rule, word_starts
from megamask.errors import DataError, must
from megamask.storage.atomic_write import write_atomic
from megamask.storage.file_list import FileEntry, FileList, list_files, to_record
from megamask.storage.npy import save_array

SIDECARS = ("tags", "entropy")
SHARD_TOKENS = 2**27


class EncodedDocuments(NamedTuple):
    """Some whole documents, one after the other."""

    tokens: Shaped[np.ndarray, " _tokens"]
    lengths: Int64[np.ndarray, " _documents"]
    """Tokens of each document."""
    starts: Bool[np.ndarray, " _tokens"] | None = None
    """Whether each token begins a word, for a tokenizer of the word rule ``pre_tokenizer``."""


def write_shards(
    folder: Path,
    tokenizer: Tokenizer,
    splits: dict[Split, Iterable[EncodedDocuments]],
    *,
    facts: Manifest,
    shard_tokens: int = SHARD_TOKENS,
) -> None:
    """Write shards, tokenizer and, last, the manifest into the empty ``folder``; ``facts`` goes into the manifest.

    Documents that come together stay in one shard, so a shard may have more than ``shard_tokens`` tokens. Needs memory
    for one shard.
    """
    ids = token_ids(tokenizer)
    dtype = id_type(ids.size)
    rule = word_rule(tokenizer)
    tokenizer.save(folder / TOKENIZER)
    files = list_files(folder, [f"{TOKENIZER}/{path.name}" for path in (folder / TOKENIZER).iterdir()])

    def save(name: str, array: np.ndarray) -> None:
        files[name] = save_array(folder / name, array)

    save("starts_word.npy", word_starts(tokenizer))
    unigram = np.zeros(ids.size, np.int64)
    written: dict[str, Any] = {}
    for split, parts in splits.items():
        shards: list[dict[str, Any]] = []
        for number, (tokens, lengths, starts) in enumerate(_joined_to_shards(parts, shard_tokens)):
            name = f"{split}-{number:05d}"
            largest = int(tokens.max(initial=0))
            if largest >= ids.size:
                raise DataError(f"The tokenizer gave the id {largest}, but its vocabulary has {ids.size}.")
            if split == "train":
                unigram += np.bincount(tokens, minlength=ids.size)
            save(f"{name}.tokens.npy", tokens.astype(dtype, copy=False))
            save(f"{name}.offsets.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
            if rule == "pre_tokenizer":
                if starts is None:
                    raise DataError("Documents need their word starts, which the ids of this tokenizer do not show.")
                save(f"{name}.starts.npy", starts)
            shards.append({"name": name, "documents": len(lengths), "tokens": len(tokens), "largest": largest})
        totals = {key: sum(shard[key] for shard in shards) for key in ("documents", "tokens")}
        written[split] = totals | {"shards": shards}
    save("train.unigram.npy", unigram)
    manifest = {
        "format": FORMAT, "version": VERSION, "tokenizer": tokenizer_hash(folder / TOKENIZER),
        "token_ids": asdict(ids), "dtype": str(dtype), "words": rule, "splits": written,
    } | facts | {"files": to_record(files)}  # fmt: skip
    _write_json(folder / NAME, manifest)


def write_sidecar(
    folder: Path, name: str, split: Split, parts: Iterable[np.ndarray], facts: dict[str, Any] | None = None
) -> None:
    """Write a sidecar (uint8, one for each token, an array for each shard in order) beside finished shards.

    ``facts`` describe it and are written to ``<split>.<name>.json``, whose hash is in the manifest. The manifest is
    replaced last, so a folder has the whole sidecar or none. The fingerprint stays the same.
    """
    if name not in SIDECARS:
        raise DataError(must("sidecar", f"be one of {', '.join(SIDECARS)}", name))
    folder = Path(folder)
    shards = Shards.open(folder, split)
    earlier = read_shard_manifest(folder)
    if earlier.get("sidecars", {}).get(name, {}).pop(split, None):
        _write_json(folder / NAME, earlier)  # its files are overwritten one by one
    files: FileList = {}
    for shard, tokens, values in zip(shards.names, shards.parts, parts, strict=True):
        if values.dtype != np.uint8 or values.shape != tokens.shape:
            raise DataError(
                f"The sidecar {name!r} of {shard} must have {len(tokens)} numbers of type uint8, "
                f"but has {values.shape} of {values.dtype}."
            )
        files[f"{shard}.{name}.npy"] = save_array(folder / f"{shard}.{name}.npy", values)
    if facts is not None:
        files[f"{split}.{name}.json"] = _write_json(folder / f"{split}.{name}.json", facts)
    manifest = read_shard_manifest(folder)
    manifest.setdefault("sidecars", {}).setdefault(name, {})[split] = to_record(files)
    _write_json(folder / NAME, manifest)


def _joined_to_shards(parts: Iterable[EncodedDocuments], shard_tokens: int) -> Iterator[EncodedDocuments]:
    """Documents joined until they have ``shard_tokens`` tokens."""
    waiting: list[EncodedDocuments] = []
    count = 0
    for part in parts:
        waiting.append(EncodedDocuments(*part))
        count += len(waiting[-1].tokens)
        if count >= shard_tokens:
            yield _joined(waiting)
            waiting, count = [], 0
    if count:
        yield _joined(waiting)


def _joined(parts: Sequence[EncodedDocuments]) -> EncodedDocuments:
    starts = [part.starts for part in parts if part.starts is not None]
    return EncodedDocuments(
        np.concatenate([part.tokens for part in parts]),
        np.concatenate([part.lengths for part in parts]),
        np.concatenate(starts) if len(starts) == len(parts) else None,
    )


def _write_json(path: Path, content: dict[str, Any]) -> FileEntry:
    return write_atomic(path, json.dumps(content, indent=1, sort_keys=True, ensure_ascii=False) + "\n")
