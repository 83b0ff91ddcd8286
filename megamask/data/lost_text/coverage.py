"""What a tokenizer loses of a text: unknown tokens, and characters that no token stands for.

A character counts as lost if it is still there after the tokenizer's normalizer, is no whitespace, and gets no token
or lies inside an unknown token. What the normalizer does on purpose is no loss: lower-casing, accents, another form of
the same letter. Characters that it removes (control characters, or what a ``Replace`` leaves out) are counted apart, as
``removed_characters``. What a pre-tokenizer drops beside whitespace is lost.

Counting costs about two percent of encoding. A document with unknown tokens, and one with characters that the
tokenizer may drop, is looked at again in the words that may be the reason; a pre-tokenizer that drops more than
whitespace has every different word looked at, and a normalizer whose ``Replace`` removes text is applied to the
text twice more, with and without that ``Replace``. Lost characters are judged within words between whitespace.
"""

from __future__ import annotations

import json
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Int64
from tokenizers import Encoding, models
from tokenizers import Tokenizer as Backend

from megamask.data.tokenizer import METASPACE, Tokenizer
from megamask.data.word_boundaries import normalized

SHOWN = 10
"""Examples in a manifest."""
KEPT = 1000
"""Different examples that are kept of a unit of text; counts of rarer ones are lower bounds."""
FEW = 0.01
"""Share of unknown tokens in a document above which all of it is encoded again, not single words."""
REMOVED = 0.05
"""Share of the characters that a normalizer may remove without a warning."""
LONGEST_EXAMPLE = 40
LONGEST_WORD = 100
"""Characters of a word from which WordPiece calls it unknown, unless its file says otherwise."""


@dataclass(frozen=True)
class Coverage:
    """Counts over some documents of one split."""

    tokens: int = 0
    characters: int = 0
    """All characters of the documents, whitespace included."""
    unknown_tokens: int = 0
    unknown_characters: int = 0
    """Characters inside unknown tokens."""
    lost_characters: int = 0
    """Characters that got no token at all."""
    removed_characters: int = 0
    """Characters that the normalizer removes."""
    examples: Counter[str] = field(default_factory=Counter)
    """The texts of unknown tokens and the lost characters, with how often each occurs."""
    removed_examples: Counter[str] = field(default_factory=Counter)
    """The removed characters, with how often each occurs."""

    @property
    def share(self) -> float:
        """Share of the text that is lost, by tokens or by characters, whichever is larger."""
        lost = self.unknown_characters + self.lost_characters
        return max(self.unknown_tokens / max(self.tokens, 1), lost / max(self.characters, 1))

    def sentence(self) -> str:
        """The counts in words."""
        parts = [
            f"{self.unknown_tokens:,} of {self.tokens:,} tokens are unknown, with {self.unknown_characters:,} of "
            f"{self.characters:,} characters",
            f"{self.lost_characters:,} characters got no token",
        ]
        if self.removed_characters:
            parts.append(f"{self.removed_characters:,} were removed by the normalizer")
        examples = _listed(self.examples)
        return "; ".join(parts) + (f". Most frequent among the lost: {examples}." if examples else ".")

    def record(self, shown: int = SHOWN) -> dict[str, Any]:
        """As JSON, with the most frequent examples as pairs."""
        return asdict(self) | {name: _most_frequent(getattr(self, name), shown) for name in EXAMPLES}

    @classmethod
    def of_record(cls, record: dict[str, Any]) -> Coverage:
        """What ``record`` wrote; a field of a later version is passed over."""
        known = {each.name for each in fields(cls)}
        values = {name: value for name, value in record.items() if name in known}
        return cls(**values | {name: Counter(dict(record.get(name, []))) for name in EXAMPLES})


EXAMPLES = ("examples", "removed_examples")
"""The fields of ``Coverage`` that hold examples."""


def sum_coverage(parts: Iterable[Coverage]) -> Coverage:
    """The sum of ``parts``."""
    sums: Counter[str] = Counter()
    examples: dict[str, Counter[str]] = {name: Counter() for name in EXAMPLES}
    for part in parts:
        sums.update({name: value for name, value in vars(part).items() if name not in EXAMPLES})
        for name in EXAMPLES:
            examples[name].update(getattr(part, name))
    values: dict[str, Any] = {**sums, **examples}
    return Coverage(**values)


def lost_share_problem(lost: Coverage, allowed: float) -> str | None:
    """The sentence for a text of which a larger share than ``allowed`` is lost."""
    if lost.share <= allowed:
        return None
    return (
        f"The tokenizer loses {lost.share:.2%} of the text, more than `lost_share` ({allowed:g}) allows: "
        f"{lost.sentence()} The byte-level tokenizer `bpe` loses nothing and `sentencepiece` falls back to "
        "bytes; a new `wordpiece` learns the characters of this text. Choose one of them with `tokenizer`, or raise "
        "`lost_share`: what is finished is kept."
    )


