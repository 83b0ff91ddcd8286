"""Part-of-speech tags: one for each token, from the words of a spaCy pipeline or of CoNLL-U files.

The tags are the 17 universal ones (Universal Dependencies), numbered from 1; 0 means no tag. Words and tokens have
positions in characters of the text, so they are aligned the same way for every tokenizer. Only this module imports
spaCy, which is optional. Cost: spaCy's small English pipeline tags about 10,000 words per second and core.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int64, UInt8

from megamask.data.shards import Shards
from megamask.errors import ConfigError, DataError

TAGS = (
    "ADJ", "ADP", "ADV", "AUX", "CCONJ", "DET", "INTJ", "NOUN", "NUM", "PART", "PRON", "PROPN", "PUNCT", "SCONJ", "SYM",
    "VERB", "X",
)  # fmt: skip
TAG_IDS = {name: number for number, name in enumerate(TAGS, start=1)}
CONLLU = "conllu"
"""The name for tags that the text itself has."""
PIECE = 10_000
"""Maximum number of characters of a text that a pipeline gets: some do not accept long texts."""
BATCH_SIZE = 16
"""Pieces that a pipeline gets at once. The default of spaCy, 1000, would be millions of words and gigabytes of
activations."""
UNUSED_COMPONENTS = (
    "parser", "ner", "lemmatizer", "trainable_lemmatizer", "entity_linker", "entity_ruler", "textcat", "senter",
)  # fmt: skip
"""Components of pipelines that do not affect tags."""
PROBE = "The first small words of a text are in this one, and they should have tags."
# part of the identity of a result: change it with the bytes that are written
METHOD = 1


@dataclass(frozen=True)
class TaggedWords:
    """The words of a text in order: the begin and end of each in characters, and the number of its tag."""

    starts: Int64[np.ndarray, " W"]
    ends: Int64[np.ndarray, " W"]
    tags: UInt8[np.ndarray, " W"]

    @classmethod
    def of(cls, words: Sequence[tuple[int, int, int]]) -> TaggedWords:
        """From (start, end, tag) of each word."""
        table = np.array(words, np.int64).reshape(-1, 3)
        return cls(table[:, 0], table[:, 1], table[:, 2].astype(np.uint8))

    def tags_of(self, starts: Int64[np.ndarray, " n"], ends: Int64[np.ndarray, " n"]) -> UInt8[np.ndarray, " n"]:
        """The tag of each token, whose characters are ``starts`` to ``ends``.

        A token has the tag of the first word that shares a character with it. A token that is only the space before a
        word has the tag of that word. Other tokens have no tag.
        """
        if not len(self.tags):
            return np.zeros(len(starts), np.uint8)
        word = np.searchsorted(self.ends, starts, side="right").clip(max=len(self.tags) - 1)
        touches = (self.starts[word] <= ends) & (self.ends[word] > starts)
        return np.where(touches, self.tags[word], 0).astype(np.uint8)


class Tagger:
    """A spaCy pipeline that sets parts of speech."""

    def __init__(self, pipeline: Any, facts: dict[str, Any]):
        """``pipeline`` is the result of ``spacy.load``; ``facts`` identify it."""
        self._pipeline, self.facts = pipeline, facts

    @classmethod
    def load(cls, name: str) -> Tagger:
        """The pipeline that is installed as ``name``, or the one in that folder.

        Raises ConfigError if spaCy or the pipeline is missing, or if the pipeline does not set part-of-speech tags.
        """
        try:
            import spacy
        except ImportError:
            raise ConfigError(
                f"`tags` names the spaCy pipeline {name!r}, but spaCy is not installed. Install it with "
                "pip install 'megamask[tags]'."
            ) from None
        try:
            pipeline = spacy.load(name, exclude=list(UNUSED_COMPONENTS))
        except Exception as error:  # no such pipeline, a corrupt one, one of another version: one message for all
            installed = ", ".join(spacy.util.get_installed_models()) or "none"
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ConfigError(
                f"`tags` must be {CONLLU!r} or the name or folder of a spaCy pipeline, but is {name!r}. Installed: "
                f"{installed}. spaCy reports: {reason}"
            ) from None
        if not pipeline(PROBE).has_annotation("POS"):
            raise ConfigError(
                f"`tags` names the spaCy pipeline {name!r}, which does not set part-of-speech tags: its components "
                f"are {', '.join(pipeline.pipe_names) or 'none'}. Use one with a tagger or morphologizer."
            )
        meta = pipeline.meta
        by = {"pipeline": f"{meta['lang']}_{meta['name']}", "version": meta["version"], "spacy": spacy.__version__}
        return cls(pipeline, {"tags": list(TAGS), "by": by | {"sha256": _hash(pipeline.path)}, "method": METHOD})

    def words(self, texts: Sequence[str]) -> list[TaggedWords]:
        """The words of each text, without those that have no universal tag, such as spaces."""
        pieces = [piece for text in texts for piece in split_text(text)]
        tagged = iter(zip(pieces, self._pipeline.pipe(pieces, batch_size=BATCH_SIZE), strict=True))
        result = []
        for text in texts:
            words, at = [], 0
            while at < len(text):
                piece, doc = next(tagged)
                words += [
                    (at + token.idx, at + token.idx + len(token.text), TAG_IDS[token.pos_])
                    for token in doc
                    if token.pos_ in TAG_IDS
                ]
                at += len(piece)
            result.append(TaggedWords.of(words))
        return result


def conllu_facts() -> dict[str, Any]:
    """The facts of tags that the text itself has."""
    return {"tags": list(TAGS), "by": {"pipeline": CONLLU}, "method": METHOD}


def split_text(text: str) -> Iterator[str]:
    """Split ``text`` into pieces of at most ``PIECE`` characters, after the last newline, else after the last space."""
    at = 0
    while at < len(text):
        end = at + PIECE
        if end < len(text):
            breaks = (text.rfind(mark, at, end) for mark in ("\n", " "))
            end = next((place + 1 for place in breaks if place >= 0), end)
        yield text[at:end]
        at = end


def tag_names(shards: Shards) -> tuple[str, ...]:
    """The names of the tags beside ``shards``, by number from 1; DataError if there are none."""
    facts = shards.sidecar_facts("tags")
    if facts is None:
        raise DataError(
            f"{shards.folder} has no tags for the split {shards.split!r}. Prepare it again with "
            "`megamask prepare --tags`, which needs another `output`, or choose another `masking.score`."
        )
    return tuple(facts["tags"])


def _hash(folder: Path | None) -> str:
    """sha256 of all files of a pipeline: its version may stay the same when its files change."""
    digest = hashlib.sha256()
    if folder is not None:
        for file in sorted(p for p in Path(folder).rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")):
            digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
