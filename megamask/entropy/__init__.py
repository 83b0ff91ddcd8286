"""Sources of entropy: the uncertainty of a model at each token, from exact to free.

All sources have one interface: they give nats per token for the packs of a step, and receive the losses at the targets.

    settings.py    the settings
    source.py      the interface
    frequency.py   how rare a token is: a control
    probe.py       a small network on the embedding that learns from the losses
    sidecar.py     a byte per token beside the shards
    exact.py       a pass of the model itself, or of a teacher, or of a moving average
    audit.py       how well a source predicts the exact signal
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megamask.entropy.audit import Audit, AuditResult, captured_gain, overlap, spearman
    from megamask.entropy.exact import Average, Exact, measure_entropy
    from megamask.entropy.frequency import Frequency
    from megamask.entropy.probe import Probe
    from megamask.entropy.settings import AuditConfig, EntropyConfig, Signal
    from megamask.entropy.sidecar import SidecarFacts, StoredEntropy
    from megamask.entropy.source import EntropyFn, EntropySource

__all__ = [
    "Audit", "AuditConfig", "AuditResult", "Average", "EntropyConfig", "EntropyFn", "EntropySource", "Exact",
    "Frequency", "Probe", "SidecarFacts", "Signal", "StoredEntropy", "captured_gain", "measure_entropy", "overlap",
    "spearman",
]  # fmt: skip

_MODULES = {
    "audit": ("Audit", "AuditResult", "captured_gain", "overlap", "spearman"),
    "exact": ("Average", "Exact", "measure_entropy"),
    "frequency": ("Frequency",),
    "probe": ("Probe",),
    "settings": ("AuditConfig", "EntropyConfig", "Signal"),
    "sidecar": ("StoredEntropy", "SidecarFacts"),
    "source": ("EntropyFn", "EntropySource"),
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for, since `settings` must not import torch."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
