"""The model that a policy is held to."""

from __future__ import annotations

import copy
from typing import Any

import torch

from ...models.loading import load_model
from ...models.lora import is_adapted, starts_at_base


def frozen_reference(policy: Any, given: Any, args: Any, device: torch.device) -> Any:
    """The reference, frozen: the one given, that of `args.ref_model`, or a copy of the policy as it is now.

    None where there is nothing to hold to, or where the policy with its adapters off will do: with fresh ones.
    """
    if not args.needs_reference:
        return None
    if given is None and args.ref_model is not None:
        given = load_model(args.ref_model, args, "ref_model")
    if given is None:
        if starts_at_base(policy) or (args.lora_rank and not is_adapted(policy)):
            return None
        given = copy.deepcopy(policy)
    return given.requires_grad_(False).eval().to(device)
