"""`megamask analyze-rank`: read every encoder on the same text, measure, print tables, write files."""

from __future__ import annotations

import json
import platform
import shutil
import tempfile
import time
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from megamask.analysis import deficiency, drawing, effective_rank, texts
from megamask.analysis.deficiency import Analysis, Cuts
from megamask.analysis.layers import Layered, open_hf_encoder, open_run_encoder
from megamask.analysis.settings import RankConfig
from megamask.data.shards import Shards
from megamask.errors import ConfigError, DataError, MegamaskError, StorageError, must, raise_all
from megamask.runtime.progress_bar import ProgressBar

LENGTH = 512
NAMES = ("ranks.json", "ranks.md", "ranks.png")


def analyse_rank(config: RankConfig) -> None:
    """Read, measure, print, write."""
    models = opened(config)
    length = _length(config, models)
    raise_all(DataError, [p for m in models for p in texts.enough(config.tokens, config.ratio, m.width)])
    cuts = Cuts(config.energy, config.threshold)
    found: dict[str, Analysis] = {}
    made: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for number, model in enumerate(models):
            shards = _shards(config, model, Path(scratch) / str(number))
            found[model.name], facts = measure_encoder(config, model, shards, length, cuts)
            made.append(facts)
            print(_opening(model, facts), *_of(model.name, found, cuts, config.centred), sep="\n")
    write_analysis(config, found, made, cuts)


def opened(config: RankConfig) -> list[Layered]:
    """The encoders, each under a name of its own; all that cannot be read is told at once."""
    models, problems = [], []
    asked = [lambda path=path: open_run_encoder(path, config.step) for path in config.run]
    asked += [lambda name=name: open_hf_encoder(name) for name in config.model]
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


def measure_encoder(
    config: RankConfig, model: Layered, shards: Shards, length: int, cuts: Cuts
) -> tuple[Analysis, dict[str, Any]]:
    """The figures of one encoder, and how they were made."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    begin = time.perf_counter()
    batches = texts.batches(shards, config.tokens, length, config.seed)
    plans = texts.masked(batches, shards, config.ratio, config.seed)
    with ProgressBar(f"reading by {model.name}", len(batches), "pack") as bar:
        halves = deficiency.gather_states(model, bar.over(plans), device)
    read = time.perf_counter()
    analysis = deficiency.analyse_layers(halves, cuts)
    model.states.cpu()
    facts = {
        "name": model.name, "source": model.source, "sha256": model.fingerprint(), "layers": model.layers,
        "width": model.width, "text": str(config.text or shards.folder), "split": shards.split,
        "text_sha256": shards.fingerprint, "packs": len(batches), "rows": analysis.plain[0].rows, "length": length,
        "device": str(device), "seconds": {"reading": read - begin, "ranks": time.perf_counter() - read},
    }  # fmt: skip
    return analysis, facts


def write_analysis(config: RankConfig, found: dict[str, Analysis], made: list[dict[str, Any]], cuts: Cuts) -> None:
    """Tables, picture and JSON, each put in place whole."""
    report = {
        "made": {
            "arguments": {f.name: getattr(config, f.name) for f in fields(config)},
            "versions": {name: version(name) for name in ("torch", "transformers")}
            | {"python": platform.python_version()},
            "precision": "states in 32 bits, moments in 64",
            "definitions": {"ranks": effective_rank.__doc__, "matrices and shares": deficiency.__doc__},
        },
        "models": [facts | asdict(found[facts["name"]]) for facts in made],
    }
    lines = [line for name in found for which in (False, True) for line in _of(name, found, cuts, which)]
    try:
        config.output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=config.output) as scratch:
            data, table, picture = (Path(scratch) / name for name in NAMES)
            data.write_text(json.dumps(report, indent=1, default=str) + "\n")
            table.write_text("\n".join(lines))
            drawing.picture(found, cuts, picture)
            for path in (data, table, picture):
                shutil.move(path, config.output / path.name)
    except OSError as error:
        raise StorageError(f"{config.output} cannot be written: {error.strerror}.") from None
    print("written:", *(config.output / name for name in NAMES))


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


def _length(config: RankConfig, models: list[Layered]) -> int:
    limits = [model.longest for model in models if model.longest is not None]
    if config.length is None:
        return min([LENGTH, *limits])
    raise_all(
        ConfigError,
        [
            must("length", f"be at most {model.longest}, the longest that {model.name} can read", config.length)
            for model in models
            if model.longest is not None and model.longest < config.length
        ],
    )
    return config.length


def _shards(config: RankConfig, model: Layered, scratch: Path) -> Shards:
    if config.text is not None:
        return texts.from_raw(config.text, model.tokenizer, scratch)
    data = config.data or texts.data_of(config.run[0])
    if data is None:
        raise ConfigError(f"{config.run[0]} does not say what it was trained on: name `data` or `text`.")
    return texts.held_out(data, model.tokenizer, model.name)
