"""How far two ways to the same numbers may lie apart, by precision. No test has tolerances of its own."""

from __future__ import annotations

import torch
from torch import Tensor

# dtype -> (relative, absolute)
TOLERANCES = {
    torch.float64: (1e-10, 1e-11),
    torch.float32: (1e-4, 2e-5),
    torch.bfloat16: (3e-2, 5e-2),
}
NATS = 1e-3
"""An entropy or log-probability from 32-bit inputs against 64 bits."""


def assert_close(actual: Tensor, expected: Tensor, dtype: torch.dtype | None = None) -> None:
    """``actual`` equals ``expected`` as well as ``dtype`` allows, by default that of ``actual``."""
    rtol, atol = TOLERANCES[dtype or actual.dtype]
    torch.testing.assert_close(actual.double(), expected.double(), rtol=rtol, atol=atol)
