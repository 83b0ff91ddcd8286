"""The settings of `megamask prepare`."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal, get_args

from annotated_types import Ge, Lt, MinLen

from megamask.errors import must
from megamask.errors.setting_rules import Count, CountOrZero, OnlyFor, Share, ShareBelowOne, removable

TokenizerKind = Literal["wordpiece", "bpe", "sentencepiece", "sentencepiece-bpe"]
Documents = Literal["blocks", "lines", "files"]
VOCAB_SIZE = 32_768


@dataclass(frozen=True)
class PrepareConfig:
    """Turn text into a tokenizer, unless there is one, and token shards."""

    input: Annotated[tuple[str, ...], MinLen(1)]
    """Files (.txt, .jsonl, .json, .csv, .tsv, .parquet, .conllu, each also .gz, .bz2, .xz, .zst), folders of them, or
    datasets as NAME[:CONFIG]."""
    output: Path
    """The new folder."""
    tokenizer: str = "wordpiece"
    """`wordpiece`, `bpe` (byte-level), `sentencepiece` (unigram) or `sentencepiece-bpe` to train one; else the folder
    or name of an existing fast tokenizer."""
    vocab_size: Annotated[int, Ge(16), Lt(2**31)] | None = None
    """Tokens of a new tokenizer, 32,768 if not given."""
    split_by: str | None = None
    """The field of JSON records, or the column of tables and datasets, such as lang, by whose value documents are
    split into folders: OUTPUT/VALUE, each a source of a mixture, with one tokenizer."""
    tokenizer_alpha: Annotated[Share, OnlyFor("split_by")] = 0.3
    """In the text for a new tokenizer, the share of a value of `split_by` is proportional to (its bytes / all bytes) to
    the power of this: 1 is as in the text, less gives small languages more tokens of the vocabulary."""
    lowercase: bool = False
    """Whether a new tokenizer lowercases all text (and wordpiece removes accents, as BERT does)."""
    tokenizer_bytes: Count = 100_000_000
    """Bytes of text, sampled from all train documents, on which a new tokenizer is trained."""
    valid_share: ShareBelowOne = 0.005
    """Share of documents, chosen by their hash, in the validation split."""
    exclude: tuple[str, ...] = ()
    """Files in folders to skip: patterns for a name, such as 'README*' or '*.pdf', or for a path below the folder."""
    documents: Documents = "blocks"
    """What a document is: in .txt files a block between blank lines, a line or the file; in .conllu files a `# newdoc`
    or the file."""
    text_field: str = "text"
    """The field of JSON records, or the column of .csv, .tsv and .parquet files and datasets, with the text."""
    dataset_split: str = "train"
    """The split of a dataset that is read."""
    on_bad_document: Literal["stop", "skip"] = "stop"
    """What to do at a document that cannot be read, or a file without one: stop and name its place, or count and skip
    it."""
    bad_share: Annotated[Share, OnlyFor("on_bad_document", "skip")] = 0.001
    """Largest share of documents that `skip` may skip before it stops too: of those read so far, or of 10,000 if that
    is more."""
    lost_share: Share = 0.01
    """Largest share of the text that the tokenizer may lose: the share of unknown tokens, or the share of characters in
    unknown tokens or in no token, whichever is larger."""
    tags: str | None = None
    """Parts of speech for the score `part_of_speech`: the name or folder of a spaCy pipeline (needs megamask[tags]), or
    `conllu` for those in .conllu files. None by default."""
    workers: CountOrZero = 0
    """Processes that encode text; 0 is one for each core. The result does not depend on it."""

    @property
    def trains(self) -> bool:
        """Whether a new tokenizer is trained."""
        return self.tokenizer in get_args(TokenizerKind)

    def problems(self, name: str) -> list[str]:
        """Sentences for what two settings cannot do together."""
        fields = () if self.trains else ("vocab_size", "lowercase", "tokenizer_bytes", "tokenizer_alpha")
        problems = removable(self, fields, name, f"has no effect on the existing tokenizer {self.tokenizer!r}")
        if self.split_by == "":
            problems.append(must("split_by", "name a field", self.split_by, "Leave it out to make one source."))
        if self.split_by is not None and self.tags is not None:
            problems.append("`tags` must be left out with `split_by`: a pipeline tags one language.")
        return problems

    def settings(self) -> dict:
        """The settings that determine the result, besides the text."""
        settings = asdict(self)
        # the facts of the sidecar describe the tags; the two shares only decide whether there is a result
        for name in ("input", "exclude", "output", "workers", "tags", "bad_share", "lost_share"):
            del settings[name]
        if self.split_by is None:
            del settings["split_by"], settings["tokenizer_alpha"]
        return settings | {"vocab_size": self.vocab_size or (VOCAB_SIZE if self.trains else None)}
