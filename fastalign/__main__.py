"""`python -m fastalign`: the same as the `fastalign` command."""

import sys

from .cli import main

if __name__ == "__main__":
    sys.exit(main())
