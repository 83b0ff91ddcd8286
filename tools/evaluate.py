#!/usr/bin/env python
"""`megamask evaluate` of this checkout, installed or not."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from megamask.__main__ import run_subcommand

if __name__ == "__main__":
    run_subcommand("evaluate")
