"""python -m mnnvl_backend, for where the console script isn't installed."""

import sys

from mnnvl_backend.tools.cli import main

if __name__ == "__main__":
    sys.exit(main())
