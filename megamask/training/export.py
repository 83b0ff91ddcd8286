"""Export a run: a checkpoint becomes a model for transformers, with a card that describes the run.

An export needs only the run folder: the shape of the encoder and the tokenizer are written into it before the first
step.
"""

from __future__ import annotations

import math
import shutil
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from megamask import hf
from megamask.checkpoint.format import find_checkpoint, read_manifest, read_weights, storage_sentence
from megamask.checkpoint.run_folder import RunFolder
from megamask.config.sources import data_folders
from megamask.data.excerpts import excerpts
from megamask.data.mixed_sources import joined_fingerprint
from megamask.data.shards import Shards
from megamask.data.tokenizer import TOKENIZER, load_tokenizer
from megamask.errors import CheckpointError, MegamaskError, StorageError
from megamask.metrics.metrics_file import read_metrics
from megamask.model.shape import EncoderShape
from megamask.storage import strict_json


def write_description(run: RunFolder, shape: EncoderShape, text: Shards) -> None:
    """Write into the run folder what an export needs besides weights: the shape of the encoder and the tokenizer.

    Raises StorageError.
    """
    try:
        shape.save(run.path)
        shutil.copytree(text.folder / TOKENIZER, run.path / TOKENIZER, dirs_exist_ok=True)
    except OSError as error:
        raise StorageError(storage_sentence(error, "describe the run", run.path)) from None


def export_checkpoint(
    run: Path, output: Path, step: int | None = None, *, text: Shards | None = None, replace: bool = False
) -> hf.Exported:
    """Write a checkpoint of ``run`` (else the newest) for transformers, compared with the original.

    Needs only the run folder, of any ZeRO stage and number of ranks, and no GPU. If the held-out text of the run is
    available (``text``, else at the run's `data`), the tokenizers are compared on it too. ``replace`` allows to
    overwrite an export of another run at ``output``.
    """
    try:
        config = strict_json.read_json(run / "config.json")
        if not isinstance(config, dict):
            raise ValueError
    except (OSError, ValueError):
        raise CheckpointError(f"{run} holds no config.json that can be read, so it is not a run.") from None
    checkpoint = find_checkpoint(run, step)
    weights, shape = read_weights(checkpoint), EncoderShape.load(run)
    card = _card(run, config, read_manifest(checkpoint).step)
    sentences = _held_out(run, config, text)
    return hf.export_model(weights, shape, run / TOKENIZER, output, card=card, sentences=sentences, replace=replace)


def _card(run: Path, config: dict, steps: int) -> hf.Card:
    objective = config.get("objective") or {}
    return hf.Card(
        name=run.resolve().name,
        recipe=config.get("recipe") or "none",
        steps=steps,
        data=config.get("text", "unknown"),
        facts={
            **({"initial weights": Path(init).name} if (init := config.get("init")) else {}),
            **_size(run, config),
            **_validation(run, steps),
            "exported": f"{datetime.now(UTC):%Y-%m-%d}",
        },
        knows_mask=objective.get("kind") != "mae_lm" and objective.get("mask_vector", "shared") == "shared",
        run=_first_launch(run),
    )


def _size(run: Path, config: dict) -> dict[str, str]:
    try:
        part = strict_json.read_json(RunFolder(run).text)["splits"]["train"]
        size = f"{part['documents']:,} documents, {part['tokens']:,} tokens"
    except (OSError, ValueError, LookupError, TypeError):
        return {}
    names = " + ".join(folder.name for folder in data_folders(config.get("data")))
    name = names or "documentation of installed Python packages"
    return {"text": f"{name}: {size}"}


def last_validation(run: Path, last_step: float = math.inf) -> tuple[int, float, float | None] | None:
    """Step, validation loss and unigram loss of the last validation up to ``last_step``, in nats; None without one."""
    for line in reversed(read_metrics(RunFolder(run).logs / "metrics.jsonl")):
        loss, unigram = line.get("valid/loss"), line.get("valid/unigram_loss")
        if line["step"] <= last_step and isinstance(loss, float):
            return line["step"], loss, unigram if isinstance(unigram, float) else None
    return None


def _validation(run: Path, last_step: int) -> dict[str, str]:
    if not (last := last_validation(run, last_step)):
        return {}
    step, loss, unigram = last
    guess = "" if unigram is None else f" (a guess by frequency: {unigram:.4f})"
    return {"validation loss": f"{loss:.4f} nats per masked token at step {step}{guess}"}


def _first_launch(run: Path) -> str:
    try:
        return str(strict_json.read_json(RunFolder(run).environment)["launches"][0]["launch"])
    except (OSError, ValueError, LookupError, TypeError):
        return ""


def _held_out(run: Path, config: dict, text: Shards | None) -> list[str]:
    """Excerpts of the run's held-out text; none if it is missing or has changed."""
    with suppress(OSError, MegamaskError):
        folders = [shards.folder for shards in text.sources] if text else data_folders(config.get("data"))
        held_out = [Shards.open(folder, "valid") for folder in folders]
        if held_out and joined_fingerprint(held_out) == config.get("text"):
            tokenizer = load_tokenizer(run / TOKENIZER)
            return [excerpt for shards in held_out for excerpt in excerpts(shards, tokenizer)]
    return []
