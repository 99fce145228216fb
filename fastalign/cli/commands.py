"""The `fastalign` command. Heavy imports happen inside the commands, so that `fastalign --help` answers at once."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..trainers.common.arguments import Helped, given_keys
from ..utils import environment
from ..utils.version import __version__
from .keys import known_keys


class Command(NamedTuple):
    """One subcommand: what it does, and the function that takes its arguments and returns an exit status."""

    summary: str
    run: Callable[[list[str]], int]


def _sft(argv: list[str]) -> int:
    from ..trainers import sft

    return sft.main(argv)


def _distill(argv: list[str]) -> int:
    from ..trainers import distill

    return distill.main(argv)


def _dpo(argv: list[str]) -> int:
    from ..trainers import dpo

    return dpo.main(argv)


def _kto(argv: list[str]) -> int:
    from ..trainers import kto

    return kto.main(argv)


def _tpo(argv: list[str]) -> int:
    from ..trainers import tpo

    return tpo.main(argv)


def _online_dpo(argv: list[str]) -> int:
    from ..trainers import online_dpo

    return online_dpo.main(argv)


def _ppo(argv: list[str]) -> int:
    from ..trainers import ppo

    return ppo.main(argv)


def _grpo(argv: list[str]) -> int:
    from ..trainers import grpo

    return grpo.main(argv)


def _reward(argv: list[str]) -> int:
    from ..trainers import reward

    return reward.main(argv)


def _pro(argv: list[str]) -> int:
    from ..trainers import pro

    return pro.main(argv)


def _evaluate(argv: list[str]) -> int:
    from ..evaluation import evaluate

    return evaluate.main(argv)


def _sample(argv: list[str]) -> int:
    from ..evaluation import sample

    return sample.main(argv)


def _doctor(argv: list[str]) -> int:
    if not argv:  # of the installation, for which torch is enough
        from ..doctor import installation

        return installation.report()
    from ..doctor import command as doctor

    return doctor.main(argv)


def _demo(argv: list[str]) -> int:
    from ..demo import command as demo

    return demo.main(argv)


def _study(argv: list[str]) -> int:
    from ..study import command

    return command.main(argv)


def _bench(argv: list[str]) -> int:
    from . import bench as bench_command

    return bench_command.main(argv)


_BACKENDS_HELP = """usage: fastalign backends

