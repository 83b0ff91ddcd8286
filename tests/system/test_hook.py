"""The README's loop of someone's own, run as it stands there: masks by the probe, its audit, a transformers model."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer, BertConfig, BertForMaskedLM

from megamask.batch import Losses, MaskPlan
from megamask.data import tokenizer_training
from megamask.entropy import Probe
from megamask.masking import padded
from tests.system.commands import ROOT

STEPS, SENTENCES, LENGTH, RATIO = 201, 8, 32, 0.2


def example() -> str:
    """The one block of Python in the README that packs padded batches."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    (block,) = (block for block in blocks if "pack_padded" in block)
    return block


def sentences(count: int) -> list[str]:
    """Sentences of two to six words that cannot be predicted, each after the same sure one."""
    draw = random.Random(0)
    words = [first + second for first in "bdfklmnprt" for second in ("ara", "ela", "imo", "otu")]
    return [" ".join(f"the {draw.choice(words)}" for _ in range(draw.randint(2, 6))) for _ in range(count)]


class Ran:
    """What the example left: its names, what it printed, and each step's plan and losses."""

    def __init__(self, folder: Path):
        torch.manual_seed(0)
        lines = sentences(500)
        tokenizer_training.train_tokenizer("wordpiece", lines, size=200).save(folder)
        tokenizer = AutoTokenizer.from_pretrained(folder)
        draws = torch.Generator().manual_seed(0)
        self.loader = [
            tokenizer(
                [lines[n] for n in torch.randint(len(lines), (SENTENCES,), generator=draws).tolist()],
                padding=True, truncation=True, max_length=LENGTH, return_tensors="pt",
            )
            for _ in range(STEPS)
        ]  # fmt: skip
        sizes = {"vocab_size": len(tokenizer), "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
        sizes |= {"intermediate_size": 64, "max_position_embeddings": LENGTH}
        model = BertForMaskedLM(BertConfig(**sizes, pad_token_id=tokenizer.pad_token_id))
        ids = torch.cat([batch["input_ids"].flatten() for batch in self.loader])
        self.names: dict[str, Any] = {
            "model": model, "tokenizer": tokenizer, "loader": self.loader,
            "optimizer": torch.optim.AdamW(model.parameters(), lr=5e-3),
            "counts": torch.bincount(ids, minlength=len(tokenizer)),
            "print": lambda step, metrics: self.audits.update({step: metrics}),
        }  # fmt: skip
        self.audits: dict[int, dict[str, float]] = {}
        self.steps: list[tuple[MaskPlan, Losses]] = []

    def losses_at(self, logits: Tensor, plan: MaskPlan) -> Losses:
        losses = padded_losses_at(logits, plan)
        if logits.requires_grad:
            self.steps.append((plan, losses.map_tensors(Tensor.detach)))
        return losses


padded_losses_at = padded.losses_at


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> Ran:
    ran = Ran(tmp_path_factory.mktemp("tokenizer"))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(padded, "losses_at", ran.losses_at)
        exec(compile(example(), "README.md", "exec"), ran.names)
    return ran


def test_masks_match_the_budget_and_cover_only_real_tokens(ran: Ran) -> None:
    assert len(ran.steps) == STEPS
    for batch, (plan, _) in zip(ran.loader, ran.steps, strict=True):
        real = batch["attention_mask"].flatten().bool()
        assert len(plan.targets) == round(RATIO * int(real.sum()))
        assert real[plan.targets].all()
        assert torch.equal(batch["input_ids"].flatten()[plan.targets], plan.labels)


def test_the_loss_falls(ran: Ran) -> None:
    means = [float(losses.nll.mean()) for _, losses in ran.steps]
    assert sum(means[-50:]) < sum(means[:50])


def test_every_audit_gives_finite_metrics_and_the_probe_beats_chance(ran: Ran) -> None:
    assert sorted(ran.audits) == [100, 200]
    for metrics in ran.audits.values():
        assert {"audit/overlap", "audit/gain", "audit/spearman", "audit/ceiling"} <= metrics.keys()
        assert torch.tensor(list(metrics.values())).isfinite().all()
    # a random choice gains nothing over the mean
    assert ran.audits[200]["audit/gain"] > 0


def test_the_state_of_the_probe_is_complete(ran: Ran) -> None:
    model, counts, batch, probe = (ran.names[name] for name in ("model", "counts", "batch", "probe"))
    table = model.get_input_embeddings()
    other = Probe(lambda batch: table(batch.tokens), table.embedding_dim, counts, seed=2)
    assert not torch.equal(other([batch])[0], probe([batch])[0])
    other.load_state_dict(probe.state_dict())
    assert torch.equal(other([batch])[0], probe([batch])[0])
