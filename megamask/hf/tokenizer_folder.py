"""Import and export of tokenizers, so that training and transformers encode text alike.

An imported tokenizer does what ``AutoTokenizer`` does with its files, an exported one what training did. Both are
compared on texts (`encoding_check`) before they are used. A missing [CLS] and [SEP] is added; any other difference is
an error.
"""

from __future__ import annotations

import copy
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from megamask.data.tokenizer import ROLES, Tokenizer, load_tokenizer, switch_off, token_ids
from megamask.errors import CheckpointError, ConfigError, DataError
from megamask.hf import lazy_transformers, model_folder
from megamask.hf.encoding_check import encoding_difference
from megamask.hf.tensor_names import TOKENIZER_FILES

VOCABULARIES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
"""Files that contain a vocabulary; without any of them, transformers makes an empty tokenizer."""


def to_fast_tokenizer(hf_tokenizer: lazy_transformers.PreTrainedTokenizerBase) -> Tokenizer:
    """A copy of a tokenizer object of transformers as `data.tokenizer.Tokenizer`. DataError if it is not a fast one.

    Gives access to its special ids (``data.tokenizer.token_ids``) and to where words begin
    (``data.word_boundaries.encode_with_word_starts``).
    """
    if not getattr(hf_tokenizer, "is_fast", False):
        raise DataError(
            f"{type(hf_tokenizer).__name__} is not a fast tokenizer, so its rules cannot be read. Load it with "
            "`AutoTokenizer.from_pretrained`, which uses the fast tokenizer if there is one."
        )
    roles = {role: getattr(hf_tokenizer, f"{role}_token") for role in ROLES}
    backend = copy.deepcopy(hf_tokenizer.backend_tokenizer)
    switch_off(backend)
    return Tokenizer(backend, {role: token for role, token in roles.items() if token})


def import_tokenizer(source: Path, target: Path, vocab_size: int) -> tuple[str, ...]:
    """Write the tokenizer that transformers finds in ``source`` to ``target``; return a sentence for each change.

    Other files, such as ``vocab.txt``, become a ``tokenizer.json``. Raises CheckpointError if there is no tokenizer,
    if it is not a fast one, or if it has more than ``vocab_size`` tokens; ConfigError if it lacks a special token.
    """
    if not any((source / name).is_file() for name in VOCABULARIES):
        raise CheckpointError(
            f"{source} has no tokenizer ({', '.join(VOCABULARIES[:2])}), so no text can be prepared for its weights. "
            "Put the files of its tokenizer there."
        )
    hf_tokenizer = _load(source, source)
    if not hf_tokenizer.is_fast:
        raise CheckpointError(f"The tokenizer in {source} is not a fast one, and transformers cannot convert it.")
    tokenizer = to_fast_tokenizer(hf_tokenizer)
    try:
        ids = token_ids(tokenizer)
    except ConfigError as error:
        raise ConfigError(*(f"{source}: {problem}" for problem in error.problems)) from None
    if ids.size > vocab_size:
        raise CheckpointError(
            f"The tokenizer in {source} has {ids.size} tokens, but the weights only {vocab_size}: `--init` would "
            "refuse text prepared with it. Load the model with transformers, call `resize_token_embeddings` with the "
            "size of the tokenizer, and save both."
        )
    notes = []
    if not (source / "tokenizer.json").is_file():
        lower = tokenizer.encode(["A"])[0].tolist() == tokenizer.encode(["a"])[0].tolist()
        case = "it lowercases text" if lower else "it keeps capital letters"
        notes.append(f"{source} has no tokenizer.json: transformers made one from its other files ({case}).")
        tokenizer.save(target)
    elif difference := encoding_difference(load_tokenizer(source), hf_tokenizer, around=False):
        notes.append(
            f"The tokenizer was written as transformers reads {source}, which differs from its tokenizer.json alone: "
            f"{difference.sentence('tokenizer.json')}."
        )
        tokenizer.save(target)
    else:
        _copy(source, target)
    return (*notes, *_ensure_special_tokens(load_tokenizer(target), target, source))


def export_tokenizer(source: Path, target: Path, longest: int, sentences: Sequence[str]) -> tuple[str, ...]:
    """Write training's tokenizer in ``source`` to ``target`` for transformers; return a sentence for each change.

    ``longest`` tokens become its maximum length. Raises CheckpointError if transformers encodes one of the
    ``sentences``, or a text in several scripts, differently from training.
    """
    if not (source / "tokenizer_config.json").is_file() or not (source / "tokenizer.json").is_file():
        raise CheckpointError(f"{source} must contain tokenizer.json and tokenizer_config.json.")
    tokenizer = load_tokenizer(source)
    _copy(source, target)
    tokenizer.backend.save(str(target / "tokenizer.json"))  # without padding and truncation
    path = target / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    # without it, pipelines pass on texts longer than the model can read
    limit = settings.get("model_max_length")
    settings["model_max_length"] = min(limit, longest) if isinstance(limit, (int, float)) else longest
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return _ensure_special_tokens(tokenizer, target, source, sentences)


def _copy(source: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _load(folder: Path, source: Path) -> lazy_transformers.PreTrainedTokenizerBase:
    try:
        return model_folder.load_hf_tokenizer(folder)
    except model_folder.ModelLoadError as error:
        raise CheckpointError(f"transformers cannot load the tokenizer in {source}: {error.reason}") from None


def _ensure_special_tokens(
    tokenizer: Tokenizer, target: Path, source: Path, sentences: Sequence[str] = ()
) -> tuple[str, ...]:
    """Make transformers put [CLS] and [SEP] around a text with the files in ``target``; refuse other differences."""
    if not encoding_difference(tokenizer, _load(target, source), sentences):
        return ()
    _add_template(target, tokenizer)
    if difference := encoding_difference(tokenizer, _load(target, source), sentences):
        raise CheckpointError(f"Training and transformers use the tokenizer in {source} differently: {difference}.")
    cls, sep = tokenizer.roles["cls"], tokenizer.roles["sep"]
    return (f"The tokenizer added no special tokens: {cls} and {sep} now surround a text.",)


def _add_template(folder: Path, tokenizer: Tokenizer) -> None:
    """Make the ``tokenizer.json`` in ``folder`` put [CLS] and [SEP] around a text, and around each of a pair."""
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    before = content.get("post_processor")
    content["post_processor"] = _template(tokenizer)
    if before and before["type"] == "ByteLevel":  # it only trims offsets
        content["post_processor"] = {"type": "Sequence", "processors": [before, content["post_processor"]]}
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")


def _template(tokenizer: Tokenizer) -> dict:
    ids = token_ids(tokenizer)
    cls, sep = tokenizer.roles["cls"], tokenizer.roles["sep"]

    def special(token: str, kind: int) -> dict:
        return {"SpecialToken": {"id": token, "type_id": kind}}

    def text(name: str, kind: int) -> dict:
        return {"Sequence": {"id": name, "type_id": kind}}

    single = [special(cls, 0), text("A", 0), special(sep, 0)]
    return {
        "type": "TemplateProcessing",
        "single": single,
        "pair": [*single, text("B", 1), special(sep, 1)],
        "special_tokens": {
            token: {"id": token, "ids": [number], "tokens": [token]}
            for token, number in ((cls, ids.cls), (sep, ids.sep))
        },
    }
