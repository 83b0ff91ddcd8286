"""The door to DeepSpeed: its file (`ds_file`), the optimizer, and the engine that steps and holds the state."""

import os


def choose_accelerator() -> None:
    """Tell DeepSpeed if there is no GPU, before it is imported: it finds out by itself, but then warns of it."""
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
