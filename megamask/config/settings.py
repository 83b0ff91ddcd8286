"""The settings of mixtures, packs, validation, checkpoints and logs; without torch."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from math import isfinite
from typing import Annotated, ClassVar

from annotated_types import Ge
from pydantic import ConfigDict

from megamask.errors import must
from megamask.errors.setting_rules import Count, NotNegative, Positive, Share, ShareInside, removable


@dataclass(frozen=True)
class MixtureConfig:
    """How much is read of each source, if `data` names several folders of shards."""

    shares: tuple[NotNegative, ...] | None = None
    """Share of each folder of `data`, in their order, in any unit; `--data FOLDER=SHARE FOLDER=SHARE` sets them too.
    Rounded to a thousandth. None: by `alpha`."""
    alpha: Share = 1.0
    """Without `shares`, the share of a source is proportional to (its packs / all packs) to the power of `alpha`. 1
    reads all sources equally often; smaller values read small sources more often, 0.3 is usual for languages."""
    alpha_end: Share | None = None
    """The value to which `alpha` moves linearly, in 64 steps, until the end of the run; None: it stays constant."""

    def problems(self, name: str) -> list[str]:
        """Sentences for what two settings cannot do together."""
        if self.shares is None:
            same = self.alpha_end == self.alpha
            return removable(self, ["alpha_end"], name, f"has no effect: it equals `{name}.alpha`") if same else []
        total = sum(self.shares)  # a share that is not finite has a sentence already
        wrong = isfinite(total) and total <= 0
        problems = [must(f"{name}.shares", "have a sum above 0", list(self.shares))] if wrong else []
        return problems + removable(self, ["alpha", "alpha_end"], name, f"has no effect with `{name}.shares`")


@dataclass(frozen=True)
class PacksConfig:
    """How much text a micro-step and a step read."""

    tokens: int = 8192
    """Tokens of a pack; a micro-batch is one pack."""
    length: Annotated[int, Ge(8)] = 512
    """Longest sequence in tokens, special tokens included; longer documents are cut."""
    per_step: Count = 8
    """Packs of one optimizer step, over all ranks and micro-steps."""
    masks_per_text: Count = 1
    """Number of packs in a step that have the same text under different masks, so that one pass of a model gives the
    entropies for all of them. A step then reads `per_step` / `masks_per_text` different texts."""

    def problems(self, name: str) -> list[str]:
        """Sentences for what two settings cannot do together."""
        problems = []
        if self.tokens < self.length:
            problems.append(must(f"{name}.tokens", f"be at least `{name}.length` ({self.length})", self.tokens))
        return problems


@dataclass(frozen=True)
class PhaseConfig:
    """A phase of the run. It begins where the previous one ends; after the last, the settings of the run apply.

    Settings that a phase does not name are those of the run. In a file, each phase is a table `[[phases]]`.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    until: ShareInside | None = None
    """Where it ends, as a share of the run's `steps`; give either this or the phase's own `steps`."""
    steps: Count | None = None
    """How many steps it has; give either this or `until`."""
    length: Annotated[int, Ge(8)] | None = None
    """Longest sequence in tokens, instead of `packs.length`. Packs keep their size."""
    per_step: Count | None = None
    """Packs of a step, instead of `packs.per_step`."""
    mask_ratio: ShareInside | None = None
    """Share of the tokens that are targets, instead of `masking.ratio`."""
    shares: tuple[NotNegative, ...] | None = None
    """Share of each folder of `data`, instead of `mixture.shares`."""
    alpha: Share | None = None
    """The exponent that gives the shares, instead of `mixture.alpha`."""


@dataclass(frozen=True)
class ValidationConfig:
    """When, and on how much text, the validation loss is computed: uniform 15 %, all [MASK], equal for all recipes."""

    every: Count = 200
    """Steps between two validations; the last step has one too."""
    packs: Count = 16
    """Largest number of packs of the validation split to read; in a mixture, of each source."""


@dataclass(frozen=True)
class CheckpointConfig:
    """How often the run is saved."""

    every: Count = 500
    """Steps between two checkpoints; the last step and every stop signal save one too."""
    keep: Annotated[int, Ge(2)] = 3
    """Number of newest checkpoints to keep."""
    background: bool = False
    """Write checkpoints in the background, except for the last: training waits only while each rank copies its share to
    the memory of the host, 12 bytes per weight over all ranks, and continues while threads write the copy."""


@dataclass(frozen=True)
class LogConfig:
    """What is logged while the run trains."""

    every: Count = 10
    """Steps between two log lines."""
    peak_flops: Positive | None = None
    """Peak floating-point operations per second of one device, for MFU; known for common GPUs. Without it, a CPU has
    no MFU."""
    wandb: str | None = None
    """Project of Weights & Biases to which metrics are also sent (needs megamask[wandb]); WANDB_MODE=offline needs no
    network."""

    def problems(self, name: str) -> list[str]:
        """Sentences for a package that is missing."""
        if self.wandb is None or find_spec("wandb"):
            return []
        cure = "pip install 'megamask[wandb]', or remove it."
        return [f"`{name}.wandb` needs the package wandb, which is not installed: {cure}"]
