"""New tokenizers: WordPiece, byte-level BPE and sentencepiece, trained on a sample of the text.

Training takes 5 to 60 seconds on 20 MB of text. The result does not depend on the number of threads.
"""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from megamask.data.settings import TokenizerKind
from megamask.data.tokenizer import METASPACE, ROLES, SPECIAL, Tokenizer
from megamask.errors import DataError, must

ALPHABET = 1000
"""Number of characters that WordPiece keeps in any case, if the text has as many and they fit."""
COVERAGE = 0.99999
"""Share of the text whose characters get tokens in WordPiece, if they fit into the vocabulary."""
LEAST_COVERAGE = 0.99
"""A smaller share is an error: one unknown character makes a whole word unknown."""
# below the score of every piece: the text "[MASK]" or "<0x41>" must never become the token of that name
NEVER = -1e6


def train_tokenizer(kind: TokenizerKind, texts: Sequence[str], *, size: int, lowercase: bool = False) -> Tokenizer:
    """A new tokenizer of at most ``size`` tokens; ``sentencepiece`` has exactly as many or raises DataError."""
    if kind == "wordpiece":
        backend = _train_wordpiece(texts, size, lowercase)
    elif kind == "bpe":
        backend = _train_byte_bpe(texts, size, lowercase)
    else:
        algorithm = "bpe" if kind == "sentencepiece-bpe" else "unigram"
        model = train_sentencepiece(texts, size=size, lowercase=lowercase, algorithm=algorithm)
        backend = convert_sentencepiece(model, lowercase=lowercase)
    # where tokens include the space before them, the space before a written [MASK] belongs to the hidden word
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
    counts: Counter[str] = Counter()
    for text in texts:
        counts.update(backend.normalizer.normalize_str(text))
    inside = _inside_words(backend, counts)
    letters = _alphabet(counts, inside, size - len(SPECIAL))
    # the trainer numbers characters in the order of a hash table, so it gets all of them as special tokens
    beforehand = [*SPECIAL, *letters, *(f"##{c}" for c in letters if c in inside)]
    trainer = trainers.WordPieceTrainer(
        vocab_size=size, show_progress=False, special_tokens=beforehand, initial_alphabet=letters,
        limit_alphabet=len(letters), continuing_subword_prefix="##",
    )  # fmt: skip
    backend.train_from_iterator(texts, trainer, length=len(texts))
    # in the trained one, the characters are special tokens
    return untrained(backend.get_vocab(with_added_tokens=True))


def _inside_words(backend: Backend, characters: Iterable[str]) -> set[str]:
    """Those of ``characters`` that can be inside a word; Chinese characters and punctuation are words of their own."""

    def joins(character: str) -> bool:
        word = backend.normalizer.normalize_str(f"a{character}a")
        return len(backend.pre_tokenizer.pre_tokenize_str(word)) == 1

    return {character for character in characters if joins(character)}


def _alphabet(counts: Counter[str], inside: set[str], size: int) -> list[str]:
    """The most frequent characters that make up ``COVERAGE`` of a text, or as many as ``size`` tokens can spell.

    A character takes one token, and a second one with "##" if it can be inside a word. At least ``ALPHABET``
    characters are kept, if the text has as many and they fit. Raises DataError if those that fit make up less than
    ``LEAST_COVERAGE`` of the text.
    """
    letters = sorted((c for c in counts if not c.isspace()), key=lambda c: (-counts[c], c))
    if not letters:
        raise DataError("The text has no characters that a tokenizer can learn.")
    covered = np.cumsum([counts[c] for c in letters]) / sum(counts[c] for c in letters)
    tokens = np.cumsum([1 + (c in inside) for c in letters])

    def enough(share: float) -> int:
        return min(int(np.searchsorted(covered, share)) + 1, len(letters))

    least = enough(LEAST_COVERAGE)
    if tokens[least - 1] > size:
        raise DataError(
            must(
                "vocab_size",
                f"be at least {tokens[least - 1] + len(SPECIAL)} for the {least} characters that make up "
                f"{LEAST_COVERAGE:.0%} of this text",
                size + len(SPECIAL),
            )
        )
    fitting = int(np.searchsorted(tokens, size, side="right"))
    return sorted(letters[: min(max(enough(COVERAGE), ALPHABET), fitting)])


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


