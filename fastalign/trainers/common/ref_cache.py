"""The reference's log-probabilities on disk, keyed by what they depend on: its weights, its precision and the data."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ...models.lora import starts_at_base
from ...utils.environment import reference_cache_dir
from .checkpoints import writing

Columns = list[list[float]]
"""Summed log-probabilities in the rows' order: of the chosen and of the rejected completions, say."""


def cached(key: str, compute: Callable[[], Columns], names: Sequence[str]) -> Columns:
    """What is stored under the key, a column for each name, or what `compute` returns, which is then stored (whole or
    not at all)."""
    path = reference_cache_dir() / f"{key}.npz"
    if path.exists():
        with np.load(path) as stored:
            return [stored[name].tolist() for name in names]
    columns = compute()
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=path.parent, suffix=".partial")
    with writing(str(path), partial):
        with os.fdopen(handle, "wb") as file:
            arrays: dict[str, Any] = dict(zip(names, map(np.array, columns), strict=True))
            np.savez(file, **arrays)
        os.replace(partial, path)
    return columns


def key_of(reference: nn.Module, rows: Any, columns: Sequence[str], settings: dict[str, Any]) -> str:
    """Hexadecimal hash of the reference's weights and configuration, the rows' token ids and the settings.

    A model with fresh adapters counts as the model without: that is the reference.
    """
    fresh = starts_at_base(reference)
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(reference.state_dict().items()):
        if "lora_" in name and fresh:
            continue
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        raw = tensor.detach().cpu().contiguous().reshape(-1)
        digest.update(raw.view(torch.uint8).numpy().data if raw.numel() else b"")
    config = getattr(reference, "config", None)
    described = {} if config is None else {k: v for k, v in config.to_dict().items() if not k.startswith("_")}
    digest.update(json.dumps([described, settings], sort_keys=True, default=str).encode())
    for row in rows.select_columns(list(columns)):
        digest.update(json.dumps([row[name] for name in columns]).encode())
    return digest.hexdigest()
