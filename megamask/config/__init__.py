"""The configuration of a run: settings, command line, recipes."""
