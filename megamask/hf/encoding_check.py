"""Check that transformers encodes text as training does, by comparing the ids of a few sentences.

Training reads ``[CLS]``, the ids of the text from ``data.tokenizer``, ``[SEP]``. A user of the model calls
``AutoTokenizer`` on its folder. The two can differ: a missing post-processor, another normalizer in the configuration
than in ``tokenizer.json``, tokens that only one of them knows. The names of the five special tokens written in a text
are text in training and tokens in transformers. That is intended, so sentences that contain them are not compared.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from megamask.data.tokenizer import Tokenizer, token_ids
from megamask.errors import DataError
from megamask.hf import lazy_transformers

SENTENCES = (
    "The capital of France is Paris.",
    "She opened the old book and began to read aloud, slowly at first, then faster, until nobody in the room moved.",
    "Water boils at 100 degrees, or 212 °F; it doesn't at 8,848 m.",
    "  Naïve CAFÉ owners   paid €3.50 (£2.99)\tfor ½ litre:\nwhy?  ",
    "Москва — столица России, и 東京 是日本的首都。",
    "Die Straße nach Łódź führt über Ærøskøbing; İstanbul 😀 मुंबई",
)
"""Several scripts, cases, accents, runs of spaces: what normalizers and pre-tokenizers treat differently."""
ADDED = 20
"""Added tokens that are compared."""
SHOWN = 12
"""Ids of each list that an error shows."""


@dataclass(frozen=True)
class EncodingDifference:
    """A text that training and transformers encode differently, with the ids of both."""

    text: str
    own_ids: list[int]
    hf_ids: list[int]

    def __str__(self) -> str:
        return self.sentence("training")

    def sentence(self, name: str) -> str:
        """The sentence; ``name`` is what encodes as ``own_ids``."""
        pairs = zip(self.own_ids, self.hf_ids, strict=False)
        first = next((n for n, (one, other) in enumerate(pairs) if one != other), 0)
        begin = max(0, first - 2)
        text = json.dumps(self.text if len(self.text) <= 80 else f"{self.text[:77]}...", ensure_ascii=False)
        return (
            f"{name} encodes {text} as {_short(self.own_ids, begin)} ({len(self.own_ids)} ids), transformers as "
            f"{_short(self.hf_ids, begin)} ({len(self.hf_ids)} ids)"
        )


def _short(ids: list[int], begin: int) -> str:
    shown = ", ".join(map(str, ids[begin : begin + SHOWN]))
    return f"[{'..., ' if begin else ''}{shown}{', ...' if begin + SHOWN < len(ids) else ''}]"


def encoding_difference(
    tokenizer: Tokenizer,
    hf_tokenizer: lazy_transformers.PreTrainedTokenizerBase,
    sentences: Sequence[str] = (),
    *,
    around: bool = True,
) -> EncodingDifference | None:
    """The first text that the two encode differently, with [CLS] and [SEP] ``around`` it; None if they agree.

    Compares ``sentences``, a few in several scripts, and texts with added tokens.
    """
    ids = token_ids(tokenizer)
    texts = [
        text for text in (*sentences, *SENTENCES, *_with_added_tokens(tokenizer)) if not _names_a_role(text, tokenizer)
    ]
    for text, tokens in zip(texts, tokenizer.encode(texts), strict=True):
        expected = [ids.cls, *tokens.tolist(), ids.sep] if around else tokens.tolist()
        try:
            actual = list(hf_tokenizer(text, add_special_tokens=around)["input_ids"])
        except Exception as error:  # a malformed configuration can make the library raise anything
            reason = " ".join(str(error).split())[:300]
            raise DataError(f"The tokenizer cannot encode {text!r} in transformers: {reason}") from None
        if actual != expected:
            return EncodingDifference(text, expected, actual)
    return None


def _names_a_role(text: str, tokenizer: Tokenizer) -> bool:
    return any(role.lower() in text.lower() for role in tokenizer.roles.values())


def _with_added_tokens(tokenizer: Tokenizer) -> Iterable[str]:
    """Texts with each added token, between spaces and between letters."""
    roles = set(tokenizer.roles.values())
    added = [token.content for token in tokenizer.backend.get_added_tokens_decoder().values()]
    for token in [content for content in added if content not in roles][:ADDED]:
        yield f"one {token} two{token}three"
