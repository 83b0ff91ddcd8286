"""Processes and machines: entry points, ranks, precision, versions, progress bars."""
