"""Lets ``python -m editlab`` do what the ``editlab`` command does."""

import sys

from editlab.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
