"""Initial weights of every family of transformers, for the tokenizer of the shards of a test."""

from __future__ import annotations

from pathlib import Path

from transformers import AutoConfig, AutoModelForMaskedLM, AutoTokenizer

from megamask.__main__ import main
from megamask.data.shards import Shards
from megamask.hf.families import FAMILIES
from tests.system.commands import TINY, run

SIZES = {
    "num_hidden_layers": TINY["model.num-layers"],
    "hidden_size": TINY["model.hidden-size"],
    "num_attention_heads": TINY["model.num-heads"],
    "intermediate_size": TINY["model.intermediate-size"],
}
"""Those of the small runs."""
OWN = {
    "distilbert": {"n_layers": 2, "dim": 32, "n_heads": 2, "hidden_dim": 48},
    "electra": SIZES | {"embedding_size": 16},
    "albert": SIZES | {"embedding_size": 16},
    "modernbert": SIZES | dict.fromkeys(("cls_token_id", "bos_token_id", "sep_token_id", "eos_token_id")),
}


def model_folder(family: str, data: Path, folder: Path) -> Path:
    """A model of transformers of a ``family`` with random weights and the tokenizer of the shards ``data``."""
    ids = Shards.open(data).token_ids
    sizes = OWN.get(family, SIZES) | {"vocab_size": ids.size, "pad_token_id": ids.pad, "max_position_embeddings": 128}
    model = AutoModelForMaskedLM.from_config(AutoConfig.for_model(family, **sizes))
    assert type(model).__name__ == FAMILIES[family].architecture
    model.save_pretrained(folder / family)
    AutoTokenizer.from_pretrained(data / "tokenizer").save_pretrained(folder / family)
    return folder / family


def initial_weights_of(family: str, data: Path, folder: Path) -> Path:
    """The same, imported; made once."""
    start = folder / f"start-{family}"
    if not start.exists():
        made = run(main, "import", "--model", model_folder(family, data, folder), "--output", start)
        assert made.code == 0, made.err
    return start
