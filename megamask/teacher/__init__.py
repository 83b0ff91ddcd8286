"""Frozen models as a source of entropies and of soft targets."""
