"""Readers of benchmark files: JSON lines, the files of GLUE, SNLI, SQuAD and BLiMP, and the hub's `nyu-mll/glue`."""
