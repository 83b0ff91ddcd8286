"""Token shards on disk: memory-mapped ids with document offsets, and a manifest with the hash of every file.

A folder of shards, for the splits ``train`` and ``valid``::

    manifest.json             counts, token ids, tokenizer hash, size and sha256 of each file
    tokenizer/                tokenizer.json, tokenizer_config.json
    starts_word.npy           (V,) bool: whether a token of this id begins a word, if ids show it
    train.unigram.npy         (V,) int64: how often each id occurs in train
    train-00000.tokens.npy    ids of whole documents, without special tokens; uint16, or uint32 above 65,535 ids
    train-00000.offsets.npy   (documents + 1,) int64: where each document begins
    train-00000.starts.npy    (tokens,) bool: whether each token begins a word, only if ids do not show it
    train-00000.tags.npy      optional sidecars: uint8, one for each token
    train.entropy.json        facts about such a sidecar

Opening compares the size of each file and reads no tokens; ``verify`` reads all of them. A token id outside of the
vocabulary is found when shards are written, and again, without cost, by a lookup in a (V,) table.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int64, Shaped

from megamask.basic_types import TokenIds
from megamask.data.manifest import CURE, Manifest, Split, check_shard_manifest, size_problems
from megamask.data.tokenizer import TOKENIZER, load_tokenizer
from megamask.data.word_boundaries import WordLengths, WordRule, unknown_words_problem, word_rule
from megamask.errors import DataError, must, raise_all
from megamask.storage import strict_json
from megamask.storage.npy import is_increasing, map_array

SPLITS = ("train", "valid")


def id_type(vocab_size: int) -> np.dtype:
    """The integer type of token ids: uint16 if it is large enough, else uint32."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 - 1 else np.uint32)


INPUT_FILES = "input_files"
"""The key in the manifest for the files that were read and those that were skipped."""


