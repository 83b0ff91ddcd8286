#!/usr/bin/env python
"""How many dimensions the states of real tokens and of [MASK] fill, layer by layer: ``tools/analyze_rank.py --run DIR
--output DIR``. Several ``--run`` and ``--model`` are compared on the same text."""

from __future__ import annotations

import json
import platform
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the megamask of this clone, installed or not
from megamask import entry_point

if __name__ == "__main__":
    entry_point.begin()

import torch
import tyro

from megamask.analysis import deficiency, drawing, effective_rank, texts
from megamask.analysis.deficiency import Analysis, Cuts
from megamask.analysis.layers import Layered, open_model, open_run
from megamask.data.shards import Shards
from megamask.errors import ConfigError, DataError, MegamaskError, StorageError, must, raise_all
from megamask.progress_bar import ProgressBar

LENGTH = 512
NAMES = ("ranks.json", "ranks.md", "ranks.png")


@dataclass(frozen=True)
class Arguments:
    output: Path
    """Folder for ranks.md (tables), ranks.png (a picture) and ranks.json (everything, and how it was made)."""
    run: Annotated[tuple[Path, ...], tyro.conf.UseAppendAction] = ()
    """Run folder, a checkpoint in one, or first weights; may be given several times."""
    model: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    """Folder or name of an encoder for transformers, such as an exported run; may be given several times."""
    data: Path | None = None
    """Folder of token shards, whose validation split is read; by default that which the first run was trained on."""
    text: Path | None = None
    """A text file instead, in the tokens of each encoder's own tokenizer."""
    step: int | None = None
    """The checkpoint of each run; by default its newest."""
    ratio: float = 0.15
    """Share of the tokens that are replaced by [MASK]."""
    tokens: int = 100_000
    """Tokens of text that are read, at least."""
    length: int | None = None
    """Longest sequence; by default 512, or less if an encoder cannot read as many."""
    energy: float = 0.9
    """The energy rank counts the directions that hold this share of the squared norm."""
    threshold: float = 0.01
    """The numerical rank counts singular values above this share of the largest."""
    centred: bool = False
    """Print the tables of the states with their mean taken off; the files have both."""
    seed: int = 0
    """Of the order of the text and of the masks."""

    def problems(self) -> list[str]:
        """Sentences for what is wrong."""
        found = []
        if not self.run and not self.model:
            found.append("`run` or `model` must name at least one encoder.")
        if self.data is not None and self.text is not None:
            found.append("`data` and `text` both say what to read. Remove one.")
        if not self.run and self.data is None and self.text is None:
            found.append("A `model` does not say what text to read: name `data` or `text`.")
        if self.step is not None and not self.run:
            found.append("`step` has an effect on `run` alone. Remove it.")
        for name in ("ratio", "energy"):
            if not 0 < getattr(self, name) < 1:
                found.append(must(name, "lie in (0, 1)", getattr(self, name)))
        if not effective_rank.SMALLEST <= self.threshold < 1:
            rule = f"lie in [{effective_rank.SMALLEST:g}, 1), for what is smaller is rounding"
            found.append(must("threshold", rule, self.threshold))
        if self.tokens < 1:
            found.append(must("tokens", "be at least 1", self.tokens))
        if self.length is not None and self.length < 3:
            found.append(must("length", "be at least 3, for [CLS], a token and [SEP]", self.length))
        if self.output.exists() and not self.output.is_dir():
            found.append(must("output", "be a folder", str(self.output)))
        return found


@entry_point.command
def main(args: list[str] | None = None) -> int:
    arguments = tyro.cli(Arguments, description=__doc__, args=args)
    raise_all(ConfigError, arguments.problems())
    analyse(arguments)
    return 0


def analyse(arguments: Arguments) -> None:
    """Read, measure, print, write."""
    models = opened(arguments)
    length = _length(arguments, models)
    raise_all(DataError, [p for m in models for p in texts.enough(arguments.tokens, arguments.ratio, m.width)])
    cuts = Cuts(arguments.energy, arguments.threshold)
    found: dict[str, Analysis] = {}
    made: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for number, model in enumerate(models):
            shards = _shards(arguments, model, Path(scratch) / str(number))
            found[model.name], facts = measured(arguments, model, shards, length, cuts)
            made.append(facts)
            print(_opening(model, facts), *_of(model.name, found, cuts, arguments.centred), sep="\n")
    write(arguments, found, made, cuts)


