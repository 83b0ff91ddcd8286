"""Masks that are known before a run starts, which stored samples of a teacher need."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
from jaxtyping import Int64

from megamask.config.pretrain_config import PretrainConfig
from megamask.config.sources import data_folders


def facts(config: PretrainConfig, fingerprint: str) -> dict[str, Any]:
    """The settings on which the targets of every pack depend, and the temperature, as values of JSON.

    ``fingerprint`` is that of the text.
    """
    masking = asdict(config.masking)
    # random masking uses none of them
    for unused in ("score", "entropy", "part_of_speech", "token_type", "random_share", "correction", "max_weight"):
        masking.pop(unused, None)
    if masking["ratio"]["back"] is None:  # as in folders written before this setting existed
        del masking["ratio"]["back"]
    del masking["corruption"]["random_from"]  # always `vocabulary`
    masking["corruption"]["keep"] = masking["corruption"].pop("unchanged")  # names on disk do not change
    mixture = asdict(config.mixture)
    if mixture["alpha_end"] is None:  # as in folders written before this setting existed
        del mixture["alpha_end"]
    moves = config.masking.ratio.kind != "constant" or "alpha_end" in mixture
    return {
        "text": fingerprint,
        "seed": config.seed,
        # "views": names on disk do not change
        "packs": {"tokens": config.packs.tokens, "length": config.packs.length, "views": config.packs.masks_per_text}
        # the text of a pack, and the progress, depend on the position of the pack in its step
        | ({"per_step": config.packs.per_step} if moves or config.packs.masks_per_text > 1 else {})
        | ({"mixture": mixture} if len(data_folders(config.data)) > 1 else {}),
        "masking": masking,
        "distill": {"temperature": config.distill.temperature},
    } | ({"steps": config.steps} if moves else {})


def targets(config: PretrainConfig) -> Int64[np.ndarray, " packs"]:
    """The number of targets of each pack that needs samples: from pack 0 to the last step with a weight above 0."""
    progress = [step / config.steps for step in range(config.steps)]
    weights = (config.distill.weight(at) for at in reversed(progress))
    unused = next((n for n, weight in enumerate(weights) if weight > 0), config.steps)
    by_step = [config.masking.targets(at, config.packs.tokens) for at in progress[: config.steps - unused]]
    return np.repeat(np.array(by_step, np.int64), config.packs.per_step)
