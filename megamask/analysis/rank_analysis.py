"""`megamask analyze-rank`: read every encoder on the same text, measure, print tables, write files."""

from __future__ import annotations

import json
import platform
import tempfile
import time
from dataclasses import asdict, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from megamask.analysis import deficiency, drawing, effective_rank, texts
from megamask.analysis.deficiency import Analysis, Cuts
from megamask.analysis.layers import AnalyzedEncoder, open_hf_encoder, open_run_encoder
from megamask.analysis.settings import RankConfig
from megamask.data.shards import Shards
from megamask.errors import ConfigError, DataError, MegamaskError, StorageError, must, raise_all
from megamask.runtime.progress_bar import ProgressBar
from megamask.storage import atomic_write

LENGTH = 512
NAMES = ("ranks.json", "ranks.md", "ranks.png")


def analyze_rank(config: RankConfig) -> None:
    """Read, measure, print, write."""
    models = open_encoders(config)
    length = _length(config, models)
    raise_all(DataError, [p for m in models for p in texts.too_few_tokens(config.tokens, config.ratio, m.width)])
    cuts = Cuts(config.energy, config.threshold)
    analyses: dict[str, Analysis] = {}
    facts: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        for number, model in enumerate(models):
            shards = _shards(config, model, Path(scratch) / str(number))
            analyses[model.name], model_facts = measure_encoder(config, model, shards, length, cuts)
            facts.append(model_facts)
            tables = _tables(model.name, analyses[model.name], cuts, config.centred)
            print(_header(model, model_facts), *tables, sep="\n")
    write_analysis(config, analyses, facts, cuts)


def open_encoders(config: RankConfig) -> list[AnalyzedEncoder]:
    """The encoders, each under a different name. Reports everything that cannot be read at once."""
    models, problems = [], []
    opens = [lambda path=path: open_run_encoder(path, config.step) for path in config.run]
    opens += [lambda name=name: open_hf_encoder(name) for name in config.model]
    for open_encoder in opens:
        try:
            models.append(open_encoder())
            problems += texts.vocabulary_problems(models[-1].tokenizer, models[-1].vocabulary, models[-1].name)
        except MegamaskError as error:
            if len(opens) == 1:
                raise
            problems += error.problems
    names = [model.name for model in models]
    problems += [
        f"Two encoders are called {name!r}. Rename a folder." for name in {n for n in names if names.count(n) > 1}
    ]
    raise_all(DataError, problems)
    return models


def measure_encoder(
    config: RankConfig, model: AnalyzedEncoder, shards: Shards, length: int, cuts: Cuts
) -> tuple[Analysis, dict[str, Any]]:
    """The figures of one encoder, and a record of how they were made."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    begin = time.perf_counter()
    batches = texts.batches(shards, config.tokens, length, config.seed)
    plans = texts.mask_batches(batches, shards, config.ratio, config.seed)
    with ProgressBar(f"reading with {model.name}", len(batches), "pack") as bar:
        halves = deficiency.gather_states(model, bar.over(plans), device)
    read = time.perf_counter()
    analysis = deficiency.analyze_layers(halves, cuts)
    model.states.cpu()
    facts = {
        "name": model.name, "source": model.source, "sha256": model.fingerprint(), "layers": model.layers,
        "width": model.width, "text": str(config.text or shards.folder), "split": shards.split,
        "text_sha256": shards.fingerprint, "packs": len(batches), "rows": analysis.plain[0].rows, "length": length,
        "device": str(device), "seconds": {"reading": read - begin, "ranks": time.perf_counter() - read},
    }  # fmt: skip
    return analysis, facts


def write_analysis(config: RankConfig, analyses: dict[str, Analysis], facts: list[dict[str, Any]], cuts: Cuts) -> None:
    """Write tables, picture and JSON: all files complete, or none."""
    report = {
        "made": {
            "arguments": {f.name: getattr(config, f.name) for f in fields(config)},
            "versions": {name: version(name) for name in ("torch", "transformers")}
            | {"python": platform.python_version()},
            "precision": "states in 32 bits, moments in 64",
            "definitions": {"ranks": effective_rank.__doc__, "matrices and shares": deficiency.__doc__},
        },
        "models": [each | asdict(analyses[each["name"]]) for each in facts],
    }
    lines = [
        line
        for name, analysis in analyses.items()
        for centred in (False, True)
        for line in _tables(name, analysis, cuts, centred)
    ]
    is_new = not config.output.exists()
    try:
        config.output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=config.output) as scratch:
            data, table, picture = (Path(scratch) / name for name in NAMES)
            data.write_text(json.dumps(report, indent=1, default=str) + "\n")
            table.write_text("\n".join(lines))
            drawing.picture(analyses, cuts, picture)
            for path in (data, table, picture):
                atomic_write.sync(path)
            for path in (data, table, picture):
                atomic_write.rename(path, config.output / path.name)
            atomic_write.sync(config.output)
    except OSError as error:
        if is_new:
            atomic_write.remove(config.output)
        raise StorageError(f"{config.output} cannot be written: {error.strerror}.") from None
    print("written:", *(config.output / name for name in NAMES))


def _tables(name: str, analysis: Analysis, cuts: Cuts, centred: bool) -> list[str]:
    return drawing.tables(name, analysis.centred if centred else analysis.plain, cuts, centred)


def _header(model: AnalyzedEncoder, facts: dict[str, Any]) -> str:
    rows, seconds = facts["rows"], facts["seconds"]
    how = "left out of the second reading, as in its pretraining," if model.without_masks else "replaced by [MASK],"
    return (
        f"{model.name}: {model.layers} layers of width {model.width}; {rows['clean']:,} tokens of text in "
        f"{facts['packs']} packs, of which {rows['under']:,} {how} in the masked input; reading took "
        f"{seconds['reading']:.1f} s, ranks {seconds['ranks']:.1f} s. Cells: figure ± standard error (half the text).\n"
    )


def _length(config: RankConfig, models: list[AnalyzedEncoder]) -> int:
    limits = [model.longest for model in models if model.longest is not None]
    if config.length is None:
        return min([LENGTH, *limits])
    raise_all(
        ConfigError,
        [
            must("length", f"be at most {model.longest}, the longest sequence of {model.name}", config.length)
            for model in models
            if model.longest is not None and model.longest < config.length
        ],
    )
    return config.length


def _shards(config: RankConfig, model: AnalyzedEncoder, scratch: Path) -> Shards:
    if config.text is not None:
        return texts.prepare_raw(config.text, model.tokenizer, scratch)
    data = config.data or texts.training_data(config.run[0])
    if data is None:
        raise ConfigError(f"{config.run[0]} does not say on which text it was trained: name `data` or `text`.")
    return texts.open_held_out(data, model.tokenizer, model.name)
