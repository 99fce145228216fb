"""`python -m fastalign.memory`: what a fused head will take; see `fastalign.head.estimate`."""

import sys

from .head.estimate import Estimate, estimates, main

__all__ = ["Estimate", "estimates", "main"]

if __name__ == "__main__":
    sys.exit(main())
