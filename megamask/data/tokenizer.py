"""Tokenizers: load or train one, know its special ids and where its words begin, encode text.

A tokenizer folder holds ``tokenizer.json`` and ``tokenizer_config.json``, which ``transformers.AutoTokenizer``
loads as a fast tokenizer. This is the one module that knows the libraries tokenizers and sentencepiece. Training
takes 5 to 60 seconds on 20 MB of text; encoding about 3 MB of text a second and core. Both give the same result
whatever the number of threads.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Bool, Int64
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from megamask import records
from megamask.batch import TokenIds
from megamask.errors import ConfigError, DataError, must, raise_all

Kind = Literal["wordpiece", "bpe", "sentencepiece", "sentencepiece-bpe"]

TOKENIZER = "tokenizer"
"""The folder of a tokenizer, beside shards, beside weights and in a run."""
ROLES = ("pad", "unk", "cls", "sep", "mask")
SPECIAL = tuple(f"[{role.upper()}]" for role in ROLES)
USUAL = {"pad": ("[PAD]", "<pad>"), "unk": ("[UNK]", "<unk>"), "cls": ("[CLS]", "<s>"), "sep": ("[SEP]", "</s>"),
         "mask": ("[MASK]", "<mask>")}  # fmt: skip
WORD = "▁"
ALPHABET = 1000
# below the score of every piece: the text "[MASK]" or "<0x41>" must never become the piece of that name
NEVER = -1e6


@dataclass(frozen=True)
class Tokenizer:
    """A fast tokenizer and the names of its special tokens by role (``pad``, ``unk``, ``cls``, ``sep``, ``mask``)."""

    backend: Backend
    roles: dict[str, str]

    @property
    def size(self) -> int:
        """One more than the largest id."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, texts: Sequence[str]) -> list[Int64[np.ndarray, " n"]]:
        """The ids of each text, without special tokens: "[MASK]" written in a text is text."""
        self.backend.encode_special_tokens = True
        with _refusing("The tokenizer cannot encode the text"):
            found = self.backend.encode_batch_fast(list(texts), add_special_tokens=False)
        self.backend.encode_special_tokens = False
        return [np.array(one.ids, np.int64) for one in found]

    def encode_with_places(
        self, texts: Sequence[str]
    ) -> list[tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, "n 2"]]]:
        """The ids of each text as ``encode`` gives them, and where each token begins and ends, in characters of it.

        The space that a token carries is part of it; tokens of parts of a character have the whole. Slower by half.
        """
        self.backend.encode_special_tokens = True
        with _refusing("The tokenizer cannot encode the text"):
            found = self.backend.encode_batch(list(texts), add_special_tokens=False)
        self.backend.encode_special_tokens = False
        return [(np.array(one.ids, np.int64), np.array(one.offsets, np.int64).reshape(-1, 2)) for one in found]

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of ``ids``, special tokens included."""
        return self.backend.decode([int(i) for i in ids], skip_special_tokens=False)

    def hash(self) -> str:
        """sha256 of what ``tokenizer.json`` says, however it is laid out."""
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


@contextmanager
def _refusing(what: str) -> Iterator[None]:
    """Whatever the library raises becomes a DataError that begins with ``what``."""
    try:
        yield
    except (KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:  # plain Exception, and panics of its own, which are none
        raise DataError(f"{what}: {' '.join(str(error).split())[:300]}.") from None


def folder_hash(folder: Path) -> str:
    """``Tokenizer.hash`` of the tokenizer in ``folder``, read from its file alone."""
    return _canonical_hash(_read_json(folder / "tokenizer.json", folder))


def _canonical_hash(said: str | dict) -> str:
    content = json.loads(said) if isinstance(said, str) else said
    # truncation and padding are switches of the moment, no part of the vocabulary
    content = {key: value for key, value in content.items() if key not in ("truncation", "padding")}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def token_ids(tokenizer: Tokenizer) -> TokenIds:
    """The ids that megamask must know; raises ConfigError for each of mask, pad, cls and sep that is missing."""
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


# ---- where words begin


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


# ---- an existing tokenizer


def load(source: str | Path) -> Tokenizer:
    """The fast tokenizer in a folder, or of a Hugging Face name that is not a folder here."""
    folder = Path(source)
    if not folder.is_dir():
        folder = _from_hub(str(source))
    _read_json(folder / "tokenizer.json", folder)
    with _refusing(f"{folder / 'tokenizer.json'} is no tokenizer"):
        backend = Backend.from_file(str(folder / "tokenizer.json"))
    raise_all(DataError, list(_vocabulary_problems(backend, folder / "tokenizer.json")))
    backend.no_padding()
    backend.no_truncation()
    config: dict = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        if (folder / name).exists():
            config |= _read_json(folder / name, folder)
    vocabulary = backend.get_vocab(with_added_tokens=True)
    roles = {}
    for role in ROLES:
        said = config.get(f"{role}_token")
        said = said.get("content") if isinstance(said, dict) else said
        said = said or next((usual for usual in USUAL[role] if usual in vocabulary), None)
        if said is not None and not isinstance(said, str):
            raise DataError(must(f"{folder / name}: {role}_token", "be a word", str(said)))
        if said:
            roles[role] = said
    return Tokenizer(backend, roles)


def _vocabulary_problems(backend: Backend, path: Path) -> Iterator[str]:
    """Sentences for ids that two tokens share, or that leave more gaps than tokens: tables are by id."""
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
    try:
        content = records.read_json(path)
    except FileNotFoundError:
        raise DataError(
            f"{folder} holds no {path.name}, so it is no fast tokenizer. "
            "Save one there with `save_pretrained` of a fast tokenizer of transformers."
        ) from None
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from None
    except records.BadRecord as error:
        raise DataError(f"{path} is no JSON: {error}.") from None
    if not isinstance(content, dict):
        raise DataError(f"{path} must hold a JSON object.")
    return content


def _from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download

    wanted = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
    try:
        return Path(snapshot_download(name, allow_patterns=wanted))
    except Exception as error:  # no such name, no network, no permission: one sentence for all
        reason = str(error).strip().splitlines()[0]
        raise DataError(
            must("tokenizer", "be 'wordpiece', 'bpe', 'sentencepiece', 'sentencepiece-bpe', a tokenizer folder or the "
                 "name of one", name) + f" Looking for that name failed: {reason}"
        ) from None  # fmt: skip


# ---- training


def train(kind: Kind, texts: Sequence[str], *, size: int, lowercase: bool = False) -> Tokenizer:
    """A new tokenizer of at most ``size`` tokens; ``sentencepiece`` has exactly as many or raises DataError."""
    if kind == "wordpiece":
        backend = _train_wordpiece(texts, size, lowercase)
    elif kind == "bpe":
        backend = _train_byte_bpe(texts, size, lowercase)
    else:
        algorithm = "bpe" if kind == "sentencepiece-bpe" else "unigram"
        model = train_sentencepiece(texts, size=size, lowercase=lowercase, algorithm=algorithm)
        backend = convert_sentencepiece(model, lowercase=lowercase)
    # the space before a written [MASK] belongs to the hidden word, where tokens carry their space
    strips = kind != "wordpiece"
    backend.add_special_tokens(
        [AddedToken(t, special=True, normalized=False, lstrip=strips and t == "[MASK]") for t in SPECIAL]
    )
    ids = {t: backend.token_to_id(t) for t in SPECIAL}
    backend.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", ids["[CLS]"]), ("[SEP]", ids["[SEP]"])],
    )
    return Tokenizer(backend, dict(zip(ROLES, SPECIAL, strict=True)))


def _sequence(*steps: normalizers.Normalizer | None) -> normalizers.Normalizer:
    return normalizers.Sequence([step for step in steps if step is not None])


def _train_wordpiece(texts: Sequence[str], size: int, lowercase: bool) -> Backend:
    def untrained(vocabulary: dict[str, int]) -> Backend:
        backend = Backend(models.WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
        backend.normalizer = _sequence(
            normalizers.NFC(), normalizers.BertNormalizer(strip_accents=lowercase, lowercase=lowercase)
        )
        backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        backend.decoder = decoders.WordPiece()
        return backend

    backend = untrained({"[UNK]": 0})
    counts: dict[str, int] = {}
    for text in texts:
        for character in backend.normalizer.normalize_str(text):
            counts[character] = counts.get(character, 0) + 1
    letters = sorted(c for c in counts if not c.isspace())
    letters = sorted(sorted(letters, key=lambda c: -counts[c])[:ALPHABET])
    room = size - len(SPECIAL) - 2 * len(letters)
    if room < 0:
        least = len(SPECIAL) + 2 * len(letters)
        raise DataError(must("vocab_size", f"be at least {least} for the {len(letters)} characters of this text", size))
    # the trainer numbers characters in the order of a hash table, so they are all named to it beforehand
    beforehand = [*SPECIAL, *letters, *(f"##{c}" for c in letters)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=size, show_progress=False, special_tokens=beforehand, initial_alphabet=letters,
        limit_alphabet=len(letters), continuing_subword_prefix="##",
    )  # fmt: skip
    backend.train_from_iterator(texts, trainer, length=len(texts))
    # a fresh one: in the trained one those characters are special tokens
    return untrained(backend.get_vocab(with_added_tokens=True))


def _train_byte_bpe(texts: Sequence[str], size: int, lowercase: bool) -> Backend:
    least = len(SPECIAL) + 256
    if size < least:
        raise DataError(must("vocab_size", f"be at least {least} for byte-level BPE", size))
    backend = Backend(models.BPE())
    backend.normalizer = _sequence(normalizers.NFC(), normalizers.Lowercase() if lowercase else None)
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, show_progress=False, special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )  # fmt: skip
    backend.train_from_iterator(texts, trainer, length=len(texts))
    return backend


# ---- sentencepiece


def sentencepiece_front(lowercase: bool) -> normalizers.Normalizer:
    """What is done to text before sentencepiece sees it: NFC, and runs of whitespace become one space."""
    return _sequence(
        normalizers.NFC(),
        normalizers.Lowercase() if lowercase else None,
        normalizers.Replace(Regex(r"\s+"), " "),
    )


def train_sentencepiece(texts: Sequence[str], *, size: int, lowercase: bool, algorithm: str) -> bytes:
    """A sentencepiece model with byte fallback and megamask's special tokens at ids 0 to 4, as its protobuf."""
    import sentencepiece

    front = sentencepiece_front(lowercase)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in texts for line in front.normalize_str(text).split("\n")),
            model_writer=model, model_type=algorithm, vocab_size=size, byte_fallback=True,
            normalization_rule_name="identity", character_coverage=0.9995, max_sentence_length=2**24,
            pad_id=0, unk_id=1, bos_id=2, eos_id=3, control_symbols="[MASK]",
            pad_piece="[PAD]", unk_piece="[UNK]", bos_piece="[CLS]", eos_piece="[SEP]",
            # the names of byte pieces must be spelt with characters, not found as pieces
            required_chars="<>0123456789ABCDEFx",
            num_threads=4, minloglevel=2,  # a fixed number of threads: sums of floats depend on it
        )  # fmt: skip
    except (RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise DataError(f"`vocab_size` {size} does not suit this text, says sentencepiece: {reason}") from None
    return _coarse(model.getvalue())


def _coarse(model: bytes) -> bytes:
    """The model with scores in steps of 1/256 nat.

    Sums of such scores are exact in single and in double precision, so ties between two ways to cut a word ("I II",
    "II I") are ties in sentencepiece and in tokenizers alike, and both break them alike.
    """
    parsed = _parse(model)
    for piece in parsed.pieces:
        piece.score = round(piece.score * 256) / 256
    return parsed.SerializeToString(deterministic=True)


def _parse(model: bytes):
    from sentencepiece import sentencepiece_model_pb2 as proto

    parsed = proto.ModelProto()  # type: ignore[attr-defined]
    parsed.ParseFromString(model)
    return parsed


def convert_sentencepiece(model: bytes, *, lowercase: bool) -> Backend:
    """The fast tokenizer that gives the ids of the sentencepiece processor on text that passed the front."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = [
        (processor.id_to_piece(i), NEVER if _is_never_found(processor, i) else processor.get_score(i))
        for i in range(processor.get_piece_size())
    ]
    parsed = _parse(model)
    if parsed.trainer_spec.model_type == parsed.trainer_spec.UNIGRAM:
        backend = Backend(models.Unigram(pieces, unk_id=processor.unk_id(), byte_fallback=True))
    else:
        vocabulary = {piece: number for number, (piece, _) in enumerate(pieces)}
        backend = Backend(models.BPE(vocabulary, _merges(pieces), unk_token="[UNK]", fuse_unk=True, byte_fallback=True))
    backend.normalizer = sentencepiece_front(lowercase)
    # "first": after a [MASK] in the middle of a text no space may be made up
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=WORD, prepend_scheme="first")
    backend.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(replacement=WORD, prepend_scheme="first")]
    )
    return backend


def _is_never_found(processor, number: int) -> bool:
    return processor.is_control(number) or processor.is_unknown(number) or processor.is_byte(number)


def _merges(pieces: list[tuple[str, float]]) -> list[tuple[str, str]]:
    """Every split of a piece into two pieces, in the order in which sentencepiece would join them."""
    scores = {piece: score for piece, score in pieces if score != NEVER}
    found = []
    for piece, score in scores.items():
        splits = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        found += [(-score, left, right) for left, right in splits if left in scores and right in scores]
    # sorting is stable, so the splits of one piece stay in order
    found.sort(key=lambda merge: merge[0])
    return [(left, right) for _, left, right in found]


def quiet() -> None:
    """Keep the tokenizers library to one thread in this process; worker processes call it."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