Lists the backends, kernels of one kind each, in the order in which they are preferred: which can run here, and why the
others cannot; the instruction sets of the backend `cpu`; and in which precision a head forms its products there. Takes
no keys. FASTALIGN_BACKEND, FASTALIGN_CPU_ISA and FASTALIGN_CPU_GEMM (16bit or float32) in the environment, and
`fastalign.use_backend` in Python, choose others than the automatic ones."""


def _show_backends(argv: list[str]) -> int:
    if argv and argv[0] in ("-h", "--help"):
        raise Helped(_BACKENDS_HELP)
    if argv:
        raise ValueError(f"fastalign backends takes no arguments; got {' '.join(argv)}")
    from .. import _backends

    for name, state in _backends.backends().items():
        print(f"{name:<8} {state}")
    usable = ", ".join(_backends.cpu_isas()) or "none"
    print(f"cpu instruction set: {_backends.cpu_isa() or 'not built'} (this processor can run: {usable})")
    print(_products())
    return 0


def _products() -> str:
    import torch

    from ..head.products import quick, slowness

    cpu, said = torch.device("cpu"), []
    for dtype in (torch.bfloat16, torch.float16):
        how = "as they are" if quick(dtype, cpu) else "in float32"
        said.append(f"{str(dtype).removeprefix('torch.')} {how} (torch's take {slowness(dtype):.2g} x float32's time)")
    return f"a head's products on the cpu: {', '.join(said)}"


COMMANDS: dict[str, Command] = {
    "demo": Command("align a small language model on human-rated movie reviews, start to end, in minutes", _demo),
    "sft": Command("supervised fine-tuning on prompts and completions", _sft),
    "dpo": Command("direct preference optimisation on pairs of completions", _dpo),
    "kto": Command("learning from single completions marked desirable or undesirable", _kto),
    "tpo": Command("pairs and a gold completion of each prompt in one step: TPO", _tpo),
    "online-dpo": Command("DPO on pairs of the model's own samples, told apart by a reward or a judge", _online_dpo),
    "ppo": Command("reinforcement learning from a reward: PPO, its KL-penalty form, TRPO", _ppo),
    "grpo": Command("reinforcement learning without a value function: GRPO, RLOO, Dr. GRPO, DAPO, GSPO", _grpo),
    "pro": Command("preference ranking optimization on ranked lists of completions", _pro),
    "distill": Command("distillation of a teacher model, on data or on what the student itself writes", _distill),
    "reward": Command("a reward model from pairs or ranked lists of completions", _reward),
    "eval": Command("compare models on held-out prompts: reward, win rate, length, perplexity", _evaluate),
    "sample": Command("draw continuations of prompts", _sample),
    "study": Command("reproduce what the literature says of alignment, on human ratings: reward against KL", _study),
    "doctor": Command("check this installation; with keys, look at data and models before a run", _doctor),
    "bench": Command("measure this package against its peers, report, and compare two runs (source checkout)", _bench),
    "backends": Command("list the kernels that can run here, and why the others cannot", _show_backends),
}


def usage() -> str:
    """What `fastalign --help` prints."""
    rows = "\n".join(f"  {name:<10} {command.summary}" for name, command in COMMANDS.items())
    return (
        "usage: fastalign COMMAND [--config FILE.yaml] [--key value ...]\n\n"
        "Aligns language models with human preferences.\n\n"
        f"commands:\n{rows}\n\n"
        "`fastalign COMMAND --help` lists the keys of a command."
    )


def _explain(error: ImportError) -> str:
    """The message for a missing package: which one, and what to install."""
    name = (error.name or "").partition(".")[0]
    if not isinstance(error, ModuleNotFoundError) or not name.isidentifier():  # another library's own words
        return " ".join(str(error).split())
    return f"the package {name!r} is missing; the commands need the extra: pip install 'fastalign[train]'"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit status: 0, 1 for a missing package or file or a run that
    diverged, 2 for bad input, 130 interrupted.

    Bad input prints one line; with FASTALIGN_TRACEBACK set in the environment it raises instead.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        status = _answer(args)
        sys.stdout.flush()
    except BrokenPipeError:  # who read our output has gone, as `head` does
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


def _check_keys(command: str, argv: list[str]) -> None:
    """ValueError for a key that the command does not have, before the packages that it needs are imported."""
    known = None if {"-h", "--help"} & set(argv) else known_keys(command)
    if known is not None:
        given_keys(argv, known, command)


def _answer(args: list[str]) -> int:
    if not args or args[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if args == ["--version"]:
        print(f"fastalign {__version__}")
        return 0
    name, rest = args[0], args[1:]
    if name not in COMMANDS:
        print(f"fastalign: error: command must be one of {', '.join(COMMANDS)}; got {name!r}", file=sys.stderr)
        return 2
    if name != "bench":  # which measures ours and its peers as they run without us
        environment.prepare_threads()
    try:
        _check_keys(name, rest)
        return COMMANDS[name].run(rest)
    except Helped as text:
        print(text)
        return 0
    except BrokenPipeError:
        raise
    except ImportError as error:
        if (error.name or "").startswith("fastalign") or environment.wants_traceback():
            raise
        print(f"fastalign {name}: error: {_explain(error)}", file=sys.stderr)
        return 1
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        if environment.wants_traceback():
            raise
        print(f"fastalign {name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1 if isinstance(error, (OSError, FloatingPointError)) else 2
    except KeyboardInterrupt:
        print(f"fastalign {name}: interrupted", file=sys.stderr)
        return 130
