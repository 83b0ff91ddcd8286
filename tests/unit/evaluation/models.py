"""Small encoders of several families, and texts that they can learn from, for the tests of this folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import CONFIG_MAPPING, AutoModelForMaskedLM, AutoTokenizer

from megamask.data.tokenizer_training import train_tokenizer
from megamask.evaluation.tasks import TASKS, Examples, TaskData

WORDS = "the quick brown fox jumps over a lazy dog while good bad bright dull men and women pack five jugs"
"""What the tokenizer knows."""
FAMILIES = {
    "bert": {},
    "modernbert": {"global_attn_every_n_layers": 2, "local_attention": 8},
    "roberta": {"max_position_embeddings": 66, "type_vocab_size": 1, "pad_token_id": 0},
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
    "albert": {"embedding_size": 16},
    "electra": {"embedding_size": 16},
}
"""Settings of each family beside the common ones."""


def save_model(folder: Path, family: str = "bert", **changes: object) -> Path:
    """A model of transformers with random weights and 64 positions, and a tokenizer that knows WORDS."""
    common = {"vocab_size": 200, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    common |= {"intermediate_size": 48, "max_position_embeddings": 64, "initializer_range": 0.2, "pad_token_id": 0}
    if family == "modernbert":
        common |= dict.fromkeys(("cls_token_id", "bos_token_id", "sep_token_id", "eos_token_id"))
    config = CONFIG_MAPPING[family](**common | FAMILIES[family] | changes)
    torch.manual_seed(0)
    AutoModelForMaskedLM.from_config(config).save_pretrained(folder)
    train_tokenizer("wordpiece", [WORDS] * 5, size=150).save(folder / "tokenizer")
    AutoTokenizer.from_pretrained(folder / "tokenizer").save_pretrained(folder)
    return folder


def sentences(count: int, seed: int = 0, longest: int = 20) -> list[str]:
    """Random sentences of 1 to ``longest`` words."""
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS.split(), rng.integers(1, longest + 1))) for _ in range(count)]


def word_task(train: int, test: int, name: str = "sst2") -> TaskData:
    """How often "good" is in the first text: as a number, or whether at all. Easy to learn."""
    task = TASKS[name]

    def examples(count: int, seed: int) -> Examples:
        fields = [
            [text.replace("good", "dog") for text in sentences(count, seed + at, 6)] for at in range(len(task.fields))
        ]
        labels = np.random.default_rng(seed).integers(0, len(task.labels) or 4, count)
        fields[0] = [" ".join([text, *["good"] * times]) for text, times in zip(fields[0], labels, strict=True)]
        return Examples(tuple(zip(*fields, strict=True)), labels.astype(float))

    return TaskData(task, examples(train, 1), examples(test, 1000))
