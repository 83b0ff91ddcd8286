"""A tokenizer object of transformers as ours, for those who have one in hand: its special ids, where words begin."""

from __future__ import annotations

import copy

from megamask.data.tokenizer import ROLES, Tokenizer, switch_off
from megamask.errors import DataError
from megamask.hf import lazy_transformers


def to_fast_tokenizer(theirs: lazy_transformers.PreTrainedTokenizerBase) -> Tokenizer:
    """The same tokenizer as ``data.tokenizer`` knows it; ``token_ids`` there and ``data.words.encode_words`` take it.

    ``theirs`` is not changed by what is done to ours. Raises DataError if it is no fast tokenizer.
    """
    if not getattr(theirs, "is_fast", False):
        raise DataError(
            f"{type(theirs).__name__} is no fast tokenizer, so what it does cannot be read. "
            "Load it with `AutoTokenizer.from_pretrained`, which takes the fast one where there is one."
        )
    roles = {role: getattr(theirs, f"{role}_token") for role in ROLES}
    backend = copy.deepcopy(theirs.backend_tokenizer)  # type: ignore[attr-defined]
    switch_off(backend)
    return Tokenizer(backend, {role: token for role, token in roles.items() if token})
