"""The end of a run: draw the loss curve, export the model, and print example predictions."""

from __future__ import annotations

from contextlib import suppress

from megamask import hf
from megamask.checkpoint.format import storage_sentence
from megamask.checkpoint.run_folder import RunFolder
from megamask.config.pretrain_config import PretrainConfig
from megamask.data.excerpts import excerpts, fill_mask_examples
from megamask.data.shards import Shards
from megamask.data.tokenizer import TOKENIZER, load_tokenizer
from megamask.errors import CheckpointError, MegamaskError, StorageError
from megamask.metrics.loss_curve import plot_curve
from megamask.training.export import export_checkpoint, last_validation


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
        exported = export_checkpoint(run.path, run.export, text=text, replace=True)  # inside the run's own folder
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
    last = last_validation(run.path)
    if last and last[2] is not None and last[1] >= last[2]:
        _say(
            f"  The model has hardly learned yet: its validation loss ({last[1]:.2f}) is not below that of a guess by "
            f"frequency ({last[2]:.2f}). Expect noise:"
        )
    tokenizer = load_tokenizer(text.folder / TOKENIZER)
    sources = [Shards.open(shards.folder, "valid") for shards in text.sources]
    each = max(1, 4 // len(sources))
    examples = [
        example
        for shards in sources
        for example in fill_mask_examples(excerpts(shards, tokenizer, 16), tokenizer, each)
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
