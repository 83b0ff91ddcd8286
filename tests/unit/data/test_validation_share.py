"""The warning for a validation split that is too small proposes a share that is large enough."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from megamask.__main__ import main
from megamask.config.recipes import RECIPES, find_recipe
from megamask.data.packs import Packs
from megamask.data.shards import Shards
from megamask.data.validation_share import (
    LARGEST,
    MEASURABLE,
    SMALLEST,
    validation_cure,
    validation_share,
    validation_warning,
)


def manifest(train: int, valid: int, share: float) -> dict:
    splits = {"train": {"tokens": train, "documents": 9}, "valid": {"tokens": valid, "documents": 2}}
    return {"splits": splits, "settings": {"valid_share": share}}


@pytest.mark.parametrize("total", [100_000, 123_456, 2_000_000, 10**9])
@pytest.mark.parametrize("share", [1e-9, 0.005, 0.01, 0.05])
def test_the_proposed_share_gives_enough_tokens(total, share):
    made = manifest(total - 100, 100, share)
    named = validation_share(made, MEASURABLE)
    if named is None:  # only if all that may be spent does not give it
        assert LARGEST * total < 2 * MEASURABLE or share >= LARGEST / 2
    else:
        assert share < named <= LARGEST and named * total > MEASURABLE
        assert f"`--valid-share {named:g}`" in validation_warning(made)
        assert len(f"{named:g}".strip("0.")) <= 2 or "e" in f"{named:g}"


def test_a_text_that_is_too_short_for_any_share_is_reported():
    small = manifest(1463, 37, 0.005)
    assert "2 documents with 37 tokens" in validation_warning(small)
    assert "has 1,500 tokens. `--valid-share 0.2` would only give about 300. Give more text" in validation_cure(
        small, 2048
    )
    # not again what was done
    assert "--valid-share" not in validation_cure(manifest(1200, 300, 0.2), 2048)


@pytest.mark.parametrize("documents", [400, 4000, 9000])
@pytest.mark.parametrize("share", [1e-9, 0.01, 0.1])
def test_training_accepts_what_a_preparation_advises(tmp_path: Path, capsys, documents: int, share: float) -> None:
    draws = random.Random(documents)
    lines = [" ".join("".join(draws.choices("abc", k=3)) for _ in range(20)) for _ in range(documents)]
    (tmp_path / "text.txt").write_text("\n".join(lines))
    same = ["--input", tmp_path / "text.txt", "--documents", "lines", "--tokenizer", "wordpiece", "--vocab-size", 60]

    def warning(output: Path, share: str) -> str:
        main(["prepare", *map(str, same), "--output", str(output), "--valid-share", share])
        return capsys.readouterr().err

    folder, text = tmp_path / "first", warning(tmp_path / "first", f"{share:g}")
    if advised := re.search(r"`--valid-share ([0-9.]+)`", text):
        folder, text = tmp_path / "second", warning(tmp_path / "second", advised[1])
        assert "--valid-share" not in text
    # too little text: half of what the largest share gives, because hashes of few documents may choose fewer
    size = int(LARGEST * 20 * documents / 2) if "packs.tokens" in text else MEASURABLE
    assert len(Packs(Shards.open(folder, "valid"), tokens=size, length=128, seed=1)) > 0


def test_a_share_takes_into_account_that_most_documents_are_short() -> None:
    """A long document makes most of the text, so the validation split has less than its share."""
    even, uneven = manifest(1_000_000 - 10_000, 10_000, 0.01), manifest(1_000_000 - 2_000, 2_000, 0.01)
    share, larger = validation_share(even, 4096), validation_share(uneven, 4096)
    assert share is not None and larger is not None
    assert share * 10_000 / 0.01 > 4096 and larger * 2_000 / 0.01 > 4096


def test_the_sentence_names_the_packs_of_the_recipes() -> None:
    sizes = [find_recipe(name).packs.tokens for name in RECIPES]
    assert (min(sizes), max(sizes)) == (SMALLEST, MEASURABLE)


def test_a_large_enough_or_absent_split_gives_no_warning():
    assert validation_warning(manifest(10, MEASURABLE, 0.1)) == ""
    made = manifest(10, 0, 0.0)
    del made["splits"]["valid"]
    assert validation_warning(made) == ""
