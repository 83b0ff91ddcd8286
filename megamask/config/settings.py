"""The settings of mixtures, packs, validation, checkpoints and logs; without torch."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from typing import Annotated

from annotated_types import Ge

from megamask.errors import must
from megamask.errors.setting_rules import Count, NotNegative, OnlyFor, Positive, Share, removable


@dataclass(frozen=True)
class MixtureConfig:
    """How much is read of each source, if `data` names several folders of shards."""

    shares: tuple[NotNegative, ...] | None = None
    """Share of each folder of `data`, in their order, in any unit; `--data FOLDER=SHARE FOLDER=SHARE` sets them too.
    Rounded to a thousandth. None: by `alpha`."""
    alpha: Share = 1.0
    """Without shares: that of a source is proportional to (its packs / all packs) to the power of this. 1 reads all
    sources equally often; less reads small sources more often, 0.3 is usual for languages."""
    alpha_end: Share | None = None
    """`alpha` at the end of the run, to which it moves linearly, in 64 steps; None: it stays."""

    def problems(self, name: str) -> list[str]:
        """Sentences for what two settings cannot do together."""
        if self.shares is None:
            same = self.alpha_end == self.alpha
            return removable(self, ["alpha_end"], name, f"has no effect: it equals `{name}.alpha`") if same else []
        problems = [] if sum(self.shares) > 0 else [must(f"{name}.shares", "have a sum above 0", list(self.shares))]
        return problems + removable(self, ["alpha", "alpha_end"], name, f"has no effect with `{name}.shares`")


@dataclass(frozen=True)
class PacksConfig:
    """How much text a micro-step and a step hold."""

    tokens: int = 8192
    """Tokens of a pack; a micro-batch is one pack."""
    length: Annotated[int, Ge(8)] = 512
    """Longest sequence in tokens, special tokens included; longer documents are cut."""
    per_step: Count = 8
    """Packs of one optimizer step, over all ranks and micro-steps."""
    masks_per_text: Count = 1
    """Packs of a step that hold the same text, each under a mask of its own: one pass of a model says how unsure it is
    for all of them. A step then holds `per_step` / `masks_per_text` different texts."""
    start_length: Annotated[int, Ge(8)] | None = None
    """Longest sequence in tokens in the first `start_steps` steps, shorter than `length`: most steps of BERT have 128
    tokens, the last tenth 512. Packs keep their size."""
    start_steps: Annotated[Count | None, OnlyFor("start_length")] = None
    """Steps with sequences of `start_length`; then they have `length`."""

    @property
    def short_steps(self) -> int:
        """Steps with sequences shorter than `length`; 0 for a run without them."""
        return self.start_steps or 0

    def problems(self, name: str) -> list[str]:
        """Sentences for what two settings cannot do together."""
        problems = []
        if self.tokens < self.length:
            problems.append(must(f"{name}.tokens", f"be at least `{name}.length` ({self.length})", self.tokens))
        if self.start_length is not None and self.start_length >= self.length:
            rule = f"be below `{name}.length` ({self.length})"
            problems.append(must(f"{name}.start_length", rule, self.start_length))
        if self.start_length is not None and self.start_steps is None:
            problems.append(f"`{name}.start_length` needs `{name}.start_steps`: name the number of short steps.")
        return problems


@dataclass(frozen=True)
class ValidationConfig:
    """When, and on how much text, the validation loss is computed: uniform 15 %, all [MASK], equal for all recipes."""

    every: Count = 200
    """Steps between two validations; the last step has one too."""
    packs: Count = 16
    """Most packs of the validation split that are read; in a mixture, of each source."""


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
