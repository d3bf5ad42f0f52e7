#!/usr/bin/env python3
"""The door to the package `gpu_check` beside it: `python3 scripts/gpu_check.py [--help]`. All there is to say is said there."""

import sys

from gpu_check.main import main

if __name__ == "__main__":
    sys.exit(main())
