"""Readers of benchmark files: JSON lines, the files of GLUE, SNLI, SQuAD and BLiMP, and the Hub's `nyu-mll/glue`."""