def removal_warning(counts: Coverage) -> str | None:
    """The warning for a text of which the normalizer removes a larger share than ``REMOVED``."""
    share = counts.removed_characters / max(counts.characters, 1)
    if share <= REMOVED:
        return None
    return (
        f"Warning: the normalizer of the tokenizer removes {share:.1%} of the characters of the text "
        f"({counts.removed_characters:,} of {counts.characters:,}), most often {_listed(counts.removed_examples)}. "
        "The model will never see them. If you need them, change `normalizer` in tokenizer.json, or choose another "
        "`tokenizer`."
    )


def _listed(examples: Counter[str]) -> str:
    return ", ".join(f"{text!r} {count:,}" for text, count in _most_frequent(examples, SHOWN))


def _most_frequent(examples: Counter[str], count: int) -> list[tuple[str, int]]:
    return sorted(examples.items(), key=lambda pair: (-pair[1], pair[0]))[:count]


class CoverageCounter:
    """Counts what ``tokenizer`` loses. One for each process: it remembers what it learnt about characters."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer, self._backend = tokenizer, tokenizer.backend
        content = json.loads(self._backend.to_str())
        model = content["model"]
        unk = model.get("unk_id") if "unk_id" in model else self._backend.token_to_id(model.get("unk_token") or "")
        self._unk: int | None = unk
        self._longest = model.get("max_input_chars_per_word", LONGEST_WORD)
        self.needs_encodings = model["type"] == "WordLevel"
        """Whether unknown tokens are so frequent that texts are better encoded with offsets at once."""
        self._bpe = model if model["type"] == "BPE" and self._unk is None else None
        self._vocabulary = self._backend.get_vocab(with_added_tokens=False) if self._bpe else {}
        steps = _steps(content["normalizer"])
        self._normalizes_to_bytes = any(step["type"] == "ByteLevel" for step in steps)
        self._byte_level = self._normalizes_to_bytes or '"ByteLevel"' in json.dumps(content["pre_tokenizer"])
        # what a Prepend adds stands for no character, and bytes are none
        steps = [step for step in steps if step["type"] not in ("Prepend", "ByteLevel")]
        keeping = [step for step in steps if not _removes_text(step)]
        self._keeping = _normalizer(keeping)
        self._removing = _normalizer(steps) if keeping != steps else None
        # pre-tokenizers that drop what they split at
        self._drops = re.search(r'"Removed"|"CharDelimiterSplit"', json.dumps(content["pre_tokenizer"])) is not None
        added = [
            re.escape(t.content)
            for t in self._backend.get_added_tokens_decoder().values()
            if t.content not in tokenizer.roles.values()
        ]
        self._added = re.compile("|".join(sorted(added, key=len, reverse=True))) if added else None
        self._removed: dict[str, bool] = {}
        self._gives_unknown: dict[str, bool] = {}
        self._lost_word = lru_cache(100_000)(self._lost_in)

    def __call__(
        self, texts: Sequence[str], ids: Sequence[Int64[np.ndarray, " _"]], encodings: Sequence[Encoding] | None = None
    ) -> Coverage:
        """Counts over ``texts``, whose tokens are ``ids``; ``encodings`` spare encoding some of them again."""
        histogram = _histogram(texts)
        unknown = [int((each == self._unk).sum()) for each in ids] if self._unk is not None else [0] * len(ids)
        surfaces: Counter[str] = Counter()
        suspects = self._suspects(histogram) if any(unknown) and encodings is None else _any_of("")
        for number in np.flatnonzero(unknown).tolist():
            if encodings is not None:
                surfaces.update(self._surfaces(texts[number], encodings[number]))
            else:
                surfaces.update(self._unknown_in(texts[number], unknown[number], len(ids[number]), suspects))
        lost: Counter[str] = Counter()
        for word, times in self._words_to_check(texts, histogram).items():
            for character in self._lost_word(word):
                lost[character] += times
        examples = surfaces + lost
        removed = self._removed_from(texts, histogram)
        return Coverage(
            tokens=sum(map(len, ids)),
            characters=sum(histogram.values()),
            unknown_tokens=sum(unknown),
            unknown_characters=sum(len("".join(text.split())) * times for text, times in surfaces.items()),
            lost_characters=lost.total(),
            removed_characters=removed.total(),
            examples=Counter(dict(_most_frequent(_shortened(examples), KEPT))),
            removed_examples=Counter(dict(_most_frequent(removed, KEPT))),
        )

    # unknown tokens

    def _surfaces(self, text: str, encoding: Encoding) -> Iterator[str]:
        """The text of each unknown token."""
        return (
            text[begin:end]
            for number, (begin, end) in zip(encoding.ids, encoding.offsets, strict=True)
            if number == self._unk
        )

    def _unknown_in(self, text: str, count: int, tokens: int, suspects: re.Pattern[str]) -> list[str]:
        """The texts of the ``count`` unknown tokens of ``text``: by the words that may be the reason, else by all."""
        if count <= FEW * tokens:
            words = list(_words_with(suspects, text))
            for more in (False, True):
                if more:
                    words += [w for w in text.split() if len(w) > self._longest and not suspects.search(w)]
                encodings = self._tokenizer.encodings(words)
                surfaces = [s for word, each in zip(words, encodings, strict=True) for s in self._surfaces(word, each)]
                if len(surfaces) == count:
                    return surfaces
        return list(self._surfaces(text, *self._tokenizer.encodings([text])))

    def _suspects(self, characters: Iterable[str]) -> re.Pattern[str]:
        """Finds those of ``characters`` that give an unknown token, alone or inside a word."""
        new = [c for c in characters if c not in self._gives_unknown]
        alone, inside = (self._tokenizer.encode([c * times for c in new]) for times in (1, 3))
        for character, *encoded in zip(new, alone, inside, strict=True):
            self._gives_unknown[character] = any(self._unk in ids for ids in encoded)
        return _any_of("".join(c for c in characters if self._gives_unknown[c]))

    # characters without a token

    def _words_to_check(self, texts: Sequence[str], histogram: dict[str, int]) -> Counter[str]:
        """Words that may lose characters, with how often each occurs."""
        if self._drops:
            return Counter(word for text in texts for word in text.split())
        suspects = [c for c in histogram if self._bpe and (self._lost_word(c) or self._lost_word(c * 3))]
        if not suspects:
            return Counter()
        pattern = _any_of("".join(suspects))
        return Counter(word for text in texts for word in _words_with(pattern, text))

    def _lost_in(self, word: str) -> tuple[str, ...]:
        """The characters of ``word``, as they are after the normalizer, that no token stands for."""
        lost: list[str] = []
        for part in self._without_added(word):
            text = normalized(self._backend, part)
            pieces = [(text, (0, len(text)))]
            if self._backend.pre_tokenizer:
                pieces = self._backend.pre_tokenizer.pre_tokenize_str(text)
            covered = np.zeros(len(text), bool)
            places: set[int] = set()  # in the text, if it consists of bytes: pieces may be parts of a character
            for piece, (begin, end) in pieces:
                covered[begin:end] = True
                dropped = self._dropped_by_model(piece)
                if self._normalizes_to_bytes:
                    # what a pre-tokenizer adds, it puts before the piece
                    places.update(max(end - len(piece) + at, begin) for at in dropped)
                else:
                    lost += _characters(piece, dropped, as_bytes=self._byte_level)
            places.update(np.flatnonzero(~covered).tolist())
            lost += _characters(text, sorted(places), as_bytes=self._normalizes_to_bytes)
        return tuple(lost)

    def _dropped_by_model(self, piece: str) -> list[int]:
        """Where a BPE without unknown token has no token for a character of ``piece``, by the rules of its library."""
        model = self._bpe
        if not model or (model.get("ignore_merges") and piece in self._vocabulary):
            return []
        prefix, suffix = model.get("continuing_subword_prefix") or "", model.get("end_of_word_suffix") or ""
        last = len(piece) - 1
        dropped = []
        for at, character in enumerate(piece):
            token = (prefix if at else "") + character + (suffix if at == last else "")
            by_bytes = model.get("byte_fallback") and all(
                f"<0x{byte:02X}>" in self._vocabulary for byte in token.encode()
            )
            if token not in self._vocabulary and not by_bytes and not character.isspace():
                dropped.append(at)
        return dropped

    # characters that the normalizer removes

    def _removed_from(self, texts: Sequence[str], histogram: dict[str, int]) -> Counter[str]:
        """The characters of ``texts`` that the normalizer removes, with how often each occurs."""
        removed = Counter({c: times for c, times in histogram.items() if self._is_removed(c)})
        if self._removing is None:
            return removed
        # by context: what is there without the removing steps, less what is there with them
        kept, left = (
            Counter(_histogram([normalized(backend, part) for text in texts for part in self._without_added(text)]))
            for backend in (self._keeping, self._removing)
        )
        # a mark goes on purpose where accents do
        return removed + Counter(
            {c: n for c, n in (kept - left).items() if not (c.isspace() or c == METASPACE or unicodedata.combining(c))}
        )

    def _without_added(self, text: str) -> list[str]:
        """The parts of ``text`` between the tokens that were added."""
        return self._added.split(text) if self._added else [text]

    def _is_removed(self, character: str) -> bool:
        """Whether nothing is left of ``character``, wherever it stands."""
        if character not in self._removed:
            gone = not normalized(self._keeping, character).strip()
            self._removed[character] = gone and not character.isspace()
        return self._removed[character]


def _steps(normalizer: dict[str, Any] | None) -> list[dict[str, Any]]:
    """The normalizers of a tokenizer file in their order, without the sequences that hold them."""
    if normalizer is None:
        return []
    if normalizer["type"] == "Sequence":
        return [step for part in normalizer["normalizers"] for step in _steps(part)]
    return [normalizer]


def _normalizer(steps: list[dict[str, Any]]) -> Backend:
    """A tokenizer that has ``steps`` as its normalizer, and is good for nothing else."""
    content = json.loads(Backend(models.BPE()).to_str())
    return Backend.from_str(json.dumps(content | {"normalizer": {"type": "Sequence", "normalizers": steps}}))


def _removes_text(step: dict[str, Any]) -> bool:
    """Whether a normalizer is a ``Replace`` that leaves nothing, or a blank, of something beside blanks."""
    if step["type"] != "Replace" or step["content"].replace(METASPACE, "").strip():
        return False
    [(kind, pattern)] = step["pattern"].items()
    if kind == "Regex":  # without what a pattern of whitespace consists of
        pattern = re.sub(r"\\[snrtfv]|\{[\d,]*\}|[\[\]()|+*?$]", "", pattern.removeprefix("^"))
    return bool(pattern.replace(METASPACE, "").strip())


def _any_of(characters: str) -> re.Pattern[str]:
    return re.compile(f"[{re.escape(characters)}]" if characters else r"(?!)")


def _words_with(pattern: re.Pattern[str], text: str) -> Iterator[str]:
    """The words between whitespace in which ``pattern``, a set of characters, is found."""
    end = 0
    for match in pattern.finditer(text):
        if match.start() < end or match[0].isspace():
            continue
        begin, end = match.span()
        while begin and not text[begin - 1].isspace():
            begin -= 1
        while end < len(text) and not text[end].isspace():
            end += 1
        yield text[begin:end]


def _characters(text: str, places: Sequence[int], *, as_bytes: bool) -> list[str]:
    """The characters at ``places``, beside whitespace; those that the bytes there belong to, if ``as_bytes``."""
    if as_bytes and all(c in BYTE_OF for c in text):
        return _characters_at(bytes(BYTE_OF[c] for c in text), set(places))
    return [text[at] for at in places if not text[at].isspace()]


def _characters_at(text: bytes, places: set[int]) -> list[str]:
    """The characters of a UTF-8 text of which a byte stands at ``places``."""
    begins = [at for at, byte in enumerate(text) if byte & 0xC0 != 0x80] + [len(text)]
    return [
        text[begin:end].decode(errors="replace")
        for begin, end in pairwise(begins)
        if not places.isdisjoint(range(begin, end)) and not text[begin:end].isspace()
    ]


def _shortened(examples: Counter[str]) -> Counter[str]:
    """Examples of at most ``LONGEST_EXAMPLE`` characters, without surrounding space unless they are nothing else."""
    short: Counter[str] = Counter()
    for text, times in examples.items():
        text = text.strip() or text
        short[text if len(text) <= LONGEST_EXAMPLE else text[: LONGEST_EXAMPLE - 1] + "…"] += times
    return short


def _histogram(texts: Sequence[str]) -> dict[str, int]:
    """How often each character occurs."""
    counts = np.zeros(sys.maxunicode + 1, np.int64)
    for chunk in _chunks(texts):
        here = np.bincount(np.frombuffer(chunk.encode("utf-32-le"), np.uint32))
        counts[: len(here)] += here
    return {chr(c): int(counts[c]) for c in np.flatnonzero(counts)}


def _chunks(texts: Sequence[str]) -> Iterator[str]:
    """The texts joined to strings that fit into a processor's cache, unless one is longer by itself."""
    chunk: list[str] = []
    size = 0
    for text in texts:
        chunk.append(text)
        size += len(text)
        if size >= 2**15:
            yield "".join(chunk)
            chunk, size = [], 0
    yield "".join(chunk)


def _byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for (Radford et al., 2019)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    return {chr(b): b for b in shown} | {chr(256 + n): b for n, b in enumerate(hidden)}


BYTE_OF = _byte_alphabet()
