"""`python -m moelab` is the console script `moelab`."""

import sys

from moelab.cli import main

if __name__ == "__main__":
    sys.exit(main())
