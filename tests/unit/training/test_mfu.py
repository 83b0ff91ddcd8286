"""FLOPs are those that torch counts in another implementation; MFU is their share of the peak."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import BertConfig, BertForMaskedLM

from megamask.config.pretrain_config import LogConfig
from megamask.config.recipes import find_recipe
from megamask.metrics.meters import Timed, Window
from megamask.model.shape import EncoderShape
from megamask.training.flops import ForwardFlops, forward_flops
from megamask.training.mfu import PEAKS, mfu, peak_flops

WINDOW = Window(
    steps=5, skipped=1, grad_norm=0.5, seconds=2.0, waited=0.1, ranks=2,
    nll=600.0, correct=50.0, targets=100, tokens=400, pairs=40_000,
)  # fmt: skip
SHAPE = EncoderShape(
    "bert", 32, 0, num_layers=2, hidden_size=8, num_heads=2, intermediate_size=16, max_positions=64, norm_eps=1e-12
)  # fmt: skip


@pytest.mark.parametrize("masked", [1, 7, 32])
def test_flops_are_those_of_another_implementation(masked: int) -> None:
    """BERT of transformers applies its head at every position: all positions are targets there, less a head alone."""
    shape = {"num_hidden_layers": 3, "hidden_size": 16, "intermediate_size": 40, "vocab_size": 64}
    model = BertForMaskedLM(BertConfig(**shape, num_attention_heads=2, attn_implementation="eager"))
    batch, length = 2, 32
    tokens = torch.randint(64, (batch, length))
    with FlopCounterMode(display=False) as counted:
        model(tokens).logits.sum().backward()
    head = model.cls(rows := torch.randn(batch * (length - masked), 16, requires_grad=True))
    with FlopCounterMode(display=False) as unmasked:
        model.cls(rows).sum().backward()
    assert head.shape[1] == 64
    forward = ForwardFlops.of(layers=3, width=16, inner=40, gated=False, vocab=64)
    total = forward.training(batch * length, batch * length**2, batch * masked)
    assert total == counted.get_total_flops() - unmasked.get_total_flops()


def test_local_layers_need_at_most_the_flops_of_global_ones() -> None:
    shape = {"layers": 6, "width": 16, "inner": 24, "gated": True, "vocab": 64}
    everywhere = ForwardFlops.of(**shape)
    local = ForwardFlops.of(**shape, local_layers=4, window=8)
    assert local.training(100, 100 * 50, 10) < everywhere.training(100, 100 * 50, 10)
    assert local.training(100, 100 * 8, 10) == everywhere.training(100, 100 * 8, 10)
    assert local.training(100, 100 * 5, 10) == everywhere.training(100, 100 * 5, 10)


def test_mfu_is_one_at_the_peak_of_the_devices() -> None:
    config = find_recipe("bert")
    forward = forward_flops(SHAPE, config.objective, config.masking.corruption.mask)
    peak = forward.training(WINDOW.tokens, WINDOW.pairs, WINDOW.targets) / WINDOW.seconds / WINDOW.ranks
    assert mfu(replace(config, log=LogConfig(peak_flops=peak)), SHAPE, WINDOW) == {"mfu": 1.0}


def test_mfu_needs_a_peak_and_a_timed_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    config = find_recipe("bert")
    assert mfu(config, SHAPE, WINDOW) == {}
    known = replace(config, log=LogConfig(peak_flops=1e12))
    assert mfu(known, SHAPE, replace(WINDOW, without_first=Timed(0, 0.0, 0.0, 0, 0, 0))) == {}
    assert mfu(known, SHAPE, WINDOW).keys() == {"mfu"}


def test_a_stated_peak_takes_precedence_over_a_known_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert peak_flops() is None
    assert peak_flops(5e12) == 5e12
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, peak in (
        ("NVIDIA H200", PEAKS["H200"]),
        ("NVIDIA A100-SXM4-80GB", PEAKS["A100"]),
    ):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda name=name: name)
        assert peak_flops() == peak
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some Other GPU")
    assert peak_flops() is None
