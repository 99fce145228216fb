"""All that `import fastalign` offers. The package imports this module when the first of its names is used."""

from . import losses, rl
from ._backends import backends, keep_memory, release_memory, use_backend
from .head.head import Head, head_token_stats
from .head.plan import HeadPlan, head_plan
from .losses.cross_entropy import cross_entropy
from .losses.linear_cross_entropy import linear_cross_entropy
from .losses.objective import Objective, attach_gradient, token_objective
from .ops.packed import Packed, packed_sequences
from .ops.sequences import sequence_logps
from .ops.statistics import TokenStats, token_logps, token_stats
from .utils import moved as _moved
from .utils.version import __version__

__all__ = [
    "Head",
    "HeadPlan",
    "Objective",
    "Packed",
    "TokenStats",
    "__version__",
    "attach_gradient",
    "backends",
    "cross_entropy",
    "head_plan",
    "head_token_stats",
    "keep_memory",
    "linear_cross_entropy",
    "losses",
    "packed_sequences",
    "release_memory",
    "rl",
    "sequence_logps",
    "token_logps",
    "token_objective",
    "token_stats",
    "use_backend",
]

__getattr__ = _moved.renamed(__name__, globals())
