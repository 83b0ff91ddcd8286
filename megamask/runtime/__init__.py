"""The process and the machine: entry points, ranks, precision, versions, progress bars."""
