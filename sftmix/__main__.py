"""`python -m sftmix`."""

import sys

from sftmix.cli import main

if __name__ == "__main__":
    sys.exit(main())
