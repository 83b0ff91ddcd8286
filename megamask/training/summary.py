"""The lines that a run prints at its start, and at its end the curve, the export and example predictions."""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from megamask import __version__, hf
from megamask.checkpoint.format import find_checkpoint, read_manifest, read_weights, storage_sentence
from megamask.checkpoint.run_folder import RunFolder
from megamask.config.pretrain_config import PretrainConfig
from megamask.config.sources import data_folders
from megamask.data.excerpts import excerpts, questions
from megamask.data.mixed_sources import MixedPacks, TextPacks, joined_fingerprint
from megamask.data.mixture import BLOCK
from megamask.data.packs import Packs
from megamask.data.shards import Shards
from megamask.data.tokenizer import TOKENIZER, load_tokenizer
from megamask.errors import CheckpointError, MegamaskError, StorageError, listed
from megamask.masking.masker import Masker
from megamask.metrics.logger import plot_curve, read_metrics
from megamask.model.shape import EncoderShape
from megamask.runtime import launch_environment, ranks
from megamask.storage import strict_json
from megamask.training.validation import Validation

MOST_EPOCHS = 4
"""More epochs of a source are warned of: up to 4, repeated text is nearly as good as new text, in causal models
("Scaling Data-Constrained Language Models", Muennighoff et al. 2023). Masks that differ in each epoch may move this."""


def first_line(recipe: str, output: Path) -> str:
    """The first line of a run. Under a launcher it says that the lines above are the launcher's."""
    line = f"megamask {__version__}: recipe {recipe}, output {output}"
    if launch_environment.launched():
        line += ". Lines above this one are from the launcher (deepspeed, torchrun or srun) and need no action."
    return line


def compiling(config: PretrainConfig) -> list[str]:
    """A line about what torch.compile will compile during the first step, if anything."""
    parts = ["the encoder's layers"] if config.model.compile else []
    if config.optimizer.kind == "muon" and ranks.device().type == "cuda":
        parts.append("Muon's update")
    if not parts:
        return []
    return [
        f"torch.compile compiles {' and '.join(parts)} during the first evaluation and step. This takes a minute or "
        "more without output. It does not count for tokens/s and the time left."
    ]


def opening_lines(config: PretrainConfig, shape: EncoderShape, packs: TextPacks, weights: int, step: int) -> list[str]:
    """Lines about the model, the text and the run."""
    per_step = config.packs.per_step * config.packs.tokens
    if isinstance(packs, MixedPacks):
        text_lines, epochs = mixture_lines(config, packs), ""
    else:
        text_lines = [f"text: {_text_line(config, packs)}"]
        epochs = f"({config.steps * config.packs.per_step / len(packs):.1f} epochs) "
    lines = [
        f"{shape.family or shape.preset} encoder, {shape.num_layers} layers of width {shape.hidden_size}: "
        f"{weights:,} parameters, {packs.token_ids.size:,} tokens in the vocabulary",
        *text_lines,
        f"run: {config.output}: {config.steps:,} steps of {per_step:,} tokens {epochs}on {ranks.world()} x "
        f"{ranks.device().type}",
    ]
    if config.time_budget:
        lines.append(
            f"time: {config.time_budget} of training. Every schedule runs on this clock, so the run cannot be repeated "
            "bit for bit"
        )
    sizes = packs.shards.word_sizes
    if config.masking.unit != "token" and sizes:
        lines.append(f"words: {sizes.sentence()}")
    if packs.left_out:
        lines.append(f"{packs.left_out:,} tokens at the end of the text are left out: they do not fill a pack")
    if packs.short:
        lines.append(
            f"{packs.shortage} Their {packs.short_tokens:,} tokens of text are left out, and other packs are "
            "read again in their place."
        )
    if step:
        lines.append(f"resuming after step {step:,} of {config.steps:,}")
    return lines


def _text_line(config: PretrainConfig, packs: Packs) -> str:
    return (
        f"{packs.shards.folder}: {packs.shards.tokens:,} tokens in {packs.shards.documents:,} documents, "
        f"{len(packs):,} packs of {config.packs.tokens:,} tokens, {packs.fill:.1%} full"
    )


def mixture_lines(config: PretrainConfig, packs: MixedPacks) -> list[str]:
    """The share of each source and how often the whole run reads it, with a warning above `MOST_EPOCHS`."""
    epochs = packs.epochs(config.steps * config.packs.per_step)
    lines = [f"text: a mixture of {len(epochs)} sources, exact in any {BLOCK:,} packs"]
    for name, share in packs.shares.items():
        lines.append(f"  {name}: share {share:.1%}, read {epochs[name]:.2f} times in {config.steps:,} steps")
        lines.append(f"    {_text_line(config, packs.sources[name])}")
    often = [name for name, value in epochs.items() if value > MOST_EPOCHS]
    if often:
        lines.append(
            f"  {listed(often, 'source')} will be read more than {MOST_EPOCHS} times: repeated text teaches less and "
            "less. Give it a smaller share or more text, or train for fewer steps."
        )
    return lines


def source_losses(by_source: Mapping[str, Validation]) -> list[str]:
    """Lines with the validation loss of each source of a mixture, and its nats per byte beside their mean."""
    lines = ["  validation loss: " + "  ".join(f"{name} {result.loss:.4f}" for name, result in by_source.items())]
    nats = {name: result.nats_per_byte for name, result in by_source.items() if result.nats_per_byte is not None}
    if len(nats) == len(by_source):
        shown = "  ".join(f"{name} {value:.4f}" for name, value in nats.items())
        worst = max(nats, key=nats.__getitem__)
        lines.append(f"  nats per byte: {shown}  (mean {sum(nats.values()) / len(nats):.4f}, highest in {worst})")
    return lines


