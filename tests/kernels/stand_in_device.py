"""A device that is not the CPU, on a machine that has none: what computes on the CPU, as a device of its own.

    python tests/kernels/stand_in_device.py

registers it with torch, for the whole process (as does an import of this), and runs `bench/gpu_check.py`'s check of the
trainers there, and what else depends on the device. An operation that is given tensors of both devices fails, as on a
GPU; what waits for the device, or runs out of its memory, is not to be seen here.
"""

from __future__ import annotations

import contextlib
import functools
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate.state import PartialState
from torch.utils._pytree import tree_map, tree_map_only
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from transformers import PreTrainedModel, TrainingArguments

import fastalign as fa

NAME = "standin"
_setup_privateuseone_for_python_backend(NAME)
DEVICE = torch.device(NAME, 0)
_data: dict[int, torch.Tensor] = {}
"""Storage of a tensor there → the CPU tensor that holds its numbers. Autograd makes tensors that share no more."""


class _There(torch.Tensor):
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, data: torch.Tensor) -> Any:
        made = torch._C._acc.create_empty_tensor(data.shape, data.dtype)
        made.__class__ = cls
        _data[made.untyped_storage()._cdata] = made.data_here = data
        return made

    def __init__(self, data: torch.Tensor) -> None:
        pass


def _is_there(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.device.type == NAME


def here(x: torch.Tensor) -> torch.Tensor:
    """The CPU tensor behind a tensor there; any other as it is."""
    if not _is_there(x):
        return x
    return x.data_here if isinstance(x, _There) else _data[x.untyped_storage()._cdata]


def _run(op: Any, *args: Any, **kwargs: Any) -> Any:
    """The operation on the CPU. A CPU tensor may only index, or be a number."""
    name = op._schema.name
    if name == "aten::_copy_from":
        here(args[1]).copy_(here(args[0]))
        return args[1]
    theirs, ours = [], []

    def taken(x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            (theirs if _is_there(x) else ours).append(x)
            return here(x)
        return torch.device("cpu") if isinstance(x, torch.device) else x

    given = tree_map(taken, (args, kwargs))
    mixed = [list(x.shape) for x in ours if x.dim()]
    if theirs and mixed and not name.startswith(("aten::_to_copy", "aten::copy_", "aten::index")):
        raise RuntimeError(f"{op} is given tensors on {DEVICE} and on the CPU, {mixed}")
    out = op(*given[0], **given[1])
    to = kwargs.get("device")
    if name == "aten::_to_copy" and to is not None and to.type == "cpu":
        return out
    back = {id(here(x)): x for x in theirs}  # what an operation in place returns
    return tree_map_only(torch.Tensor, lambda x: back[id(x)] if id(x) in back else _There(x), out)


def register() -> list[torch.library.Library]:
    """Gives torch the device's operations. To be kept: what it returns holds the registrations."""
    every, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    every.fallback(_run, "PrivateUse1")
    for full in torch._C._dispatch_get_all_op_names():  # torch's own kernels for any device know no tensors of ours
        space, _, name = full.partition("::")
        packet = getattr(torch.ops.aten, name.partition(".")[0], None) if space == "aten" else None
        op = getattr(packet, name.partition(".")[2] or "default", None)
        generic = torch._C._dispatch_has_kernel_for_dispatch_key(full, "CompositeExplicitAutograd")
        if op is not None and generic and not name.startswith(("empty", "copy_", "_copy_from")):
            aten.impl(name, functools.partial(_run, op), "PrivateUse1")
    return [every, aten]


def as_the_accelerator() -> None:
    """Makes transformers and accelerate take the device, and files hold the numbers of what is there."""
    PartialState.default_device = property(lambda self: DEVICE)
    devices = lambda self: (self._setup_devices, torch.device("cpu") if self.use_cpu else DEVICE)[1]  # noqa: E731
    TrainingArguments.device = property(devices)
    torch.__future__.set_swap_module_params_on_conversion(True)  # else `to` makes new parameters, and ties break
    torch.Tensor.pin_memory = lambda self, *args: self
    write, read, write_model = torch.save, torch.load, PreTrainedModel.save_pretrained

    def save(value: Any, *args: Any, **kwargs: Any) -> None:
        write(tree_map_only(torch.Tensor, lambda x: here(x.detach()) if _is_there(x) else x, value), *args, **kwargs)

    def load(*args: Any, map_location: Any = None, **kwargs: Any) -> Any:
        return read(*args, map_location="cpu" if NAME in str(map_location) else map_location, **kwargs)

    def save_pretrained(self: Any, folder: Any, *args: Any, state_dict: Any = None, **kwargs: Any) -> None:
        state = self.state_dict() if state_dict is None else state_dict
        state = {name: here(x.detach()) for name, x in state.items()}
        write_model(self, folder, *args, state_dict=state, **kwargs)

    torch.save, torch.load, PreTrainedModel.save_pretrained = save, load, save_pretrained


def reference_left_on_the_cpu(bench: Any) -> None:
    """As transformers leaves a model that FSDP will shard: it is placed for its log-probabilities, and put back."""
    trainer = bench.trainer("dpo", "left", precompute_ref_log_probs=False)
    model = trainer.model.to("cpu")
    columns = trainer._compute_reference(model, trainer.train_dataset)
    if {p.device.type for p in model.parameters()} != {"cpu"} or len(columns[0]) != len(trainer.train_dataset):
        raise SystemExit("a reference that was on the CPU is not there again")


def one_process_two_devices(bench: Any) -> None:
    """`use_cpu` of one trainer says nothing of the next."""
    for use_cpu in (True, False, True):
        found = bench.trainer("ppo", "two", use_cpu=use_cpu).accelerator.device.type
        if found != ("cpu" if use_cpu else NAME):
            raise SystemExit(f"use_cpu={use_cpu} after another trainer: on {found}")


@contextlib.contextmanager
def advantages_there() -> Iterator[None]:
    """A backend that is asked for by name serves one kind of device: all that kernels are given must be there."""
    kinds, gae = set(), fa.rl.gae
    fa.rl.gae = lambda rewards, *args, **kwargs: kinds.add(rewards.device.type) or gae(rewards, *args, **kwargs)
    yield
    fa.rl.gae = gae
    if kinds != {NAME}:
        raise SystemExit(f"advantages were computed on {kinds}")


def demo_stages(folder: Path) -> None:
    from fastalign.demo.config import DemoConfig
    from fastalign.demo.stages import Demo

    model = Demo(DemoConfig(output_dir=str(folder)), folder).load("sft")[0]
    if model.device.type != NAME:
        raise SystemExit(f"the demo samples on {model.device}")


def main() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "bench"))
    from gpu import trainers as _gpu_trainers

    _gpu_trainers.MIXED = {}  # transformers takes no precision but float32 for a device that it does not know
    _gpu_trainers.STEPS, _gpu_trainers.SAVED = 2, 1
    kept = register()
    as_the_accelerator()
    with advantages_there():
        print(_gpu_trainers.trainers(NAME, "eager"))
    with tempfile.TemporaryDirectory() as folder:
        bench = _gpu_trainers.Bench(Path(folder), NAME)
        reference_left_on_the_cpu(bench)
        one_process_two_devices(bench)
        bench.run("sft", "sft")
        demo_stages(Path(folder))
    del kept


if __name__ == "__main__":
    main()