def sentencepiece_normalizer(lowercase: bool) -> normalizers.Normalizer:
    """The normalization before sentencepiece: NFC, and runs of whitespace become one space."""
    return _sequence(
        normalizers.NFC(),
        normalizers.Lowercase() if lowercase else None,
        normalizers.Replace(Regex(r"\s+"), " "),
    )


def train_sentencepiece(texts: Sequence[str], *, size: int, lowercase: bool, algorithm: str) -> bytes:
    """A sentencepiece model with byte fallback and megamask's special tokens at ids 0 to 4, as its protobuf."""
    import sentencepiece

    normalizer = sentencepiece_normalizer(lowercase)
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(line for text in texts for line in normalizer.normalize_str(text).split("\n")),
            model_writer=model, model_type=algorithm, vocab_size=size, byte_fallback=True,
            normalization_rule_name="identity", character_coverage=0.9995, max_sentence_length=2**24,
            pad_id=0, unk_id=1, bos_id=2, eos_id=3, control_symbols="[MASK]",
            pad_piece="[PAD]", unk_piece="[UNK]", bos_piece="[CLS]", eos_piece="[SEP]",
            # so that text with the names of byte tokens is encoded by characters
            required_chars="<>0123456789ABCDEFx",
            num_threads=4, minloglevel=2,  # sums of floats depend on the number of threads
        )  # fmt: skip
    except (RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise DataError(f"`vocab_size` {size} does not fit this text. sentencepiece reports: {reason}") from None
    return _with_rounded_scores(model.getvalue())


def _with_rounded_scores(model: bytes) -> bytes:
    """The model with scores rounded to 1/256 nat.

    Sums of such scores are exact in single and in double precision, so two segmentations of a word with the same score
    ("I II", "II I") are ties in sentencepiece and in tokenizers, and both break them in the same way.
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
    """The fast tokenizer with the same ids as the sentencepiece model on normalized text."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = [
        (processor.id_to_piece(i), NEVER if _is_not_text(processor, i) else processor.get_score(i))
        for i in range(processor.get_piece_size())
    ]
    parsed = _parse(model)
    if parsed.trainer_spec.model_type == parsed.trainer_spec.UNIGRAM:
        backend = Backend(models.Unigram(pieces, unk_id=processor.unk_id(), byte_fallback=True))
    else:
        vocabulary = {piece: number for number, (piece, _) in enumerate(pieces)}
        backend = Backend(models.BPE(vocabulary, _merges(pieces), unk_token="[UNK]", fuse_unk=True, byte_fallback=True))
    backend.normalizer = sentencepiece_normalizer(lowercase)
    # "first": no space is added after a [MASK] in the middle of a text
    backend.pre_tokenizer = pre_tokenizers.Metaspace(replacement=METASPACE, prepend_scheme="first")
    backend.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(replacement=METASPACE, prepend_scheme="first")]
    )
    return backend


def _is_not_text(processor, number: int) -> bool:
    return processor.is_control(number) or processor.is_unknown(number) or processor.is_byte(number)


def _merges(pieces: list[tuple[str, float]]) -> list[tuple[str, str]]:
    """Every split of a piece into two pieces, in the order in which sentencepiece joins them."""
    scores = {piece: score for piece, score in pieces if score != NEVER}
    merges = []
    for piece, score in scores.items():
        splits = ((piece[:cut], piece[cut:]) for cut in range(1, len(piece)))
        merges += [(-score, left, right) for left, right in splits if left in scores and right in scores]
    # sorting is stable, so the splits of one piece stay in order
    merges.sort(key=lambda merge: merge[0])
    return [(left, right) for _, left, right in merges]
