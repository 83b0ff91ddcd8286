"""`megamask export` and `megamask import`: models that cross the boundary to transformers, in either direction."""

from __future__ import annotations

from megamask import hf
from megamask.training.export import export_checkpoint
from megamask.training.settings import ExportConfig, ImportConfig


def export_run(config: ExportConfig) -> None:
    """Write a checkpoint of a run as a model for transformers, and print what the comparison found."""
    exported = export_checkpoint(config.run, config.output, config.step, replace=config.replace)
    print(f"{config.output}: logits of transformers and ours differ by at most {exported.difference:.2g}")
    for note in exported.notes:
        print(note)


def import_weights(config: ImportConfig) -> None:
    """Write a model of transformers as initial weights, and print how to train from them."""
    model = hf.save_start(config.model, config.output, new_head=config.new_head)
    for note in model.notes:
        print(note)
    shape = model.shape
    print(
        f"{config.output}: {shape.family or shape.preset}, {shape.num_layers} layers of width {shape.hidden_size}. "
        f"Prepare text with its tokenizer: megamask prepare --tokenizer {config.output / 'tokenizer'}. Then train: "
        f"megamask pretrain --init {config.output}."
    )
