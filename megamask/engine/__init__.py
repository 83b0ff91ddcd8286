"""DeepSpeed: its file (`ds_file`), the optimizers, and the engine. Only this package imports DeepSpeed."""

import os


def choose_accelerator() -> None:
    """Select DeepSpeed's CPU back end before its import if there is no GPU; otherwise it prints a warning."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
