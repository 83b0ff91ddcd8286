"""The lines that a run prints about its model, text and sources, at its start and with its metrics."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from megamask import __version__
from megamask.config.phases import phase_targets, run_phases
from megamask.config.pretrain_config import PretrainConfig
from megamask.config.settings import MixtureConfig, PhaseConfig
from megamask.data.length_phases import SourcePacks
from megamask.data.mixed_sources import MixedPacks, TextPacks
from megamask.data.mixture import BLOCK, PHASES, AnnealedOrder, smoothed_shares
from megamask.data.packs import Packs
from megamask.errors import listed
from megamask.masking.masker import Masker
from megamask.model.shape import EncoderShape
from megamask.runtime import launch_environment, ranks
from megamask.training.validation import Validation

MOST_EPOCHS = 4
"""A run warns if it reads a source more often than this: up to 4 epochs, repeated text is nearly as good as new text in
causal models ("Scaling Data-Constrained Language Models", Muennighoff et al. 2023). If masks differ in each epoch, the
limit may be another."""


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
        "more without output. It does not count for tokens/s and the time left.",
        *compiling_again(config),
    ]


def compiling_again(config: PretrainConfig) -> list[str]:
    """A line if the layers are compiled again whenever the masking rate moves, as where [MASK] enters late."""
    numbers = len(phase_targets(config))
    if not (config.model.compile and config.objective.late and numbers > 1):
        return []
    return [
        f"The masking rate moves through {numbers} values, and the layers before [MASK] are compiled again for each: "
        "the first step after a change takes as long as the first of the run. A constant `masking.ratio` compiles once."
    ]


def opening_lines(config: PretrainConfig, shape: EncoderShape, packs: TextPacks, weights: int, step: int) -> list[str]:
    """Lines about the model, the text and the run."""
    tokens = tokens_per_step(config)
    if isinstance(packs, MixedPacks):
        text_lines, epochs = mixture_lines(config, packs), ""
    else:
        text_lines = [f"text: {_text_line(config, packs)}"]
        epochs = f"({packs.epochs(run_phases(config).packs_before(config.steps)):.1f} epochs) "
    lines = [
        f"{shape.family or shape.preset} encoder, {shape.num_layers} layers of width {shape.hidden_size}: "
        f"{weights:,} parameters, {packs.token_ids.size:,} tokens in the vocabulary",
        *text_lines,
        f"run: {config.output}: {config.steps:,} steps of {tokens} tokens {epochs}on {ranks.world()} x "
        f"{ranks.device().type}",
    ]
    lines += phase_lines(config)
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


def _text_line(config: PretrainConfig, packs: SourcePacks) -> str:
    return (
        f"{packs.shards.folder}: {packs.shards.tokens:,} tokens in {packs.shards.documents:,} documents, "
        f"{len(packs):,} pack{'s' * (len(packs) != 1)} of {config.packs.tokens:,} tokens, {packs.fill:.1%} full"
    )


def tokens_per_step(config: PretrainConfig) -> str:
    """The tokens of a step, as words; of a run whose steps differ, the fewest and the most."""
    sizes = sorted({phase.per_step * config.packs.tokens for phase in run_phases(config).phases})
    return f"{sizes[0]:,}" if len(sizes) == 1 else f"{sizes[0]:,} to {sizes[-1]:,}"


def phase_lines(config: PretrainConfig) -> list[str]:
    """A line for each phase of a run, with all that one of them changes; nothing for a run without phases."""
    phases = run_phases(config).phases
    if len(phases) == 1:
        return []
    lines = []
    for phase, following in zip(phases, [*phases[1:], None], strict=True):
        end = config.steps if following is None else following.first_step
        words = [
            f"sequences of at most {phase.length:,} tokens",
            f"{phase.per_step * config.packs.tokens:,} tokens a step",
        ]
        if phase.mask_ratio is not None:
            words.append(f"{phase.mask_ratio:.1%} of them masked")
        if phase.shares is not None:
            words.append(f"shares {', '.join(f'{share / sum(phase.shares):.1%}' for share in phase.shares)}")
        if phase.alpha is not None:
            words.append(f"shares by alpha {phase.alpha:g}")
        lines.append(f"steps {phase.first_step + 1:,} to {end:,}: {'; '.join(words)}")
    return lines


def mixture_lines(config: PretrainConfig, packs: MixedPacks) -> list[str]:
    """The share of each source and how often the whole run reads it, with a warning above `MOST_EPOCHS`."""
    phases = run_phases(config)
    total = phases.packs_before(config.steps)
    epochs = packs.source_epochs(total)
    moves = "" if config.mixture.alpha_end is None else f", in each of {PHASES} steps of alpha"
    if isinstance(packs.order, AnnealedOrder) and not moves:
        moves = ", in each phase of the run"
    lines = [f"text: a mixture of {len(epochs)} sources, exact in any {BLOCK:,} packs{moves}"]
    last = packs.shares_at(total - 1)
    for name, share in packs.shares_at(0).items():
        to = f" to {last[name]:.1%}" if moves else ""
        lines.append(f"  {name}: share {share:.1%}{to}, read {epochs[name]:.2f} times in {config.steps:,} steps")
        lines.append(f"    {_text_line(config, packs.sources[name])}")
    lines += _raised_shares(config, packs)
    often = [name for name, value in epochs.items() if value > MOST_EPOCHS]
    if often:
        lines.append(
            f"  {listed(often, 'source')} will be read more than {MOST_EPOCHS} times: repeated text teaches less and "
            "less. Give it a smaller share or more text, or train for fewer steps."
        )
    return lines


def _raised_shares(config: PretrainConfig, packs: MixedPacks) -> list[str]:
    """A line for sources whose share is raised to a pack in a block, the least that a source with a share has."""
    sizes, mixture = [len(source) for source in packs.sources.values()], config.mixture
    parts: list[MixtureConfig | PhaseConfig] = [mixture, *config.phases]
    asked = [part.shares for part in parts if part.shares]
    alphas = [part.alpha for part in parts if part.alpha is not None and not part.shares]
    alphas += [mixture.alpha_end] if mixture.alpha_end is not None else []
    asked += [tuple(smoothed_shares(sizes, alpha).tolist()) for alpha in alphas]
    raised: dict[str, float] = {}
    for shares in asked:
        for name, share in zip(packs.sources, shares, strict=True):
            if 0 < share < sum(shares) / BLOCK:
                raised[name] = min(share / sum(shares), raised.get(name, 1.0))
    if not raised:
        return []
    names = listed((f"{name} ({share:.2g})" for name, share in raised.items()), "source")
    return [f"  {names}: a share below {1 / BLOCK:g} counts as {1 / BLOCK:g}, a pack in {BLOCK:,}"]


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


def mask_metrics(config: PretrainConfig, masker: Masker, progress: float) -> dict[str, float]:
    """The share of random targets if a score is used, and the weight of the teacher if there is one."""
    metrics = {}
    if config.masking.score != "uniform":
        metrics["masking/random_share"] = masker.random_share(progress)
    if config.distill.active:
        metrics["distill/weight"] = config.distill.weight(progress)
    return metrics
