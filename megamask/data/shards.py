"""Token shards on disk: memory-mapped ids with document offsets, and a manifest that vouches for every file.

A folder of shards, for the splits ``train`` and ``valid``::

    manifest.json             counts, token ids, tokenizer hash, size and sha256 of each file
    tokenizer/                tokenizer.json, tokenizer_config.json
    starts_word.npy           (V,) bool: whether a token of this id begins a word, if ids show it
    train.unigram.npy         (V,) int64: how often each id occurs in train
    train-00000.tokens.npy    ids of whole documents, without special tokens; uint16, or uint32 above 65,535 ids
    train-00000.offsets.npy   (documents + 1,) int64: where each document begins
    train-00000.starts.npy    (tokens,) bool: whether each token begins a word, only if ids do not show it
    train-00000.tags.npy      sidecars, where there are any: uint8, one for each token
    train.entropy.json        what such a sidecar holds, if that must be known

Opening costs a look at the size of each file, no read of the tokens; ``verify`` reads all of them. A token id that
the vocabulary lacks is found when shards are written, and again for free by whoever looks it up in a (V,) table.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Bool, Int64, Shaped

from megamask.basic_types import TokenIds
from megamask.data.manifest import (
    CURE,
    FORMAT,
    NAME,
    VERSION,
    Manifest,
    Split,
    check_shard_manifest,
    read_shard_manifest,
    size_problems,
)
from megamask.data.tokenizer import TOKENIZER, Tokenizer, load_tokenizer, token_ids, tokenizer_hash
from megamask.data.word_boundaries import WordLengths, WordRule, unknown_words_problem, word_rule, word_starts
from megamask.errors import DataError, must, raise_all
from megamask.storage import strict_json
from megamask.storage.file_list import sha256
from megamask.storage.npy import mapped, rising, save_array

SPLITS = ("train", "valid")
SIDECARS = ("tags", "entropy")
SHARD_TOKENS = 2**27


def id_type(vocab_size: int) -> np.dtype:
    """The integer type of token ids: the narrower of uint16 and uint32 that holds them."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 - 1 else np.uint32)


INPUT_FILES = "input_files"
"""The key of the manifest for which files were read and which were passed over."""