@dataclass(frozen=True)
class Shards:
    """One split of a prepared folder, opened read-only."""

    folder: Path
    split: Split
    manifest: Manifest

    @classmethod
    def open(cls, folder: Path | str, split: Split = "train", *, verify: bool = False) -> Shards:
        """Check and open the shards in ``folder``; DataError with every problem. ``verify`` compares each sha256."""
        folder = Path(folder)
        return cls(folder, split, check_shard_manifest(folder, verify=verify))._with_text()

    def of_split(self, split: Split) -> Shards:
        """A split of this folder, which is not checked again; DataError if it contains no text."""
        return Shards(self.folder, split, self.manifest)._with_text()

    def _with_text(self) -> Shards:
        if not self.manifest["splits"].get(self.split, {}).get("tokens"):
            raise DataError(
                f"{self.folder} contains no documents in the split {self.split!r}. Prepare it with more text"
                + (" or a larger `--valid-share`." if self.split == "valid" else ".")
            )
        return self

    @property
    def sources(self) -> tuple[Shards, ...]:
        """The folders of this text: one, unless it is a mixture."""
        return (self,)

    @cached_property
    def token_ids(self) -> TokenIds:
        """Size of the vocabulary and ids of the special tokens."""
        record = self.manifest["token_ids"]
        return TokenIds(**{**record, "special": tuple(record["special"])})

    @property
    def tokens(self) -> int:
        """Tokens of the split, without special tokens."""
        return self.manifest["splits"][self.split]["tokens"]

    @property
    def documents(self) -> int:
        """Documents of the split."""
        return self.manifest["splits"][self.split]["documents"]

    @property
    def bytes_per_token(self) -> float | None:
        """UTF-8 bytes of the split's text per token, without special tokens; None if the shards do not record bytes.

        The text is counted before the tokenizer reads it, so whitespace and what the tokenizer loses count too.
        """
        counted = self.manifest.get("coverage", {}).get(self.split, {}).get("bytes", 0)
        return counted / self.tokens if counted else None

    @cached_property
    def fingerprint(self) -> str:
        """sha256 of the manifest: the same for the same text, tokenizer and settings.

        Without the sidecars, and without the files that were skipped.
        """
        content = {key: value for key, value in self.manifest.items() if key not in ("sidecars", INPUT_FILES)}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @cached_property
    def unigram(self) -> Int64[np.ndarray, " V"]:
        """How often each id occurs in the train split, for any split. 0 for special ids, which are never a target."""
        counts = np.load(self.folder / "train.unigram.npy", allow_pickle=False)
        counts[list(self.token_ids.special)] = 0
        return counts

    @cached_property
    def starts_word(self) -> Bool[np.ndarray, " V"]:
        """Whether a token of each id begins a word."""
        return np.load(self.folder / "starts_word.npy", allow_pickle=False)

    @cached_property
    def words(self) -> WordRule:
        """The rule for words. Shards of an earlier version do not record it and may lack word starts."""
        return self.manifest.get("words") or word_rule(load_tokenizer(self.folder / TOKENIZER))

    @cached_property
    def word_parts(self) -> list[np.ndarray] | None:
        """Whether each token of each shard begins a word, memory-mapped. None if ``starts_word`` shows it by id."""
        if self.manifest.get("words") != "pre_tokenizer":
            return None
        return [self._map(f"{name}.starts.npy") for name in self.names]

    @property
    def word_sizes(self) -> WordLengths | None:
        """The lengths of words; None in shards of an earlier version."""
        sizes = self.manifest.get("word_sizes", {}).get(self.split)
        return WordLengths(**sizes) if sizes else None

    def check_words(self) -> None:
        """DataError if these shards do not show where words begin."""
        if self.words == "unknown":
            raise DataError(unknown_words_problem(f"The tokenizer of {self.folder}"))
        if self.words == "pre_tokenizer" and self.word_parts is None:
            raise DataError(
                f"{self.folder} does not record where words begin, which the ids of its tokenizer do not show: an "
                f"earlier version prepared it. {CURE} Or set `masking.unit` to token."
            )

    @property
    def names(self) -> list[str]:
        """The names of the shards, such as ``train-00000``, in order."""
        return [shard["name"] for shard in self.manifest["splits"][self.split]["shards"]]

    @cached_property
    def parts(self) -> list[np.ndarray]:
        """The token ids of each shard, memory-mapped."""
        return [self._map(f"{name}.tokens.npy") for name in self.names]

    @cached_property
    def starts(self) -> Int64[np.ndarray, " shards1"]:
        """The position of the first token of each shard in the stream of all tokens, and the end."""
        return np.cumsum([0, *(len(part) for part in self.parts)])

    def offsets(self) -> Iterator[Int64[np.ndarray, " documents1"]]:
        """For each shard, the positions where its documents begin, counted from the start of the shard."""
        for name, part in zip(self.names, self.parts, strict=True):
            offsets = self._map(f"{name}.offsets.npy")
            if len(offsets) == 0 or offsets[0] != 0 or offsets[-1] != len(part) or not is_increasing(offsets):
                raise DataError(f"{self.folder / name}.offsets.npy does not fit its tokens. {CURE}")
            yield offsets

    def sidecar(self, name: str) -> list[np.ndarray] | None:
        """The sidecar ``tags`` or ``entropy`` of each shard, memory-mapped, or None if the split has none."""
        if self.split not in self.manifest.get("sidecars", {}).get(name, {}):
            return None
        return [self._map(f"{shard}.{name}.npy") for shard in self.names]

    def sidecar_facts(self, name: str) -> dict[str, Any] | None:
        """The facts about a sidecar, or None if the split has no sidecar or no facts."""
        path = self.folder / f"{self.split}.{name}.json"
        if path.name not in self.manifest.get("sidecars", {}).get(name, {}).get(self.split, {}):
            return None
        try:
            facts = strict_json.read_json(path)
        except strict_json.BadRecord as error:
            raise DataError(f"{path} is damaged: {error}. {CURE}") from None
        if not isinstance(facts, dict):
            raise DataError(must(str(path), "be a JSON object", facts, CURE))
        return facts

    def document(self, place: int) -> str:
        """Which document contains the token at ``place`` of the stream of all tokens, for a message."""
        shard = int(np.searchsorted(self.starts, place, side="right") - 1)
        offsets = list(self.offsets())[shard]
        number = int(np.searchsorted(offsets, place - self.starts[shard], side="right"))
        return f"document {number:,} of {self.names[shard]}"

    def check_sizes(self) -> None:
        """DataError if the size of a file has changed since it was opened."""
        raise_all(DataError, size_problems(self.folder, self.manifest))

    def read(self, parts: list[np.ndarray], places: Int64[np.ndarray, " T"]) -> Shaped[np.ndarray, " T"]:
        """The values of ``parts`` (``self.parts`` or a sidecar) at ``places`` of the stream of all tokens."""
        if len(parts) == 1:
            return parts[0][places]
        first, last = np.searchsorted(self.starts, [places.min(), places.max()], side="right") - 1
        if first == last:
            return parts[first][places - self.starts[first]]
        values = np.empty(len(places), parts[0].dtype)
        for number in range(first, last + 1):
            here = (places >= self.starts[number]) & (places < self.starts[number + 1])
            values[here] = parts[number][places[here] - self.starts[number]]
        return values

    def invalid_id_error(self, places: Int64[np.ndarray, " T"]) -> DataError:
        """The error for a token at ``places`` whose id is outside of the vocabulary."""
        ids = self.read(self.parts, places).astype(np.int64)
        at = int(np.argmax(ids >= self.token_ids.size))
        shard = int(np.searchsorted(self.starts, places[at], side="right") - 1)
        return DataError(
            f"{self.folder / self.names[shard]}.tokens.npy contains the id {ids[at]} at token "
            f"{places[at] - self.starts[shard]}, but the vocabulary has {self.token_ids.size}. {CURE}"
        )

    def _map(self, name: str) -> Shaped[np.ndarray, " n"]:
        return map_array(self.folder / name)
