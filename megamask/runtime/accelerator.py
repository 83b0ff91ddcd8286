"""Which accelerator DeepSpeed uses. transformers and accelerate may import DeepSpeed, too."""

from __future__ import annotations

import os


def choose_accelerator() -> None:
    """Select DeepSpeed's CPU back end before its import if there is no GPU; otherwise it prints a warning."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
