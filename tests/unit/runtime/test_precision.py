"""bf16 or fp32: by what the device reports and its limits, alike on all ranks, said with the reason."""

from __future__ import annotations

import pytest
import torch

from megamask.runtime import precision, ranks
from megamask.runtime.precision import (
    LIMITS,
    WITHOUT_BF16,
    PrecisionChoice,
    PrecisionSupport,
    common_support,
    cpu_support,
    precision_lines,
)

CPU = torch.device("cpu")
FAST, SLOW = PrecisionSupport(True, "it multiplies"), PrecisionSupport(False, "it does not multiply")


def reports(monkeypatch: pytest.MonkeyPatch, *, onednn: bool, avx512_bf16: bool, machine: str = "x86_64") -> None:
    """A CPU of which PyTorch reports this."""
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: onednn)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(precision.platform, "machine", lambda: machine)


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("avx512_bf16", [True, False])
@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_a_cpu_needs_the_instructions(onednn: bool, avx512_bf16: bool, machine: str, monkeypatch) -> None:
    reports(monkeypatch, onednn=onednn, avx512_bf16=avx512_bf16, machine=machine)
    measured = cpu_support({})
    # oneDNN alone counts AVX-512 that lacks bf16; other processors have no AVX-512
    assert measured.bf16 == (onednn and (avx512_bf16 or machine == "aarch64"))
    assert torch.backends.cpu.get_cpu_capability() in measured.reason


@pytest.mark.parametrize("name", LIMITS)
@pytest.mark.parametrize("value", [*sorted(WITHOUT_BF16), "avx2", "AVX512_CORE_BF16", "AVX512_CORE_AMX", "DEFAULT", ""])
def test_a_limit_on_the_instructions_is_respected(name: str, value: str, monkeypatch) -> None:
    reports(monkeypatch, onednn=True, avx512_bf16=True)
    measured = cpu_support({name: value})
    assert measured.bf16 == (value.upper() not in WITHOUT_BF16)
    assert (f"{name}={value}" in measured.reason) == (not measured.bf16)


@pytest.mark.parametrize(("capability", "bf16"), [((7, 0), False), ((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_a_gpu_needs_compute_capability_8(capability: tuple[int, int], bf16: bool, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A card")
    measured = precision.device_support(torch.device("cuda", 0))
    assert measured.bf16 == bf16
    assert "A card" in measured.reason and ".".join(map(str, capability)) in measured.reason


def test_all_ranks_use_the_support_that_all_have(monkeypatch) -> None:
    monkeypatch.setattr(ranks, "gather", lambda own: [FAST, SLOW, FAST, SLOW])
    assert not common_support().bf16
    assert "rank 1 it does not multiply (2 of 4 ranks)" in common_support().reason
    monkeypatch.setattr(ranks, "gather", lambda own: [FAST, FAST])
    assert common_support() == FAST
    monkeypatch.setattr(ranks, "gather", lambda own: [own])
    assert common_support() == precision.device_support(ranks.device())


@pytest.mark.parametrize("support", [FAST, SLOW])
@pytest.mark.parametrize("setting", ["auto", "bf16", "fp32"])
def test_only_a_request_for_slow_bf16_warns(setting, support: PrecisionSupport) -> None:
    choice = PrecisionChoice("`some.setting`", setting, support)
    assert choice.precision == {"auto": "bf16" if support.bf16 else "fp32"}.get(setting, setting)
    lines = precision_lines(choice)
    assert choice.precision in lines[0]
    assert (support.reason if setting == "auto" else "some.setting") in lines[0]
    warned = setting == "bf16" and not support.bf16
    assert len(lines) == 1 + warned
    if warned:
        assert all(part in lines[1] for part in (support.reason, "`some.setting`", "'auto'"))


def test_one_warning_names_all_settings() -> None:
    lines = precision_lines(PrecisionChoice("`one`", "bf16", SLOW), PrecisionChoice("`two`", "bf16", SLOW))
    assert len(lines) == 2 and "`one` and `two`" in lines[1]
    lines = precision_lines(PrecisionChoice("`one`", "auto", SLOW), PrecisionChoice("`two`", "bf16", SLOW))
    assert len(lines) == 2 and "`one`" not in lines[1]