@dataclass(frozen=True)
class Shards:
    """One split of a prepared folder, opened read-only."""

    folder: Path
    split: Split
    manifest: Manifest

    @classmethod
    def open(cls, folder: Path | str, split: Split = "train", *, verify: bool = False) -> Shards:
        """The shards in ``folder``, checked; raises DataError with every problem. ``verify`` checks each sha256."""
        folder = Path(folder)
        manifest = check_shard_manifest(folder, verify=verify)
        if not manifest["splits"].get(split, {}).get("tokens"):
            raise DataError(
                f"{folder} holds no documents in the split {split!r}. Prepare it with more text"
                + (" or a larger `valid_share`." if split == "valid" else ".")
            )
        return cls(folder, split, manifest)

    @cached_property
    def token_ids(self) -> TokenIds:
        """Size of the vocabulary and ids of the special tokens."""
        said = self.manifest["token_ids"]
        return TokenIds(**{**said, "special": tuple(said["special"])})

    @property
    def tokens(self) -> int:
        """Tokens of the split, without special tokens."""
        return self.manifest["splits"][self.split]["tokens"]

    @property
    def documents(self) -> int:
        """Documents of the split."""
        return self.manifest["splits"][self.split]["documents"]

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of what the manifest says: the same for the same text, tokenizer and settings.

        Sidecars are left out, and what was beside the text when it was read.
        """
        content = {key: value for key, value in self.manifest.items() if key not in ("sidecars", INPUT_FILES)}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @cached_property
    def unigram(self) -> Int64[np.ndarray, " V"]:
        """How often each id occurs in the train split, whichever split this is; 0 for special ids, never a target."""
        counts = np.load(self.folder / "train.unigram.npy", allow_pickle=False)
        counts[list(self.token_ids.special)] = 0
        return counts

    @cached_property
    def starts_word(self) -> Bool[np.ndarray, " V"]:
        """Whether a token of each id begins a word."""
        return np.load(self.folder / "starts_word.npy", allow_pickle=False)

    @cached_property
    def words(self) -> WordRule:
        """How words are found. Shards of an earlier version do not say so and may lack the words."""
        return self.manifest.get("words") or word_rule(load_tokenizer(self.folder / TOKENIZER))

    @cached_property
    def word_parts(self) -> list[np.ndarray] | None:
        """Whether each token of each shard begins a word, memory-mapped; None if ``starts_word`` knows it by id."""
        if self.manifest.get("words") != "pre_tokenizer":
            return None
        return [self._map(f"{name}.starts.npy") for name in self.names]

    @property
    def word_sizes(self) -> WordLengths | None:
        """How long words are; None in shards of an earlier version."""
        sizes = self.manifest.get("word_sizes", {}).get(self.split)
        return WordLengths(**sizes) if sizes else None

    def check_words(self) -> None:
        """DataError if these shards do not know where words begin."""
        if self.words == "unknown":
            raise DataError(unknown_words_problem(f"The tokenizer of {self.folder}"))
        if self.words == "pre_tokenizer" and self.word_parts is None:
            raise DataError(
                f"{self.folder} does not hold where words begin, which ids of its tokenizer do not show: it was "
                f"prepared by an earlier version. {CURE} Or set `masking.unit` to token."
            )

    @property
    def names(self) -> list[str]:
        """The shards' names, such as ``train-00000``, in order."""
        return [shard["name"] for shard in self.manifest["splits"][self.split]["shards"]]

    @cached_property
    def parts(self) -> list[np.ndarray]:
        """The token ids of each shard, memory-mapped."""
        return [self._map(f"{name}.tokens.npy") for name in self.names]

    @cached_property
    def starts(self) -> Int64[np.ndarray, " shards1"]:
        """The number of the first token of each shard in the stream of all, and the end."""
        return np.cumsum([0, *(len(part) for part in self.parts)])

    def offsets(self) -> Iterator[Int64[np.ndarray, " documents1"]]:
        """For each shard, where its documents begin, counted from the start of the shard."""
        for name, part in zip(self.names, self.parts, strict=True):
            found = self._map(f"{name}.offsets.npy")
            if len(found) == 0 or found[0] != 0 or found[-1] != len(part) or not rising(found):
                raise DataError(f"{self.folder / name}.offsets.npy does not fit its tokens. {CURE}")
            yield found

    def sidecar(self, name: str) -> list[np.ndarray] | None:
        """The sidecar ``tags`` or ``entropy`` of each shard, memory-mapped, or None if the split has none."""
        if self.split not in self.manifest.get("sidecars", {}).get(name, {}):
            return None
        return [self._map(f"{shard}.{name}.npy") for shard in self.names]

    def sidecar_facts(self, name: str) -> dict[str, Any] | None:
        """What was written down about a sidecar, or None if the split has none or nothing was."""
        path = self.folder / f"{self.split}.{name}.json"
        if path.name not in self.manifest.get("sidecars", {}).get(name, {}).get(self.split, {}):
            return None
        try:
            found = strict_json.read_json(path)
        except strict_json.BadRecord as error:
            raise DataError(f"{path} is damaged: {error}. {CURE}") from None
        if not isinstance(found, dict):
            raise DataError(must(str(path), "hold a JSON object", type(found).__name__, CURE))
        return found

    def document(self, place: int) -> str:
        """The document that holds the token at ``place`` of the stream of all shards, in words."""
        shard = int(np.searchsorted(self.starts, place, side="right") - 1)
        offsets = list(self.offsets())[shard]
        number = int(np.searchsorted(offsets, place - self.starts[shard], side="right"))
        return f"document {number:,} of {self.names[shard]}"

    def check_sizes(self) -> None:
        """DataError if a file is not as long as it was when it was opened; costs a look at each."""
        raise_all(DataError, list(size_problems(self.folder, self.manifest)))

    def read(self, parts: list[np.ndarray], places: Int64[np.ndarray, " T"]) -> Shaped[np.ndarray, " T"]:
        """What ``parts`` (``self.parts`` or a sidecar) hold at ``places`` of the stream of all shards."""
        if len(parts) == 1:
            return parts[0][places]
        first, last = np.searchsorted(self.starts, [places.min(), places.max()], side="right") - 1
        if first == last:
            return parts[first][places - self.starts[first]]
        found = np.empty(len(places), parts[0].dtype)
        for number in range(first, last + 1):
            here = (places >= self.starts[number]) & (places < self.starts[number + 1])
            found[here] = parts[number][places[here] - self.starts[number]]
        return found

    def stray(self, places: Int64[np.ndarray, " T"]) -> DataError:
        """The error for a token at ``places`` that the vocabulary lacks."""
        ids = self.read(self.parts, places).astype(np.int64)
        at = int(np.argmax(ids >= self.token_ids.size))
        shard = int(np.searchsorted(self.starts, places[at], side="right") - 1)
        return DataError(
            f"{self.folder / self.names[shard]}.tokens.npy holds the id {ids[at]} at token "
            f"{places[at] - self.starts[shard]}, but the vocabulary has {self.token_ids.size}. {CURE}"
        )

    def _map(self, name: str) -> Shaped[np.ndarray, " n"]:
        return mapped(self.folder / name)


# ---- writing


class Unit(NamedTuple):
    """Some whole documents, one behind the other."""

    tokens: Shaped[np.ndarray, " _tokens"]
    lengths: Int64[np.ndarray, " _documents"]
    """How many tokens each document has."""
    starts: Bool[np.ndarray, " _tokens"] | None = None
    """Whether each token begins a word, for a tokenizer of the word rule ``pre_tokenizer``."""


