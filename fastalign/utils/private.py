"""The private names of torch that this package stands on, found here and nowhere else, once, at import.

There is no public way to ask what they answer (which transforms and modes are at work, what a transform made a tensor
of), to carry an object into autograd's threads, or to keep the compiler from a frame. A release of torch may drop any
of them: then the import says which, and of which torch.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import forward_ad

KNOWN = "2.13"
"""The torch that all of them were tried with."""


def of_torch(path: str) -> Any:
    """What torch has at this path (after `torch.`).

    Raises:
        ImportError: nothing is there; naming the path and the version of torch.
    """
    found: Any = torch
    for name in path.split("."):
        if not hasattr(found, name):
            raise ImportError(
                f"fastalign needs torch.{path}, which is private to torch, and torch {torch.__version__} has none: "
                f"install torch {KNOWN}, with which fastalign was tried, or a fastalign that knows this torch"
            )
        found = getattr(found, name)
    return found


transforms_active = of_torch("_C._are_functorch_transforms_active")
dispatch_keys = of_torch("_C._dispatch_keys")
BATCHED = of_torch("_C._dispatch_key_parse")("Batched")
is_of_transform = of_torch("_C._functorch.is_functorch_wrapped_tensor")
"""Whether a transform of functions made the tensor; also one that is over."""
is_batch_of_transform = of_torch("_C._functorch.is_batchedtensor")
without_transform = of_torch("_C._functorch.get_unwrapped")
count_of_modes = of_torch("_C._len_torch_dispatch_stack")
below_autograd = of_torch("_C._AutoDispatchBelowAutograd")
carry = of_torch("_C._stash_obj_in_tls")
carried = of_torch("_C._get_obj_in_tls")
is_carried = of_torch("_C._is_key_in_tls")

# Of these two the whole module is used.
of_torch("_C._dynamo.eval_frame.set_eval_frame")
eval_frame = of_torch("_C._dynamo.eval_frame")
of_torch("autograd.forward_ad._current_level")
dual_levels = forward_ad
"""Its `_current_level` is below 0 where no forward-mode differentiation is at work."""

__all__ = [
    "BATCHED",
    "below_autograd",
    "carried",
    "carry",
    "count_of_modes",
    "dispatch_keys",
    "dual_levels",
    "eval_frame",
    "is_batch_of_transform",
    "is_carried",
    "is_of_transform",
    "transforms_active",
    "without_transform",
]