def without_bytes(held_out: Mapping[str, Packs]) -> str:
    """A line for shards that do not record bytes; empty if all do."""
    names = [str(packs.shards.folder) for packs in held_out.values() if packs.bytes_per_token is None]
    if not names:
        return ""
    return f"Nats per byte are not known: the bytes of {listed(names, 'folder')} were not recorded. Prepare it again."


def epochs_read(epochs: Mapping[str, float]) -> str:
    """A line about how often each source of a mixture was read."""
    return "times each source was read: " + ", ".join(f"{name} {value:.2f}" for name, value in epochs.items())


def mask_figures(config: PretrainConfig, masker: Masker, progress: float) -> dict[str, float]:
    """The share of random targets if a score is used, and the weight of the teacher if there is one."""
    metrics = {}
    if config.masking.score != "uniform":
        metrics["masking/random_share"] = masker.random_share(progress)
    if config.distill.active:
        metrics["distill/weight"] = config.distill.weight(progress)
    return metrics


def describe(run: RunFolder, shape: EncoderShape, text: Shards) -> None:
    """Write into the run folder what an export needs besides weights: the shape of the encoder and the tokenizer.

    Raises StorageError.
    """
    try:
        shape.save(run.path)
        shutil.copytree(text.folder / TOKENIZER, run.path / TOKENIZER, dirs_exist_ok=True)
    except OSError as error:
        raise StorageError(storage_sentence(error, "describe the run", run.path)) from None


def export(
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
        facts=_size(run, config) | _validation(run, steps) | {"exported": f"{datetime.now(UTC):%Y-%m-%d}"},
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


def _last_validation(run: Path, last_step: float = math.inf) -> tuple[int, float, float | None] | None:
    """Step, validation loss and unigram loss of the last validation up to ``last_step``, in nats; None without one."""
    for line in reversed(read_metrics(RunFolder(run).logs / "metrics.jsonl")):
        loss, unigram = line.get("valid/loss"), line.get("valid/unigram_loss")
        if line["step"] <= last_step and isinstance(loss, float):
            return line["step"], loss, unigram if isinstance(unigram, float) else None
    return None


def _validation(run: Path, last_step: int) -> dict[str, str]:
    if not (last := _last_validation(run, last_step)):
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


def finish_run(run: RunFolder, config: PretrainConfig, text: Shards) -> None:
    """Draw the curve, export the model, and print what it predicts for [MASK].

    The run itself is finished, so a failure here loses nothing else. A failed export raises an error that says so; a
    failed picture prints a line.
    """
    picture = run.path / "curve.png"
    try:
        plot_curve(run.logs / "metrics.jsonl", picture)
        _say(f"curve: {picture}")
    except OSError as error:
        _say(storage_sentence(error, f"draw {picture}", run.path))
    if not config.export:
        return
    try:
        exported = export(run.path, run.export, text=text, replace=True)  # inside the run's own folder
    except (OSError, MegamaskError) as error:
        kind: type[MegamaskError] = StorageError
        if isinstance(error, MegamaskError):
            kind = CheckpointError if isinstance(error, CheckpointError) else type(error)
        why = storage_sentence(error, f"write {run.export}", run.path) if isinstance(error, OSError) else str(error)
        cure = "Free some space; the" if kind is StorageError else "After that is fixed, the"
        raise kind(
            f"The run is finished and its checkpoints are saved, but the model was not exported: {why} {cure} "
            "same command exports it."
        ) from None
    _say(f"model: {run.export} (logits of transformers and ours differ by at most {exported.difference:.2g})")
    for note in exported.notes:
        _say(f"  {note}")
    if not config.objective.knows_mask:
        _say("  It was pretrained without [MASK] in its input, so it cannot fill one in; fine-tune it.")
        return
    try:
        _show(run, text)
    except (OSError, MegamaskError) as error:
        _say(f"  No [MASK] could be filled in: {error}")


def _show(run: RunFolder, text: Shards) -> None:
    """Print what the exported model predicts for a masked word of the held-out text, beside that word."""
    last = _last_validation(run.path)
    if last and last[2] is not None and last[1] >= last[2]:
        _say(
            f"  The model has hardly learned yet: its validation loss ({last[1]:.2f}) is not below that of a guess by "
            f"frequency ({last[2]:.2f}). Expect noise:"
        )
    tokenizer = load_tokenizer(text.folder / TOKENIZER)
    sources = [Shards.open(shards.folder, "valid") for shards in text.sources]
    each = max(1, 4 // len(sources))
    examples = [
        example for shards in sources for example in questions(excerpts(shards, tokenizer, 16), tokenizer, each)
    ]
    guess = ", ".join(hf.common_words(run.export, text.unigram, 3))
    answers = hf.fill_masks(run.export, [example.sentence for example in examples], 3)
    for example, predictions in zip(examples, answers, strict=True):
        _say(f"  {example.sentence}")
        words = ", ".join(f"{word} ({share:.0%})" for word, share in predictions)
        _say(f"    model: {words}   hidden: {example.answer}   unigram guess: {guess}")


def _say(line: str) -> None:
    with suppress(OSError):  # the export continues if a launcher or `tee` is gone
        print(line, flush=True)
