"""Tokenizers: loading, special ids, encoding.

A tokenizer folder contains ``tokenizer.json`` and ``tokenizer_config.json``, which ``transformers.AutoTokenizer``
loads as a fast tokenizer. Encoding runs at about 3 MB of text per second and core; the result does not depend on the
number of threads. ``tokenizer_training`` trains new tokenizers, ``word_boundaries`` finds where words begin,
``lost_text`` counts what a tokenizer loses.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import Int64
from tokenizers import Encoding
from tokenizers import Tokenizer as Backend

from megamask.basic_types import TokenIds
from megamask.errors import ConfigError, DataError, must, raise_all
from megamask.storage import strict_json

TOKENIZER = "tokenizer"
"""Name of a tokenizer's folder beside shards, beside weights and in a run."""
ROLES = ("pad", "unk", "cls", "sep", "mask")
SPECIAL = tuple(f"[{role.upper()}]" for role in ROLES)
DEFAULT_TOKENS = {
    "pad": ("[PAD]", "<pad>"), "unk": ("[UNK]", "<unk>"), "cls": ("[CLS]", "<s>"), "sep": ("[SEP]", "</s>"),
    "mask": ("[MASK]", "<mask>"),
}  # fmt: skip
METASPACE = "▁"


@dataclass(frozen=True)
class Tokenizer:
    """A fast tokenizer and the names of its special tokens by role (``pad``, ``unk``, ``cls``, ``sep``, ``mask``)."""

    backend: Backend
    roles: dict[str, str]
    switched_off: tuple[str, ...] = ()
    """Settings that ``load_tokenizer`` switched off, such as "dropout 0.1"; see ``switch_off``."""

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    @cached_property
    def _encoder(self) -> Backend:
        """The backend that encodes text: the names of the roles are text, any other added token is one token."""
        content = json.loads(self.backend.to_str())
        own = set(self.roles.values())
        for token in content.get("added_tokens", []):
            token["special"] = token["content"] in own
        encoder = Backend.from_str(json.dumps(content))
        encoder.encode_special_tokens = True
        return encoder

    def encode(self, texts: Sequence[str]) -> list[Int64[np.ndarray, " n"]]:
        """The ids of each text, without [CLS] and [SEP].

        "[MASK]" and the names of other roles in a text are text. An added token is one token.
        """
        with _as_data_error("The tokenizer cannot encode the text"):
            encodings = self._encoder.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int64) for encoding in encodings]

    def encodings(self, texts: Sequence[str]) -> list[Encoding]:
        """The library's encoding of each text: the ``ids`` of ``encode``, ``offsets`` and ``word_ids``.

        Offsets count characters of the text. They include the space that is part of a token; tokens of parts of a
        character have the offsets of the whole character. Takes 5 to 20 % longer than ``encode``; reading the offsets
        takes as much again.
        """
        with _as_data_error("The tokenizer cannot encode the text"):
            return self._encoder.encode_batch(list(texts), add_special_tokens=False)

    def encode_with_offsets(
        self, texts: Sequence[str]
    ) -> list[tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, "n 2"]]]:
        """The ids of each text as in ``encode``, and the begin and end of each token, in characters of the text."""
        return [(np.array(each.ids, np.int64), token_offsets(each)) for each in self.encodings(texts)]

    def split_at_added_tokens(self, text: str) -> list[str]:
        """The parts of ``text`` between added tokens, of which the names of the roles are text."""
        return self._added_tokens.split(text)

    @cached_property
    def _added_tokens(self) -> re.Pattern[str]:
        contents = {token.content for token in self.backend.get_added_tokens_decoder().values()}
        names = sorted(contents - set(self.roles.values()), key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) or r"(?!)")

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ``ids``, special tokens included."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def hash(self) -> str:
        """sha256 of the content of ``tokenizer.json``, independent of its layout."""
        return _canonical_hash(self.backend.to_str())

    def save(self, folder: Path) -> None:
        """Write the two files that ``AutoTokenizer`` reads."""
        folder.mkdir(parents=True, exist_ok=True)
        self.backend.save(str(folder / "tokenizer.json"))
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
        } | {f"{role}_token": token for role, token in self.roles.items()}
        (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n")


def token_offsets(encoding: Encoding) -> Int64[np.ndarray, "n 2"]:
    """The begin and end of each token, in characters of the text."""
    return np.array(encoding.offsets, np.int64).reshape(-1, 2)


@contextmanager
def _as_data_error(what: str) -> Iterator[None]:
    """Turn any error of the library into a DataError that begins with ``what``."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # its panics are not an Exception
        raise DataError(f"{what}: {' '.join(str(error).split())[:300]}.") from None


def tokenizer_hash(folder: Path) -> str:
    """``Tokenizer.hash`` of the tokenizer in ``folder``, without loading it."""
    return _canonical_hash(_read_json(folder / "tokenizer.json", folder))


def _canonical_hash(source: str | dict) -> str:
    content = json.loads(source) if isinstance(source, str) else source
    # a tokenizer with other temporary settings is the same tokenizer
    content = {key: value for key, value in content.items() if key not in ("truncation", "padding")}
    if isinstance(model := content.get("model"), dict) and model.get("dropout"):
        content["model"] = model | {"dropout": None}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def switch_off(backend: Backend) -> tuple[str, ...]:
    """Switch off settings that make encodings random or truncate texts, and return their names.

    These are truncation, padding, the dropout of BPE (Provilkov et al. 2020) and the sampling of Unigram (Kudo 2018).
    """
    switches = []
    if backend.truncation:
        switches.append(f"truncation to {backend.truncation['max_length']} tokens")
        backend.no_truncation()
    if backend.padding:
        switches.append("padding")
        backend.no_padding()
    for name in ("dropout", "alpha", "nbest_size"):
        if value := getattr(backend.model, name, None):
            switches.append(f"{name} {value:g}")
            setattr(backend.model, name, None)
    return tuple(switches)


def token_ids(tokenizer: Tokenizer) -> TokenIds:
    """The special ids. ConfigError for each of mask, pad, cls and sep that is missing."""
    known = tokenizer.backend.get_vocab(with_added_tokens=True)
    problems, ids = [], {}
    for role in ROLES:
        token = tokenizer.roles.get(role)
        if token in known:
            ids[role] = known[token]
        elif role != "unk":
            problems.append(
                f"The tokenizer has no {role} token"
                + (f" (its configuration says {token!r}, which is not in its vocabulary)" if token else "")
                + ". A masked language model needs pad, cls, sep and mask: add them, or train a tokenizer."
            )
    for role in ("pad", "cls", "sep"):
        if "mask" in ids and ids.get(role) == ids["mask"]:
            problems.append(
                f"The tokenizer has one token for mask and {role}, {tokenizer.roles[role]!r}: separate them."
            )
    raise_all(ConfigError, problems)
    added = tokenizer.backend.get_added_tokens_decoder()
    special = {i for i, token in added.items() if token.special} | set(ids.values())
    return TokenIds(
        size=tokenizer.size, cls=ids["cls"], sep=ids["sep"], pad=ids["pad"], mask=ids["mask"],
        special=tuple(sorted(special)),
    )  # fmt: skip


# ---- an existing tokenizer


def load_tokenizer(source: str | Path) -> Tokenizer:
    """The fast tokenizer in a folder, or of a Hugging Face name. DataError if there is none."""
    folder = Path(source)
    if not folder.is_dir():
        folder = _from_hub(str(source))
    _read_json(folder / "tokenizer.json", folder)
    with _as_data_error(f"{folder / 'tokenizer.json'} is not a tokenizer"):
        backend = Backend.from_file(str(folder / "tokenizer.json"))
    raise_all(DataError, list(_vocabulary_problems(backend, folder / "tokenizer.json")))
    switched_off = switch_off(backend)
    config: dict = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).exists():
            config |= _read_json(folder / name, folder)
    vocabulary = backend.get_vocab(with_added_tokens=True)
    roles = {}
    for role in ROLES:
        token = config.get(f"{role}_token")
        token = token.get("content") if isinstance(token, dict) else token
        token = token or next((usual for usual in DEFAULT_TOKENS[role] if usual in vocabulary), None)
        if token is not None and not isinstance(token, str):
            raise DataError(must(f"{folder / name}: {role}_token", "be a string", str(token)))
        if token:
            roles[role] = token
    return Tokenizer(backend, roles, switched_off)


def _vocabulary_problems(backend: Backend, path: Path) -> Iterator[str]:
    """The problems of ids: two tokens share an id, or there are more gaps than tokens. Tables are indexed by id."""
    vocabulary = backend.get_vocab(with_added_tokens=True)
    by_id: dict[int, str] = {}
    for token, number in vocabulary.items():
        if number in by_id:
            yield f"{path} gives the id {number} to two tokens, {by_id[number]!r} and {token!r}."
            return
        by_id[number] = token
    if not by_id:
        yield f"{path} has no tokens."
    elif max(by_id) >= 2 * len(by_id) + 1024:
        yield f"{path} has {len(by_id)} tokens, but ids up to {max(by_id)}. Number them without such gaps."


def _read_json(path: Path, folder: Path) -> dict:
    missing = f"{folder} contains no {path.name}, so it is not a fast tokenizer. " + (
        f"Name {folder / TOKENIZER} instead."
        if (folder / TOKENIZER / path.name).is_file()
        else "Save one there with `save_pretrained` of a fast tokenizer of transformers."
    )
    return strict_json.read_object(path, DataError, missing)


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    wanted = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # no such name, no network, no permission: one message for all
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            must("tokenizer", "be 'wordpiece', 'bpe', 'sentencepiece', 'sentencepiece-bpe', a tokenizer folder or the "
                 "name of one", name) + f" Looking for that name failed: {reason}"
        ) from None  # fmt: skip


def disable_parallelism() -> None:
    """Limit the tokenizers library to one thread in this process. Worker processes call this."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
