"""Settings: defaults pass, nonsense is named, and a setting without effect is an error."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import get_args

import pytest
import torch

from megamask.entropy.building import Given, build
from megamask.entropy.cache import Cache
from megamask.entropy.exact import Exact
from megamask.entropy.frequency import Frequency
from megamask.entropy.probe import Probe
from megamask.entropy.sidecar import Sidecar, SidecarFacts
from megamask.entropy.source import AuditConfig, EntropyConfig, Kind, Source
from megamask.errors import ConfigError
from tests.batches import IDS
from tests.unit.entropy.models import Asked, counts, some_packs

AUDIT = AuditConfig(every=100)


@pytest.mark.parametrize("source", get_args(Kind))
def test_every_source_with_defaults_is_fine(source):
    assert EntropyConfig(source).problems("entropy") == []


@pytest.mark.parametrize(
    "config",
    [
        EntropyConfig("probe", audit=AuditConfig(100, fall_back=("exact",)), passes=8),
        EntropyConfig("probe", audit=AuditConfig(100, fall_back=("exact",)), average=0.99),
        EntropyConfig("frequency", signal="clean", audit=AUDIT),
        EntropyConfig("exact", candidates=2.0, average=0.999, audit=AUDIT),
        EntropyConfig("teacher", signal="clean", measure="min"),
        EntropyConfig("exact", passes=2),
    ],
)
def test_what_makes_sense_passes(config):
    assert config.problems("entropy") == []


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (EntropyConfig(signal="clean"), "entropy.signal` has no effect"),
        (EntropyConfig(audit=AUDIT), "entropy.audit` has no effect"),
        (EntropyConfig("probe", signal="clean"), "entropy.signal` must be 'masked' for the source 'probe'"),
        (EntropyConfig("cache", signal="clean"), "entropy.signal` must be 'masked' for the source 'cache'"),
        (
            EntropyConfig("exact", signal="clean", candidates=2, audit=AuditConfig(9, fall_back=("cache",))),
            "entropy.signal` must be 'masked' for the source 'cache'",
        ),
        (EntropyConfig("probe", passes=2), "entropy.passes` has an effect"),
        (EntropyConfig("exact", signal="clean", passes=2), "entropy.passes` has an effect"),
        (EntropyConfig("exact", passes=0), "entropy.passes` must be at least 1"),
        (EntropyConfig("probe", candidates=2.0), "entropy.candidates` has an effect"),
        (EntropyConfig("teacher", average=0.9), "entropy.average` has an effect"),
        (EntropyConfig("exact", candidates=0.5), "entropy.candidates` must be at least 1"),
        (EntropyConfig("exact", average=1.0), "entropy.average` must lie in (0, 1)"),
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
    found = config.problems("entropy")
    assert len(found) == 1 and found[0].startswith(f"`{named}"), found


def test_without_a_source_each_setting_is_named():
    other = EntropyConfig("none", "clean", "min", 7, 2.0, 0.5, AUDIT)
    assert len(other.problems("entropy")) == len(fields(EntropyConfig)) - 1


# ---- from settings to a source

KINDS = {"frequency": Frequency, "probe": Probe, "sidecar": Sidecar, "cache": Cache, "exact": Exact, "teacher": Exact}


class Nowhere:
    per_step = views = 1

    def __len__(self):
        return 10

    def places(self, number):
        return torch.full((80,), -1)


def given(tmp_path) -> Given:
    return Given(
        counts(), IDS.mask, 1, torch.device("cpu"), ask=Asked(), teacher=Asked(),
        embed=lambda batch: torch.nn.functional.one_hot(batch.tokens, IDS.size), width=IDS.size,
        facts=SidecarFacts("masked", "shannon", 4.0, "", 512), packs=Nowhere(), tokens=100,
        folder=tmp_path / "cache", budget=lambda: 5,
    )  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_each_kind_is_built_and_speaks_the_one_interface(tmp_path, kind):
    source = build(EntropyConfig(kind), given(tmp_path))
    assert isinstance(source, KINDS[kind]) and isinstance(source, Source)
    batches = [replace(batch, entropy=torch.zeros(batch.layout.rows, dtype=torch.uint8)) for batch in some_packs(2)]
    for batch, found in zip(batches, source(batches), strict=True):
        assert found.shape == batch.tokens.shape and found.dtype == torch.float32 and found.isfinite().all()
    source.load_state_dict(source.state_dict())


@pytest.mark.parametrize("kind", ["probe", "sidecar", "cache", "exact", "teacher"])
def test_what_a_run_lacks_is_a_sentence(kind):
    bare = Given(counts(), IDS.mask, 1, torch.device("cpu"))
    with pytest.raises(ConfigError, match=f"source '{kind}' needs"):
        build(EntropyConfig(kind), bare)


def test_none_is_none_and_another_kind_can_take_over(tmp_path):
    assert build(EntropyConfig(), given(tmp_path)) is None
    assert isinstance(build(EntropyConfig("probe"), given(tmp_path), "exact"), Exact)


def test_candidates_come_from_the_probe(tmp_path):
    exact = build(EntropyConfig("exact", candidates=2.0), given(tmp_path))
    assert isinstance(exact.propose, Probe) and exact.candidates() == 10
    assert exact.state_dict().keys() == exact.propose.state_dict().keys()