def opened(arguments: Arguments) -> list[Layered]:
    """The encoders, each under a name of its own; all that cannot be read is told at once."""
    models, problems = [], []
    asked = [lambda path=path: open_run(path, arguments.step) for path in arguments.run]
    asked += [lambda name=name: open_model(name) for name in arguments.model]
    for ask in asked:
        try:
            models.append(ask())
            problems += texts.same_tokens(models[-1].tokenizer, models[-1].vocabulary, models[-1].name)
        except MegamaskError as error:
            if len(asked) == 1:
                raise
            problems += error.problems
    names = [model.name for model in models]
    problems += [
        f"Two encoders are called {name!r}. Rename a folder." for name in {n for n in names if names.count(n) > 1}
    ]
    raise_all(DataError, problems)
    return models


def measured(
    arguments: Arguments, model: Layered, shards: Shards, length: int, cuts: Cuts
) -> tuple[Analysis, dict[str, Any]]:
    """The figures of one encoder, and how they were made."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    begin = time.perf_counter()
    batches = texts.batches(shards, arguments.tokens, length, arguments.seed)
    plans = texts.masked(batches, shards, arguments.ratio, arguments.seed)
    with ProgressBar(f"reading by {model.name}", len(batches), "pack") as bar:
        halves = deficiency.gather(model, bar.over(plans), device)
    read = time.perf_counter()
    analysis = deficiency.analyse(halves, cuts)
    model.states.cpu()
    facts = {
        "name": model.name, "source": model.source, "sha256": model.fingerprint(), "layers": model.layers,
        "width": model.width, "text": str(arguments.text or shards.folder), "split": shards.split,
        "text_sha256": shards.fingerprint, "packs": len(batches), "rows": analysis.plain[0].rows, "length": length,
        "device": str(device), "seconds": {"reading": read - begin, "ranks": time.perf_counter() - read},
    }  # fmt: skip
    return analysis, facts


def write(arguments: Arguments, found: dict[str, Analysis], made: list[dict[str, Any]], cuts: Cuts) -> None:
    """Tables, picture and JSON, each put in place whole."""
    report = {
        "made": {
            "arguments": {f.name: getattr(arguments, f.name) for f in fields(arguments)},
            "versions": {name: version(name) for name in ("torch", "transformers")}
            | {"python": platform.python_version()},
            "precision": "states in 32 bits, moments in 64",
            "definitions": {"ranks": effective_rank.__doc__, "matrices and shares": deficiency.__doc__},
        },
        "models": [facts | asdict(found[facts["name"]]) for facts in made],
    }
    lines = [line for name in found for which in (False, True) for line in _of(name, found, cuts, which)]
    try:
        arguments.output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=arguments.output) as scratch:
            data, table, picture = (Path(scratch) / name for name in NAMES)
            data.write_text(json.dumps(report, indent=1, default=str) + "\n")
            table.write_text("\n".join(lines))
            drawing.picture(found, cuts, picture)
            for path in (data, table, picture):
                shutil.move(path, arguments.output / path.name)
    except OSError as error:
        raise StorageError(f"{arguments.output} cannot be written: {error.strerror}.") from None
    print("written:", *(arguments.output / name for name in NAMES))


def _of(name: str, found: dict[str, Analysis], cuts: Cuts, centred: bool) -> list[str]:
    return drawing.tables(name, found[name].centred if centred else found[name].plain, cuts, centred)


def _opening(model: Layered, facts: dict[str, Any]) -> str:
    rows, seconds = facts["rows"], facts["seconds"]
    fate = "left out of the second reading, as in its pretraining," if model.without_masks else "under [MASK],"
    return (
        f"{model.name}: {model.layers} layers of width {model.width}; {rows['clean']:,} tokens of text, of which "
        f"{rows['under']:,} {fate} in {facts['packs']} packs; reading {seconds['reading']:.1f} s, ranks "
        f"{seconds['ranks']:.1f} s. Cells: figure ± standard error (half the text).\n"
    )


def _length(arguments: Arguments, models: list[Layered]) -> int:
    limits = [model.longest for model in models if model.longest is not None]
    if arguments.length is None:
        return min([LENGTH, *limits])
    raise_all(
        ConfigError,
        [
            must("length", f"be at most {model.longest}, the longest that {model.name} can read", arguments.length)
            for model in models
            if model.longest is not None and model.longest < arguments.length
        ],
    )
    return arguments.length


def _shards(arguments: Arguments, model: Layered, scratch: Path) -> Shards:
    if arguments.text is not None:
        return texts.from_raw(arguments.text, model.tokenizer, scratch)
    data = arguments.data or texts.data_of(arguments.run[0])
    if data is None:
        raise ConfigError(f"{arguments.run[0]} does not say what it was trained on: name `data` or `text`.")
    return texts.held_out(data, model.tokenizer, model.name)


if __name__ == "__main__":
    entry_point.run(main)
