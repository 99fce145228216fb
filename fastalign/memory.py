"""What the head of a language model will take, before anything is run.

    python -m fastalign.memory --model DIR_OR_NAME --batch 8 --length 512
    python -m fastalign.memory --vocab 128256 --hidden 1024 --dtype bfloat16 --batch 4 --length 128 --reference

prints, for eager torch and for each plan of `fastalign.head_token_stats`, the peak memory of the head's forward and
backward beyond its inputs (hidden states, weight) and in addition to the gradients that come out. Nothing is measured
and nothing is loaded but the model's configuration.
"""

from __future__ import annotations

import argparse
import os
import sys

import torch

from .head.estimate import Estimate, estimates

__all__ = ["Estimate", "estimates", "main"]

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _from_model(name: str) -> tuple[int, int, torch.dtype]:
    """V, H and the dtype of weights, from a configuration; ValueError or OSError where there is none that says so."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(name)
    text = config.get_text_config()
    if not getattr(text, "vocab_size", None) or not getattr(text, "hidden_size", None):
        raise ValueError("its configuration names no vocab_size and hidden_size")
    return text.vocab_size, text.hidden_size, getattr(config, "dtype", None) or torch.float32


def _count(text: str) -> int:
    """A whole number above 0."""
    if int(text) <= 0:
        raise argparse.ArgumentTypeError(f"must be above 0; got {text}")
    return int(text)


def _share(text: str) -> float:
    if not 0 < float(text) <= 1:
        raise argparse.ArgumentTypeError(f"must be in (0, 1]; got {text}")
    return float(text)


def main(argv: list[str] | None = None) -> int:
    """Prints the table; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m fastalign.memory", description=__doc__.split("\n")[0])
    parser.add_argument("--model", help="directory or hub name of a transformers model")
    parser.add_argument("--vocab", type=_count)
    parser.add_argument("--hidden", type=_count)
    parser.add_argument("--dtype", choices=_DTYPES)
    parser.add_argument("--batch", type=_count, required=True, help="sequences")
    parser.add_argument("--length", type=_count, required=True, help="tokens of a sequence")
    share = "share of tokens that are neither prompt nor padding"
    parser.add_argument("--valid", type=_share, default=1.0, help=share)
    # The former name.
    parser.add_argument("--live", dest="valid", type=_share, default=argparse.SUPPRESS, help=argparse.SUPPRESS)
    parser.add_argument("--frozen", action="store_true", help="the head's weight is not trained")
    parser.add_argument("--reference", action="store_true", help="an exact KL against a reference's logits")
    parser.add_argument("--chunk_bytes", type=_count, help="budget of a tile in bytes (default: 64 MiB)")
    args = parser.parse_args(argv)
    sizes = (args.vocab, args.hidden)
    if (args.model is not None) == any(sizes) or any(sizes) != all(sizes):
        parser.error("either --model, or --vocab and --hidden, must be given")
    vocab, hidden, dtype = *sizes, torch.bfloat16
    if args.model is not None:
        try:
            vocab, hidden, dtype = _from_model(args.model)
        except ModuleNotFoundError as error:
            parser.error(f"--model needs the package {error.name}: pip install 'fastalign[train]'")
        except (OSError, ValueError) as error:
            local = args.model.startswith((".", "/", "~")) or args.model.count("/") > 1
            absent = local and not os.path.isdir(args.model)
            said = "there is no such folder" if absent else str(error).strip().splitlines()[0]
            parser.error(f"--model must be a folder with config.json, or a hub's name; got {args.model!r}: {said}")
    dtype = _DTYPES[args.dtype] if args.dtype else dtype
    tokens, valid = args.batch * args.length, round(args.batch * args.length * args.valid)
    print(f"{tokens:,} tokens, {valid:,} of them valid, V = {vocab:,}, H = {hidden:,}, {str(dtype)[6:]}\n")
    print(f"{'':<12}{'peak':>14}{'of it gradients':>20}{'GEMMs':>8}")
    options = {"frozen": args.frozen, "kl": args.reference, "chunk_bytes": args.chunk_bytes}
    eager, *_ = estimates(tokens, vocab, hidden, dtype, **options)
    for e in (eager, *estimates(valid, vocab, hidden, dtype, **options)[1:]):
        print(f"{e.name:<12}{e.peak / 2**20:>10,.0f} MiB{e.gradients / 2**20:>16,.0f} MiB{e.gemms:>8}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
