"""Settings: defaults pass, nonsense is named, and a setting without effect is an error."""

from __future__ import annotations

from dataclasses import fields
from typing import get_args

import pytest

from megamask.entropy import EntropySource, Exact, Frequency, Probe, StoredEntropy
from megamask.entropy.source import AuditConfig, EntropyConfig, Kind
from megamask.errors.setting_rules import settings_problems

AUDIT = AuditConfig(every=100)


@pytest.mark.parametrize("source", get_args(Kind))
def test_every_source_with_defaults_is_fine(source):
    assert settings_problems(EntropyConfig(source), "entropy") == []


@pytest.mark.parametrize(
    "config",
    [
        EntropyConfig("probe", audit=AuditConfig(100, fall_back=("exact",)), num_passes=8),
        EntropyConfig("probe", audit=AuditConfig(100, fall_back=("exact",)), ema_decay=0.99),
        EntropyConfig("frequency", signal="clean", audit=AUDIT),
        EntropyConfig("exact", candidates=2.0, ema_decay=0.999, audit=AUDIT),
        EntropyConfig("teacher", signal="clean", measure="min"),
        EntropyConfig("exact", num_passes=2),
    ],
)
def test_what_makes_sense_passes(config):
    assert settings_problems(config, "entropy") == []


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (EntropyConfig(signal="clean"), "entropy.signal` has no effect"),
        (EntropyConfig(audit=AUDIT), "entropy.audit` has no effect"),
        (EntropyConfig("probe", signal="clean"), "entropy.signal` must be 'masked' for the source 'probe'"),
        (
            EntropyConfig("exact", signal="clean", candidates=2, audit=AuditConfig(9, fall_back=("probe",))),
            "entropy.signal` must be 'masked' for the source 'probe'",
        ),
        (EntropyConfig("probe", num_passes=2), "entropy.num_passes` has an effect"),
        (EntropyConfig("exact", signal="clean", num_passes=2), "entropy.num_passes` has an effect"),
        (EntropyConfig("exact", num_passes=0), "entropy.num_passes` must be at least 1"),
        (EntropyConfig("probe", candidates=2.0), "entropy.candidates` has an effect"),
        (EntropyConfig("teacher", ema_decay=0.9), "entropy.ema_decay` has an effect"),
        (EntropyConfig("exact", candidates=0.5), "entropy.candidates` must be at least 1"),
        (EntropyConfig("exact", ema_decay=1.0), "entropy.ema_decay` must lie in (0, 1)"),
        (EntropyConfig("frequency", measure="renyi"), "entropy.measure` has no effect"),
        (EntropyConfig("exact", audit=AUDIT), "entropy.audit.every` has no effect"),
        (EntropyConfig("teacher", audit=AUDIT), "entropy.audit.every` has no effect"),
        (EntropyConfig("probe", audit=AuditConfig(threshold=0.5)), "entropy.audit.threshold` has no effect"),
        (EntropyConfig("probe", audit=AuditConfig(fall_back=("exact",))), "entropy.audit.fall_back` has no effect"),
        (EntropyConfig("probe", audit=AuditConfig(0)), "entropy.audit.every` must be at least 1"),
        (EntropyConfig("probe", audit=AuditConfig(1, threshold=1.5)), "entropy.audit.threshold` must lie"),
        (EntropyConfig("probe", audit=AuditConfig(1, patience=0)), "entropy.audit.patience` must be at least 1"),
        (EntropyConfig("probe", audit=AuditConfig(1, fall_back=("none",))), "entropy.audit.fall_back` must name"),
        (EntropyConfig("probe", audit=AuditConfig(1, fall_back=("probe",))), "entropy.audit.fall_back` must name"),
    ],
)
def test_what_does_not_is_named_once(config, named):
    problems = settings_problems(config, "entropy")
    assert len(problems) == 1 and problems[0].startswith(f"`{named}"), problems


def test_without_a_source_each_setting_is_named():
    other = EntropyConfig("none", "clean", "min", 7, 2.0, 0.5, AUDIT)
    assert len(settings_problems(other, "entropy")) == len(fields(EntropyConfig)) - 1


@pytest.mark.parametrize("kind", [Frequency, Probe, StoredEntropy, Exact])
def test_every_kind_implements_the_interface(kind):
    assert all(hasattr(kind, name) for name in dir(EntropySource) if not name.startswith("_"))
    assert issubclass(kind, EntropySource)