def write_shards(
    folder: Path,
    tokenizer: Tokenizer,
    splits: dict[Split, Iterable[Unit]],
    *,
    facts: Manifest,
    shard_tokens: int = SHARD_TOKENS,
) -> None:
    """Write shards, tokenizer and, last, the manifest into the empty ``folder``; ``facts`` goes into the manifest.

    A unit is never split over two shards, so a shard may exceed ``shard_tokens`` by at most one unit. Memory: a shard.
    """
    ids = token_ids(tokenizer)
    dtype = id_type(ids.size)
    rule = word_rule(tokenizer)
    tokenizer.save(folder / TOKENIZER)
    save_array(folder / "starts_word.npy", word_starts(tokenizer))
    unigram = np.zeros(ids.size, np.int64)
    written: dict[str, Any] = {}
    for split, units in splits.items():
        shards: list[dict[str, Any]] = []
        for number, (tokens, lengths, starts) in enumerate(_gathered(units, shard_tokens)):
            name = f"{split}-{number:05d}"
            largest = int(tokens.max(initial=0))
            if largest >= ids.size:
                raise DataError(f"The tokenizer gave the id {largest}, but its vocabulary has {ids.size}.")
            if split == "train":
                unigram += np.bincount(tokens, minlength=ids.size)
            save_array(folder / f"{name}.tokens.npy", tokens.astype(dtype, copy=False))
            save_array(folder / f"{name}.offsets.npy", np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64))
            if rule == "pre_tokenizer":
                if starts is None:
                    raise DataError("Units of this tokenizer must say where words begin: its ids do not show it.")
                save_array(folder / f"{name}.starts.npy", starts)
            shards.append({"name": name, "documents": len(lengths), "tokens": len(tokens), "largest": largest})
        totals = {key: sum(shard[key] for shard in shards) for key in ("documents", "tokens")}
        written[split] = totals | {"shards": shards}
    save_array(folder / "train.unigram.npy", unigram)
    manifest = {
        "format": FORMAT, "version": VERSION, "tokenizer": tokenizer_hash(folder / TOKENIZER),
        "token_ids": asdict(ids), "dtype": str(dtype), "words": rule, "splits": written,
    } | facts | {"files": _listed(folder, sorted(p for p in folder.rglob("*") if p.is_file()))}  # fmt: skip
    _write_manifest(folder, manifest)


def write_sidecar(
    folder: Path, name: str, split: Split, parts: Iterable[np.ndarray], facts: dict[str, Any] | None = None
) -> None:
    """Put a sidecar (uint8, one for each token, an array for each shard in order) beside finished shards.

    ``facts`` say what it holds, and are kept as ``<split>.<name>.json``, of which the manifest has the hash. The
    manifest is replaced last, so a folder has the whole sidecar or none. The fingerprint stays the same.
    """
    if name not in SIDECARS:
        raise DataError(must("sidecar", f"be one of {', '.join(SIDECARS)}", name))
    shards = Shards.open(folder, split)
    earlier = read_shard_manifest(Path(folder))
    if earlier.get("sidecars", {}).get(name, {}).pop(split, None):
        _write_manifest(Path(folder), earlier)  # half of it will soon be overwritten
    files = []
    for shard, tokens, values in zip(shards.names, shards.parts, parts, strict=True):
        if values.dtype != np.uint8 or values.shape != tokens.shape:
            raise DataError(
                f"The sidecar {name!r} of {shard} must hold {len(tokens)} numbers of type uint8, "
                f"but holds {values.shape} of {values.dtype}."
            )
        files.append(Path(folder) / f"{shard}.{name}.npy")
        save_array(files[-1], values)
    if facts is not None:
        files.append(Path(folder) / f"{split}.{name}.json")
        _write_json(files[-1], facts)
    manifest = read_shard_manifest(Path(folder))
    manifest.setdefault("sidecars", {}).setdefault(name, {})[split] = _listed(Path(folder), files)
    _write_manifest(Path(folder), manifest)


def _gathered(units: Iterable[Unit], shard_tokens: int) -> Iterator[Unit]:
    """Units joined until they have ``shard_tokens`` tokens."""
    waiting: list[Unit] = []
    count = 0
    for unit in units:
        waiting.append(Unit(*unit))
        count += len(waiting[-1].tokens)
        if count >= shard_tokens:
            yield _joined(waiting)
            waiting, count = [], 0
    if count:
        yield _joined(waiting)


def _joined(units: Sequence[Unit]) -> Unit:
    starts = [unit.starts for unit in units if unit.starts is not None]
    return Unit(
        np.concatenate([unit.tokens for unit in units]),
        np.concatenate([unit.lengths for unit in units]),
        np.concatenate(starts) if len(starts) == len(units) else None,
    )


def _listed(folder: Path, files: Iterable[Path]) -> dict[str, dict[str, int | str]]:
    return {
        file.relative_to(folder).as_posix(): {"bytes": file.stat().st_size, "sha256": sha256(file)} for file in files
    }


def _write_manifest(folder: Path, manifest: Manifest) -> None:
    _write_json(folder / NAME, manifest)


def _write_json(path: Path, said: dict[str, Any]) -> None:
    beside = path.with_name(f".{path.name}.part")
    with beside.open("w", encoding="utf-8") as file:
        json.dump(said, file, indent=1, sort_keys=True, ensure_ascii=False)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
