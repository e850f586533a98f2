#!/usr/bin/env python
"""`titan-bridge reshard` as a script: `python scripts/reshard.py SRC DST --to hf`, also under torchrun."""

from __future__ import annotations

import sys

from titan_bridge.cli import script

if __name__ == "__main__":
    sys.exit(script(["reshard", *sys.argv[1:]]))
