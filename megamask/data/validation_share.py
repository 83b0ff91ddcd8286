"""Check that the validation split is large enough to measure a loss, and compute a share that is."""

from __future__ import annotations

import math
from collections.abc import Sequence

from megamask.data.manifest import Manifest

MEASURABLE = 16_384
"""Tokens that a validation split should have: one pack of the largest recipes. The losses of 15 % of them have a
standard deviation of about 3 nats, so their mean has a standard error of 0.06 nats."""
SMALLEST = 2048
"""One pack of the smallest recipes."""
NEEDED = (
    f"A run needs a full pack of it (`packs.tokens`: {SMALLEST:,} to {MEASURABLE:,} in the recipes), and a reliable "
    f"loss takes about {MEASURABLE:,} tokens"
)
"""The rule of `data.packs` and of this module, as a sentence."""
MARGIN = 1.25
"""Factor of the share: documents are drawn by hash, so a split has slightly more or fewer tokens than its share."""
LARGEST = 0.2
"""Maximum share of the text for validation."""


def validation_share(manifest: Manifest, tokens: int) -> float | None:
    """The share, rounded up, that gives ``tokens`` tokens or slightly more; None if it is above ``LARGEST``."""
    total, now = _total(manifest), _share(manifest)
    share = MARGIN * tokens / total if total else 1.0
    if max(share, now) > LARGEST:
        return None
    # if documents differ in length, a split may have much less than its share: compute with what this one has
    if likely := _likely(manifest):
        share = min(LARGEST, max(share, MARGIN * tokens / likely))
    share = share if share > now else 2 * now
    if share > LARGEST:
        return None
    digits = -math.floor(math.log10(share))
    return math.ceil(round(share * 10**digits, 6)) / 10**digits


def validation_warning(manifest: Manifest) -> str:
    """The warning for a validation split that is too small; "" if it is large enough, or if there is none."""
    split = manifest["splits"].get("valid")
    if split is None or split["tokens"] >= MEASURABLE:
        return ""
    documents = f"{split['documents']:,} document{'s' * (split['documents'] != 1)}"
    return (
        f"The validation split has {documents} with {split['tokens']:,} tokens. {NEEDED}. "
        f"{validation_advice([manifest])}"
    )


def validation_advice(manifests: Sequence[Manifest]) -> str:
    """How to get validation splits with ``MEASURABLE`` tokens, or else the largest, and which packs a run may have.

    ``manifests`` are those of one preparation.
    """
    shares = [validation_share(manifest, MEASURABLE) for manifest in manifests]
    enough = [share for share in shares if share is not None]
    if len(enough) == len(shares):
        return f"Delete the output and prepare the text again with `--valid-share {max(enough):g}`."
    least = min(map(_total, manifests))
    likely = min(_likely(manifest) or _total(manifest) for manifest in manifests)
    of = "The whole text" if len(manifests) == 1 else "The smallest of them"
    if max(map(_share, manifests)) >= LARGEST:
        return f"{of} has {least:,} tokens: give more text, or set smaller packs than the split."
    return (
        f"{of} has {least:,} tokens: give more text. Or delete the output and prepare the text again with "
        f"`--valid-share {LARGEST:g}`, about {LARGEST * likely:,.0f} tokens or more, and set smaller packs than that."
    )


def validation_cure(manifest: Manifest, tokens: int) -> str:
    """How to get a validation split of ``tokens`` tokens."""
    share, total = validation_share(manifest, tokens), _total(manifest)
    if share is not None:
        return f"Delete the output and prepare the text again with `--valid-share {share:g}`."
    most = f" `--valid-share {LARGEST:g}` would only give about {LARGEST * total:,.0f}." * (_share(manifest) < LARGEST)
    return f"The whole text has {total:,} tokens.{most} Give more text, or set smaller packs (`--packs.tokens`)."


def _total(manifest: Manifest) -> int:
    return sum(split["tokens"] for split in manifest["splits"].values())


def _likely(manifest: Manifest) -> float:
    """Tokens of the whole text if all of it were like its validation split, at most all; 0 without such a split."""
    split = manifest["splits"].get("valid")
    share = _share(manifest)
    return min(_total(manifest), split["tokens"] / share) if split and share else 0.0


def _share(manifest: Manifest) -> float:
    """The validation share of the preparation."""
    share = (manifest.get("settings") or {}).get("valid_share", 0.0)
    return share if isinstance(share, float) else 0.0
