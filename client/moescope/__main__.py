"""``python -m moescope``."""

import sys

from moescope.cli import main

if __name__ == "__main__":
    sys.exit(main())
