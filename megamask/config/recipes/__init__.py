"""Experiments by name: one function each, which sets only what differs from its base. The docstring is the help.

bases.py            models and runs to start from
entropy.py          entropy-aware masking and distillation, with controls
better_masking.py   masking ratio decay, part-of-speech weights
languages.py        languages of unequal size
three_ml_and_mae_lm.py  3ML, MAE-LM, and everything together
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from megamask.config.pretrain_config import PretrainConfig
from megamask.config.recipes import bases, better_masking, entropy, languages, three_ml_and_mae_lm
from megamask.errors import ConfigError, unknown

STARTS: dict[str, Callable[[], PretrainConfig]] = {
    "tiny": bases.tiny, "small": bases.small, "bert": bases.bert, "roberta": bases.roberta, "albert": bases.albert,
    "albert-tiny": bases.albert_tiny,
}  # fmt: skip
"""Recipes that are bases without changes."""
STRATEGIES = ("low", "middle", "both")
"""Contrasts to masking the highest entropies; suffixes of the names of experiments."""


@dataclass(frozen=True)
class Family:
    """Experiments on the same bases. Sizes and strategies are suffixes of the names of experiments."""

    experiments: Mapping[str, Callable[[PretrainConfig], PretrainConfig]]
    sizes: Mapping[str, Callable[[], PretrainConfig]]
    strategies: tuple[str, ...] = ()

    def recipes(self) -> dict[str, Callable[[], PretrainConfig]]:
        """Every experiment at every size, under every strategy."""
        return {
            "-".join(part for part in (name, strategy, size) if part): partial(self._make, name, strategy, size)
            for size in self.sizes
            for name in self.experiments
            for strategy in ("", *self.strategies)
        }

    def listed(self) -> dict[str, str]:
        """The description of each experiment, with the suffixes that its name may have."""
        follows = ("|".join(f"-{part}" for part in parts if part) for parts in (self.strategies, self.sizes))
        endings = "".join(f"[{ending}]" for ending in follows if ending)
        return {name + endings: _first_line(made) for name, made in self.experiments.items()}

    def _make(self, name: str, strategy: str, size: str) -> PretrainConfig:
        config = self.experiments[name](self.sizes[size]())
        if strategy:
            config = entropy.contrast(config, strategy)
        return replace(config, output=Path("runs") / "-".join(part for part in (name, strategy, size) if part))


THREE = {"": bases.entropy_base, "4x512": bases.entropy_small, "tiny": bases.two_cores}
FAMILIES = (
    Family(entropy.EXPERIMENTS, THREE, STRATEGIES),
    Family(entropy.CONTROLS, THREE),
    Family(better_masking.EXPERIMENTS, {"": bases.decay_base, "tiny": bases.two_cores}),
    Family(languages.EXPERIMENTS, {"": bases.roberta, "tiny": bases.two_cores}),
    Family(three_ml_and_mae_lm.EXPERIMENTS, {"": bases.bert, "tiny": bases.two_cores}),
)
RECIPES: dict[str, Callable[[], PretrainConfig]] = STARTS | {
    name: made for family in FAMILIES for name, made in family.recipes().items()
}
"""Every recipe by the name that `--recipe` takes."""


def find_recipe(name: str) -> PretrainConfig:
    """The configuration of a recipe; ConfigError with the nearest name for one that is not there."""
    if name not in RECIPES:
        raise ConfigError(unknown(name, RECIPES, "the recipes"))
    return RECIPES[name]()


def list_recipes() -> dict[str, str]:
    """The descriptions of the recipes, by name; a family of sizes and strategies appears once, with its suffixes."""
    descriptions = {name: _first_line(made) for name, made in STARTS.items()}
    for family in FAMILIES:
        descriptions |= family.listed()
    return descriptions


def _first_line(function: Callable) -> str:
    return (function.__doc__ or "").splitlines()[0]
