"""Whether two tokenizers are one: the same tokens under the same ids, cut out of text by the same rules.

Compared is what ``tokenizer.json`` says, read by the library and written again, so that files of several versions can
be compared. Truncation, padding, decoding and what is put around a text make no difference to the ids of a pack.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megamask.data.tokenizer import Tokenizer, load_tokenizer, token_ids

SAME = "both must be the same tokenizer."
SHOWN = 5


def tokenizer_differences(one: Path, name: str, two: Path, other: str) -> list[str]:
    """Sentences for how the tokenizers in the folders ``one`` and ``two`` differ, called ``name`` and ``other``.

    Told are the first five tokens that differ, and the first of the rules. Raises DataError if a folder holds no fast
    tokenizer, ConfigError if one lacks a special token.
    """
    left, right = load_tokenizer(one), load_tokenizer(two)
    if left.size != right.size:
        return [f"`{name}` has a vocabulary of {left.size} tokens, but {other} has {right.size}; {SAME}"]
    found = _vocabularies(left, right, name, other)
    ids, others = token_ids(left), token_ids(right)
    for role in ("cls", "sep", "pad", "mask"):
        if (mine := getattr(ids, role)) != (its := getattr(others, role)):
            found.append(f"`{name}` has the id {mine} as its {role} token, but {other} has {its}; {SAME}")
    if not found:
        found = _rules(left, right, f"{one / 'tokenizer.json'} and {two / 'tokenizer.json'}")
    return found


def _vocabularies(left: Tokenizer, right: Tokenizer, name: str, other: str) -> list[str]:
    mine, its = ({i: token for token, i in found.backend.get_vocab(True).items()} for found in (left, right))
    different = [number for number in sorted(mine.keys() | its.keys()) if mine.get(number) != its.get(number)]
    return [
        f"`{name}` has {_shown(mine.get(number))} at the id {number}, but {other} has {_shown(its.get(number))}; {SAME}"
        for number in different[:SHOWN]
    ]


def _shown(token: str | None) -> str:
    return "no token" if token is None else repr(token)


def _rules(left: Tokenizer, right: Tokenizer, files: str) -> list[str]:
    mine, its = (json.loads(found.backend.to_str()) for found in (left, right))
    for part in ("normalizer", "pre_tokenizer", "model"):
        different = _first(mine.get(part), its.get(part), part)
        if different:
            where, a, b = different
            return [f"{files} differ in `{where}`: {_short(a)} in one, {_short(b)} in the other; {SAME}"]
    return []


def _first(a: Any, b: Any, where: str) -> tuple[str, Any, Any] | None:
    """The path of the first leaf in which two JSON values differ, and both."""
    if isinstance(a, dict) and isinstance(b, dict):
        pairs = [(a.get(key), b.get(key), f"{where}.{key}") for key in sorted(a.keys() | b.keys())]
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        pairs = [(x, y, f"{where}[{number}]") for number, (x, y) in enumerate(zip(a, b, strict=True))]
    else:
        return None if a == b else (where, a, b)
    return next((found for pair in pairs if (found := _first(*pair))), None)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
