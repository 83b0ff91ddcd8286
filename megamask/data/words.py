"""Where words begin: by the marks that a tokenizer puts on its tokens."""

from __future__ import annotations

import json
import re
import unicodedata

import numpy as np
from jaxtyping import Bool

from megamask.data.tokenizer import WORD, Tokenizer, token_ids


def word_starts(tokenizer: Tokenizer) -> Bool[np.ndarray, " V"]:
    """For each id, whether a token of that id begins a word.

    WordPiece: every token without "##". SentencePiece and byte-level BPE: tokens with the mark of a space, and,
    as in WordPiece, tokens that begin with neither letter, digit nor combining mark, so that a comma after a word
    is a word of its own. A table by id cannot see what stands before: letters that follow punctuation without a
    space ("t" in "don't") belong to the word that the punctuation began. Special tokens begin words.
    """
    ids = token_ids(tokenizer)
    model = json.loads(tokenizer.backend.to_str())
    starts = np.ones(ids.size, bool)
    special = set(ids.special)
    prefix = model["model"].get("continuing_subword_prefix") or ""
    is_wordpiece = model["model"]["type"] == "WordPiece"
    byte_level = '"ByteLevel"' in json.dumps([model["pre_tokenizer"], model["decoder"]])
    for token, number in tokenizer.backend.get_vocab(with_added_tokens=True).items():
        if number in special:
            continue
        if is_wordpiece:
            starts[number] = not token.startswith(prefix)
        elif byte_level:
            starts[number] = _begins_word(bytes(_BYTE_OF[c] for c in token if c in _BYTE_OF))
        elif re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            starts[number] = _begins_word(bytes([int(token[3:5], 16)]))
        else:
            starts[number] = token.startswith(WORD) or _begins_word(token.encode())
    return starts


def _begins_word(piece: bytes) -> bool:
    """Whether the first character of ``piece`` is whitespace, punctuation or a symbol; half a character is not."""
    text = piece.decode(errors="ignore")
    if not text or not piece.startswith(text[0].encode()):
        return False
    # a combining mark carries on the letter before it
    return not (text[0].isalnum() or unicodedata.category(text[0]).startswith("M"))


def _byte_alphabet() -> dict[str, int]:
    """The byte that each character of a byte-level vocabulary stands for (Radford et al., 2019)."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [b for b in range(256) if b not in shown]
    return {chr(b): b for b in shown} | {chr(256 + n): b for n, b in enumerate(hidden)}


_BYTE_OF = _byte_alphabet()
