"""Compare two tokenizers: whether they give the same ids for every text. Compare a tokenizer with rows of weights.

Compares the contents of ``tokenizer.json`` after the library has read and written them, so that files of different
versions can be compared. Truncation, padding, decoding and the special tokens around a text do not matter.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from megamask.data.tokenizer import Tokenizer, load_tokenizer, token_ids

SAME = "both must be the same tokenizer."
SHOWN = 5
MOST_PADDING = 128
"""Vocabularies are padded to multiples of at most this, so weights have fewer rows than this without a token."""
MOST_SPARE = 0.1
"""Share of rows without a token up to which weights are accepted without a note."""


def tokenizer_differences(one: Path, name: str, two: Path, other: str) -> list[str]:
    """The differences of the tokenizers in the folders ``one`` and ``two``, called ``name`` and ``other`` in messages.

    Lists the first five tokens that differ, or else the first rule. Raises DataError if a folder contains no fast
    tokenizer, ConfigError if a special token is missing.
    """
    left, right = load_tokenizer(one), load_tokenizer(two)
    if left.size != right.size:
        return [f"`{name}` has a vocabulary of {left.size} tokens, but {other} has {right.size}; {SAME}"]
    problems = _vocabularies(left, right, name, other)
    ids, others = token_ids(left), token_ids(right)
    for role in ("cls", "sep", "pad", "mask"):
        if (one_id := getattr(ids, role)) != (two_id := getattr(others, role)):
            problems.append(f"`{name}` has the id {one_id} as its {role} token, but {other} has {two_id}; {SAME}")
    if not problems:
        problems = _rules(left, right, f"{one / 'tokenizer.json'} and {two / 'tokenizer.json'}")
    return problems


def tokenizer_cure(folder: Path, name: str) -> str:
    """How to prepare text with the tokenizer in ``folder``, that of the model that the setting ``name`` names."""
    return (
        f"Prepare the text with the tokenizer of `{name}`: `megamask prepare --input TEXT --tokenizer {folder} "
        "--output FOLDER`. Then set `data` to the new folder."
    )


def spare_rows_note(where: Path, rows: int, tokens: int) -> str:
    """A note if the weights in ``where`` have far more ``rows`` than the tokenizer has ``tokens``; else ""."""
    spare = rows - tokens
    if spare < MOST_PADDING or spare <= MOST_SPARE * rows:
        return ""
    return (
        f"{where} has weights for {rows:,} tokens, but its tokenizer has only {tokens:,}. Padding explains a few rows "
        "more, not so many. If the tokenizer is that of another model, tokens get the embeddings of other tokens: put "
        f"the right one there. If it is the right one, {spare:,} rows are never used, and cost memory and time."
    )


def _vocabularies(left: Tokenizer, right: Tokenizer, name: str, other: str) -> list[str]:
    a, b = ({i: token for token, i in one.backend.get_vocab(True).items()} for one in (left, right))
    different = [number for number in sorted(a.keys() | b.keys()) if a.get(number) != b.get(number)]
    return [
        f"`{name}` has {_shown(a.get(number))} at the id {number}, but {other} has {_shown(b.get(number))}; {SAME}"
        for number in different[:SHOWN]
    ]


def _shown(token: str | None) -> str:
    return "no token" if token is None else repr(token)


def _rules(left: Tokenizer, right: Tokenizer, files: str) -> list[str]:
    one, two = (json.loads(tokenizer.backend.to_str()) for tokenizer in (left, right))
    for part in ("normalizer", "pre_tokenizer", "model"):
        different = _first(one.get(part), two.get(part), part)
        if different:
            where, a, b = different
            return [f"{files} differ in `{where}`: {_short(a)} in one, {_short(b)} in the other; {SAME}"]
    return []


def _first(a: Any, b: Any, where: str) -> tuple[str, Any, Any] | None:
    """The path of the first leaf in which two JSON values differ, and both leaves."""
    if isinstance(a, dict) and isinstance(b, dict):
        pairs = [(a.get(key), b.get(key), f"{where}.{key}") for key in sorted(a.keys() | b.keys())]
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        pairs = [(x, y, f"{where}[{number}]") for number, (x, y) in enumerate(zip(a, b, strict=True))]
    else:
        return None if a == b else (where, a, b)
    return next((difference for pair in pairs if (difference := _first(*pair))), None)


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else f"{text[:57]}..."
