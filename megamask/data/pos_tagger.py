"""Parts of speech: a tag for each token, from the words of a spaCy pipeline or of CoNLL-U files.

Tags are the 17 universal ones (Universal Dependencies), numbered from 1; 0 is none. Words lie in a text by their
characters and tokens too, whatever the tokenizer, so one alignment serves all. This is the one module that knows spaCy,
which is optional. Costs: spaCy's small English pipeline tags about 10,000 words a second and core.
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
"""The name for tags that come with the text."""
PIECE = 10_000
"""Characters of a document to a pipeline, about: some take no long texts."""
AT_ONCE = 16
"""Such documents that it reads at once. spaCy's own 1000 are some million words, whose activations are gigabytes."""
NEEDLESS = ("parser", "ner", "lemmatizer", "trainable_lemmatizer", "entity_linker", "entity_ruler", "textcat", "senter")
"""Parts of pipelines on which no tag depends."""
PROBE = "The first small words of a text are in this one, and they should have tags."
# part of the identity of a result: change it with whatever changes the bytes that are written
METHOD = 1


@dataclass(frozen=True)
class TaggedWords:
    """The words of a text in order: where each begins and ends, in characters, and the number of its tag."""

    starts: Int64[np.ndarray, " W"]
    ends: Int64[np.ndarray, " W"]
    tags: UInt8[np.ndarray, " W"]

    @classmethod
    def of(cls, found: Sequence[tuple[int, int, int]]) -> TaggedWords:
        """From (start, end, tag) of each word."""
        table = np.array(found, np.int64).reshape(-1, 3)
        return cls(table[:, 0], table[:, 1], table[:, 2].astype(np.uint8))

    def tags_of(self, starts: Int64[np.ndarray, " n"], ends: Int64[np.ndarray, " n"]) -> UInt8[np.ndarray, " n"]:
        """The tag of each token, which has the characters from ``starts`` to ``ends``.

        It is that of the first word that shares a character with the token. A token of nothing but the space right
        before a word begins that word, and has its tag; one that touches no word has none.
        """
        if not len(self.tags):
            return np.zeros(len(starts), np.uint8)
        word = np.searchsorted(self.ends, starts, side="right").clip(max=len(self.tags) - 1)
        touches = (self.starts[word] <= ends) & (self.ends[word] > starts)
        return np.where(touches, self.tags[word], 0).astype(np.uint8)


class Tagger:
    """A spaCy pipeline that sets parts of speech."""

    def __init__(self, pipeline: Any, facts: dict[str, Any]):
        """``pipeline`` is what spacy.load gives; ``facts`` say which it is."""
        self._pipeline, self.facts = pipeline, facts

    @classmethod
    def load(cls, name: str) -> Tagger:
        """The pipeline that is installed under ``name`` or lies in that folder.

        Raises ConfigError if spaCy or the pipeline is missing, or it sets no part of speech.
        """
        try:
            import spacy
        except ImportError:
            raise ConfigError(
                f"`tags` names the spaCy pipeline {name!r}, but spaCy is not installed. Install it with "
                "pip install 'megamask[tags]'."
            ) from None
        try:
            pipeline = spacy.load(name, exclude=list(NEEDLESS))
        except Exception as error:  # no such pipeline, a damaged one, one of another version: one sentence for all
            installed = ", ".join(spacy.util.get_installed_models()) or "none"
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ConfigError(
                f"`tags` must be {CONLLU!r} or the name or folder of a spaCy pipeline, but is {name!r}. Installed are: "
                f"{installed}. spaCy says: {reason}"
            ) from None
        if not pipeline(PROBE).has_annotation("POS"):
            raise ConfigError(
                f"`tags` names the spaCy pipeline {name!r}, which sets no part of speech: it has "
                f"{', '.join(pipeline.pipe_names) or 'no parts at all'}. Take one with a tagger or morphologizer."
            )
        meta = pipeline.meta
        by = {"pipeline": f"{meta['lang']}_{meta['name']}", "version": meta["version"], "spacy": spacy.__version__}
        return cls(pipeline, {"tags": list(TAGS), "by": by | {"sha256": _hash(pipeline.path)}, "method": METHOD})

    def words(self, texts: Sequence[str]) -> list[TaggedWords]:
        """The words of each text; those without a universal tag, such as spaces, are left out."""
        pieces = [piece for text in texts for piece in split_text(text)]
        tagged = iter(zip(pieces, self._pipeline.pipe(pieces, batch_size=AT_ONCE), strict=True))
        found = []
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
            found.append(TaggedWords.of(words))
        return found


def conllu_facts() -> dict[str, Any]:
    """The facts of tags that come with the text."""
    return {"tags": list(TAGS), "by": {"pipeline": CONLLU}, "method": METHOD}


def split_text(text: str) -> Iterator[str]:
    """``text`` in pieces of at most ``PIECE`` characters, cut behind the last newline, else the last space."""
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
    """sha256 of all files of a pipeline: a version is easily forgotten."""
    digest = hashlib.sha256()
    if folder is not None:
        for file in sorted(p for p in Path(folder).rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")):
            digest.update(file.relative_to(folder).as_posix().encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
