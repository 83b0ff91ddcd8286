"""Where an entropy comes from: how unsure a model is of each token, from exact to free.

All sources have one interface: nats per row for the packs of a step, and what the loss said at the targets in return.

    settings.py    the settings
    source.py      the interface
    frequency.py   how rare a token is: a control
    probe.py       a small network on the embedding that learns from what the loss says
    sidecar.py     a byte per token beside the shards
    cache.py       what the loss said in the previous epoch, a byte per token in the run folder
    exact.py       a pass of the model itself, or of a teacher, or of a moving average
    audit.py       how well a source foretells the exact signal
    sequences.py   the maskable rows, sequence by sequence
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megamask.entropy.audit import Audit, Verdict, captured_gain, overlap, spearman
    from megamask.entropy.cache import Cache
    from megamask.entropy.exact import Average, Exact, measured
    from megamask.entropy.frequency import Frequency
    from megamask.entropy.probe import Probe
    from megamask.entropy.settings import AuditConfig, EntropyConfig, Signal
    from megamask.entropy.sidecar import Sidecar, SidecarFacts
    from megamask.entropy.source import Ask, Source

__all__ = [
    "Ask", "Audit", "AuditConfig", "Average", "Cache", "EntropyConfig", "Exact", "Frequency", "Probe", "Sidecar",
    "SidecarFacts", "Signal", "Source", "Verdict", "captured_gain", "measured", "overlap", "spearman",
]  # fmt: skip

_MODULES = {
    "audit": ("Audit", "Verdict", "captured_gain", "overlap", "spearman"),
    "cache": ("Cache",),
    "exact": ("Average", "Exact", "measured"),
    "frequency": ("Frequency",),
    "probe": ("Probe",),
    "settings": ("AuditConfig", "EntropyConfig", "Signal"),
    "sidecar": ("Sidecar", "SidecarFacts"),
    "source": ("Ask", "Source"),
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is asked for, since `settings` must not import torch."""
    for module, names in _MODULES.items():
        if name in names:
            return getattr(importlib.import_module(f"{__name__}.{module}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
