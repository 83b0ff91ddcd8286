"""Counts of the text that a tokenizer loses, and the sentences that report them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields
from typing import Any

SHOWN = 10
"""Number of examples in a manifest and in a sentence."""
KEPT = 1000
"""Number of different examples that are kept of a part of the text; counts of rarer ones are lower bounds."""
REMOVED = 0.05
"""If the normalizer removes a larger share of the characters, a warning says so."""
MAX_EXAMPLE = 40
"""Characters of an example."""
EXAMPLES = ("examples", "removed_examples")
"""The fields of ``Coverage`` that hold examples."""


@dataclass(frozen=True)
class Coverage:
    """Counts over some documents of one split."""

    tokens: int = 0
    characters: int = 0
    """All characters of the documents, whitespace included."""
    bytes: int = 0
    """Of these characters in UTF-8; 0 in the record of an earlier version."""
    unknown_tokens: int = 0
    unknown_characters: int = 0
    """Characters inside unknown tokens."""
    lost_characters: int = 0
    """Characters that get no token."""
    removed_characters: int = 0
    """Characters that the normalizer removes."""
    examples: Counter[str] = field(default_factory=Counter)
    """The texts of unknown tokens and the characters without a token, with how often each occurs."""
    removed_examples: Counter[str] = field(default_factory=Counter)
    """The removed characters, with how often each occurs."""

    @property
    def share(self) -> float:
        """Share of the text that is lost: by tokens or by characters, whichever is larger."""
        lost = self.unknown_characters + self.lost_characters
        return max(self.unknown_tokens / max(self.tokens, 1), lost / max(self.characters, 1))

    def sentence(self) -> str:
        """The counts as a sentence."""
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
        """A JSON object, with the most frequent examples as pairs."""
        return asdict(self) | {name: most_frequent(getattr(self, name), shown) for name in EXAMPLES}

    @classmethod
    def of_record(cls, record: dict[str, Any]) -> Coverage:
        """The inverse of ``record``; fields of a later version are ignored."""
        known = {each.name for each in fields(cls)}
        values = {name: value for name, value in record.items() if name in known}
        return cls(**values | {name: Counter(dict(record.get(name, []))) for name in EXAMPLES})


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
    """The error for a text of which the tokenizer loses more than the share ``allowed``; None if it does not."""
    if lost.share <= allowed:
        return None
    return (
        f"The tokenizer loses {lost.share:.2%} of the text, more than `lost_share` ({allowed:g}) allows: "
        f"{lost.sentence()} The byte-level tokenizer `bpe` loses nothing and `sentencepiece` falls back to "
        "bytes; a new `wordpiece` learns the characters of this text. Choose one of them with `tokenizer`, or raise "
        "`lost_share`: what is finished is kept."
    )


def removal_warning(counts: Coverage) -> str | None:
    """The warning for a text of which the normalizer removes more than the share ``REMOVED``; None if it does not."""
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
    return ", ".join(f"{text!r} {count:,}" for text, count in most_frequent(examples, SHOWN))


def most_frequent(examples: Counter[str], count: int) -> list[tuple[str, int]]:
    """The ``count`` most frequent examples, from the most frequent on."""
    return sorted(examples.items(), key=lambda pair: (-pair[1], pair[0]))[:count]


def shortened(examples: Counter[str]) -> Counter[str]:
    """Examples of at most ``MAX_EXAMPLE`` characters, without surrounding space unless they are nothing else."""
    short: Counter[str] = Counter()
    for text, times in examples.items():
        text = text.strip() or text
        short[text if len(text) <= MAX_EXAMPLE else text[: MAX_EXAMPLE - 1] + "…"] += times
    return short
