"""The state of a run on disk: format, save, resume, inspect."""
