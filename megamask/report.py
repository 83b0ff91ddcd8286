"""What a run tells people: at its start what it is about to do, at its end what came of it."""

from __future__ import annotations

from megamask import ranks
from megamask.checkpoint import RunFolder
from megamask.config import PretrainConfig
from megamask.data.packs import Packs
from megamask.data.shards import Shards
from megamask.metrics import Cost, plot_curve
from megamask.model.shape import EncoderShape


def cost(shape: EncoderShape) -> Cost:
    """What an encoder of ``shape`` costs, for MFU."""
    local = sum(shape.window(layer) is not None for layer in range(shape.num_layers))
    return Cost.of(
        layers=shape.num_layers,
        width=shape.hidden_size,
        inner=shape.intermediate_size,
        gated=shape.preset == "modern",
        vocab=shape.vocab_size,
        local_layers=local,
        window=shape.local_window if local else 0,
    )


def opening(config: PretrainConfig, packs: Packs, weights: int, step: int) -> list[str]:
    """Lines that say what is trained, on what, and where."""
    per_step = config.packs.per_step * config.packs.tokens
    lines = [
        f"{config.model.preset} encoder, size {config.model.size}: {weights:,} parameters, "
        f"{packs.token_ids.size:,} tokens in the vocabulary",
        f"text: {packs.shards.folder}: {packs.shards.tokens:,} tokens in {packs.shards.documents:,} documents, "
        f"{len(packs):,} packs of {config.packs.tokens:,} rows, {packs.fill:.1%} full",
        f"run: {config.output}: {config.steps:,} steps of {per_step:,} rows "
        f"({config.steps * config.packs.per_step / len(packs):.1f} epochs) on {ranks.world()} x {ranks.device().type}",
    ]
    if packs.left_out:
        lines.append(f"{packs.left_out:,} tokens at the end of the text are left out: they fill no pack")
    if step:
        lines.append(f"going on after step {step:,} of {config.steps:,}")
    return lines


def ending(run: RunFolder, config: PretrainConfig, text: Shards, recipe: str) -> None:
    """The curve as a picture; the exported model and its answers."""
    picture = run.path / "curve.png"
    plot_curve(run.logs / "metrics.jsonl", picture)
    print(f"curve: {picture}")
