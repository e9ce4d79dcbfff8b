"""`python -m sftmix`."""

from __future__ import annotations

import sys

from sftmix.cli import main

if __name__ == "__main__":
    sys.exit(main())
