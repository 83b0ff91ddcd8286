"""Where an entropy comes from: how unsure a model is of each token, from exact to free.

All sources have one interface: nats per row for the packs of a step, and what the loss said at the targets in return.

    source.py      the interface and the settings
    frequency.py   how rare a token is: a control
    probe.py       a small network on the embedding that learns from what the loss says
    sidecar.py     a byte per token beside the shards
    cache.py       what the loss said in the previous epoch, a byte per token in the run folder
    exact.py       a pass of the model itself, or of a teacher, or of a moving average
    audit.py       how well a source foretells the exact signal
    sequences.py   the maskable rows, sequence by sequence
"""

from megamask.entropy.audit import Audit, Verdict, captured_gain, overlap, spearman
from megamask.entropy.cache import Cache
from megamask.entropy.exact import Average, Exact, measured
from megamask.entropy.frequency import Frequency
from megamask.entropy.probe import Probe
from megamask.entropy.sidecar import Sidecar, SidecarFacts
from megamask.entropy.source import Ask, AuditConfig, EntropyConfig, Signal, Source

__all__ = [
    "Ask", "Audit", "AuditConfig", "Average", "Cache", "EntropyConfig", "Exact", "Frequency", "Probe", "Sidecar",
    "SidecarFacts", "Signal", "Source", "Verdict", "captured_gain", "measured", "overlap", "spearman",
]  # fmt: skip
