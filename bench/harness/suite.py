"""Measures one case of a job that starts from logits: times, ratios, share of the machine's rates, error, memory."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from harness import device as _device
from harness import probe as _probe
from harness.case import Case, Problem
from harness.interleave import Prepare, interleave, ratio, summary
from harness.oracle import Oracle
from harness.variants import Function, Objective, Variant
from torch import Tensor

Result = tuple[Tensor, Tensor | None]
"""What a variant computes, and the gradient of the logits where the job has one."""
Timed = Callable[[], Result]


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    rows: tuple[int, ...] = (512,)
    vocabs: tuple[int, ...] = (32000, 128256)
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    variants: tuple[str, ...] = ()  # none: all
    rounds: int = 15
    warmup: int = 2
    threads: int = 2
    seed: int = 0
    memory: bool = True
    device: str = field(default_factory=_device.automatic)

    def chosen(self, variants: dict[str, Variant]) -> dict[str, Variant]:
        return {name: v for name, v in variants.items() if not self.variants or name in self.variants}


@dataclass(frozen=True)
class LogitsSuite:
    """`objective` takes (logps, ref_logps) to the result in plain torch: with it the oracle computes in float64."""

    name: str
    jobs: tuple[str, ...]
    variants: dict[str, Variant]
    objective: Objective
    checks: Callable[[Problem], dict[str, float]] | None = None
    inputs: Callable[[Problem], Tensor] | None = None
    """What the objective gets in place of the reference's log-probabilities."""

    def problem(self, case: Case, options: Options) -> Problem:
        made = Problem(case, options.seed, options.device)
        if self.inputs is not None:
            made.ref_logps = self.inputs(made)
        return made

    def cases(self, options: Options) -> list[Case]:
        return [
            Case(self.name, job, rows, vocab, dtype)
            for rows in options.rows
            for vocab in options.vocabs
            for dtype in options.dtypes
            for job in self.jobs
        ]

    def variants_of(self, case: Case, options: Options) -> dict[str, Variant]:
        fitting = {n: v for n, v in self.variants.items() if case.job in v.jobs and options.device in v.devices}
        return options.chosen(fitting)

    def contenders(self, case: Case, problem: Problem, options: Options) -> dict[str, Callable[[], Timed]]:
        """Name → preparation, of every variant of the case whose package is installed."""
        torch.compiler.reset()  # else compilations of earlier cases would count against the limit on recompilations
        installed = {name: v for name, v in self.variants_of(case, options).items() if v.missing is None}
        return {name: _prepare(case.job, v.build(), problem) for name, v in installed.items()}

    def measure(self, case: Case, options: Options) -> dict[str, Any]:
        """The case's record in the results file."""
        problem = self.problem(case, options)
        contenders = self.contenders(case, problem, options)
        oracle = Oracle(problem, self.objective, gradient=case.job != "forward")
        errors = {name: oracle.errors(prepare()()) for name, prepare in contenders.items()}  # and compiles
        del oracle
        spare = torch.empty_like(problem.logits).zero_()
        probes: dict[str, Prepare] = {"read": prepare_read(problem), "copy": prepare_copy(problem, spare)}
        _device.warm_up(options.device)
        seconds = interleave(
            {**contenders, **probes},
            rounds=options.rounds,
            warmup=options.warmup,
            seed=options.seed,
            measure=_device.seconds_of(options.device),
        )
        checks = self.checks(problem) if self.checks else {}
        accelerated = options.device in _device.ACCELERATORS
        peaks, hosts = {}, {}
        if accelerated and options.memory:  # its allocator counts exactly, whatever ran before
            peaks = {name: _device.peak_of(prepare, options.device) for name, prepare in contenders.items()}
        if accelerated and case.job != "backward":  # a graph is gone after one backward
            hosts = {name: _device.host_seconds(prepare(), options.device) for name, prepare in contenders.items()}
        del problem, contenders, probes, spare
        if options.memory and not accelerated:
            peaks = peak_memory(case, options)
        record = _record(case, self.variants, seconds, errors, peaks)
        for name, host in hosts.items():
            record["variants"][name]["host_seconds"] = host
        return record | {"checks": checks}


# --------------------------------------------------------------------------------------------------- what gets timed
def _forward(function: Function, problem: Problem) -> Timed:
    logits = problem.fresh()
    return lambda: (function(logits, problem.labels, problem.ref_logps), None)


def _gradient(output: Tensor, logits: Tensor, problem: Problem) -> Tensor:
    # Not Tensor.backward: accumulating into a leaf's .grad may copy, which no training step does with its logits.
    return torch.autograd.grad(output, logits, problem.weights_for(output))[0]


def _backward(function: Function, problem: Problem) -> Timed:
    logits = problem.fresh().requires_grad_()
    output = function(logits, problem.labels, problem.ref_logps)
    return lambda: (output, _gradient(output, logits, problem))


def _both(function: Function, problem: Problem) -> Timed:
    logits = problem.fresh().requires_grad_()

    def run() -> Result:
        output = function(logits, problem.labels, problem.ref_logps)
        return output, _gradient(output, logits, problem)

    return run


_JOBS = {"forward": _forward, "backward": _backward, "both": _both}


def _prepare(job: str, function: Function, problem: Problem) -> Callable[[], Timed]:
    return lambda: _JOBS[job](function, problem)


def prepare_read(problem: Problem) -> Prepare:
    def prepare():
        logits = problem.fresh()
        return lambda: _probe.probe_read(logits)

    return prepare


def prepare_copy(problem: Problem, spare: Tensor) -> Prepare:
    def prepare():
        logits = problem.fresh()
        return lambda: _probe.probe_copy(spare, logits)

    return prepare


# ------------------------------------------------------------------------------------------------- what gets recorded
def _record(
    case: Case,
    variants: dict[str, Variant],
    seconds: dict[str, list[float]],
    errors: dict[str, dict[str, float]],
    peaks: dict[str, int],
) -> dict[str, Any]:
    read, copy = seconds.pop("read"), seconds.pop("copy")
    moved = {"read": case.logits_bytes, "copy": 2 * case.logits_bytes}
    limits = [case.limit_seconds(moved["read"] / r, moved["copy"] / c) for r, c in zip(read, copy, strict=True)]
    probes = {
        name: {"seconds": samples, "bytes": moved[name], "rate": moved[name] / summary(samples)["median"]}
        for name, samples in (("read", read), ("copy", copy))
    }
    rows = {}
    for name, samples in seconds.items():
        total = case.read_bytes + case.copied_bytes
        rows[name] = {
            "ours": variants[name].ours,
            "seconds": samples,
            **summary(samples),
            "rate": total / summary(samples)["median"],
            "of_limit": ratio(limits, samples)["median"],
            "error": errors[name],
            "peak_bytes": peaks.get(name),
        }
    return case.to_dict() | {"calls": 1, "probes": probes, "variants": rows, "ratios": peer_ratios(rows)}


def peer_ratios(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """ours → peer → how many times longer the peer takes, each a summary over the rounds."""
    return {
        ours: {peer: ratio(rows[peer]["seconds"], row["seconds"]) for peer, other in rows.items() if not other["ours"]}
        for ours, row in rows.items()
        if row["ours"]
    }


def peak_memory(case: Case, options: Options) -> dict[str, int]:
    """Variant → peak bytes beyond the logits, measured in a fresh process by `memory.py`; empty where it cannot be."""
    script = Path(__file__).resolve().parents[1] / "memory.py"
    command = [sys.executable, str(script), json.dumps(asdict(case)), json.dumps(asdict(options))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"measuring the memory of {case} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])
