"""Tokenizer folders that cross between transformers and megamask, such that both encode alike.

An imported one becomes what ``AutoTokenizer`` makes of its files; an exported one what training did. Both are compared
on texts (`encoding_check`) before they are used. A missing [CLS] and [SEP] is added; any other difference is refused.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from megamask.data.tokenizer import Tokenizer, load_tokenizer, token_ids
from megamask.errors import CheckpointError, ConfigError
from megamask.hf import lazy_transformers
from megamask.hf.encoding_check import encoding_difference
from megamask.hf.tensor_names import TOKENIZER_FILES
from megamask.hf.tokens import to_fast_tokenizer

VOCABULARIES = (
    "tokenizer.json",
    "vocab.txt",
    "vocab.json",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
)
"""Files that hold a vocabulary; without any, transformers makes an empty tokenizer."""


def import_tokenizer(source: Path, target: Path, vocab_size: int) -> tuple[str, ...]:
    """Write the tokenizer that transformers finds in ``source`` to ``target``, and return what was changed in it.

    A tokenizer of other files, such as ``vocab.txt``, becomes a ``tokenizer.json``. Raises CheckpointError if there is
    none, if it is no fast one, or if it has more than ``vocab_size`` tokens; ConfigError if it lacks a special token.
    """
    if not any((source / name).is_file() for name in VOCABULARIES):
        raise CheckpointError(
            f"{source} holds no tokenizer ({', '.join(VOCABULARIES[:2])}), so no text can be prepared for its weights. "
            "Put the files of its tokenizer there."
        )
    theirs = _loaded(source, source)
    if not theirs.is_fast:
        raise CheckpointError(f"The tokenizer in {source} is no fast one, and transformers makes none of its files.")
    tokenizer = to_fast_tokenizer(theirs)
    try:
        ids = token_ids(tokenizer)
    except ConfigError as error:
        raise ConfigError(*(f"{source}: {problem}" for problem in error.problems)) from None
    if ids.size > vocab_size:
        raise CheckpointError(
            f"The tokenizer in {source} has {ids.size} tokens, but the weights only {vocab_size}: `--init` would "
            "refuse text prepared with it. Load the model with transformers, `resize_token_embeddings` it to the "
            "tokenizer, and save both."
        )
    notes = []
    if not (source / "tokenizer.json").is_file():
        lower = tokenizer.encode(["A"])[0].tolist() == tokenizer.encode(["a"])[0].tolist()
        case = "it turns capital letters into small ones" if lower else "it keeps capital letters"
        notes.append(f"{source} holds no tokenizer.json: transformers made one of its other files ({case}).")
        tokenizer.save(target)
    elif found := encoding_difference(load_tokenizer(source), theirs, around=False):
        notes.append(
            f"The tokenizer is written as transformers reads {source}, which is not by its tokenizer.json alone: "
            f"{found.between('tokenizer.json')}."
        )
        tokenizer.save(target)
    else:
        _copy(source, target)
    return (*notes, *_framed(load_tokenizer(target), target, source))


def export_tokenizer(source: Path, target: Path, longest: int, sentences: Sequence[str]) -> tuple[str, ...]:
    """Write training's tokenizer in ``source`` to ``target`` for transformers, and return what was changed in it.

    Texts are cut at ``longest`` tokens. Raises CheckpointError if transformers encodes one of the ``sentences``, or a
    text of several scripts, other than training does.
    """
    if not (source / "tokenizer_config.json").is_file() or not (source / "tokenizer.json").is_file():
        raise CheckpointError(f"{source} holds no tokenizer.json with its tokenizer_config.json.")
    ours = load_tokenizer(source)
    _copy(source, target)
    ours.backend.save(str(target / "tokenizer.json"))  # without the padding and truncation that may stand there
    path = target / "tokenizer_config.json"
    # else pipelines would pass on texts longer than the model can take
    settings = json.loads(path.read_text(encoding="utf-8"))
    said = settings.get("model_max_length")
    settings["model_max_length"] = min(said, longest) if isinstance(said, (int, float)) else longest
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return _framed(ours, target, source, sentences)


def _copy(source: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def _loaded(folder: Path, source: Path) -> lazy_transformers.PreTrainedTokenizerBase:
    try:
        return lazy_transformers.load_tokenizer(folder)
    except lazy_transformers.Unloadable as error:
        raise CheckpointError(f"The tokenizer in {source} cannot be loaded by transformers: {error.why}") from None


def _framed(ours: Tokenizer, target: Path, source: Path, sentences: Sequence[str] = ()) -> tuple[str, ...]:
    """Let transformers, with the files in ``target``, put [CLS] and [SEP] around a text; refuse other differences."""
    if not encoding_difference(ours, _loaded(target, source), sentences):
        return ()
    _add_template(target, ours)
    if found := encoding_difference(ours, _loaded(target, source), sentences):
        raise CheckpointError(f"The tokenizer in {source} is not used in training as in transformers: {found}.")
    return (f"The tokenizer put nothing around a text: {ours.roles['cls']} and {ours.roles['sep']} were added.",)


def _add_template(folder: Path, tokenizer: Tokenizer) -> None:
    """Let the ``tokenizer.json`` in ``folder`` put [CLS] and [SEP] around a text, and around each of a pair."""
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
