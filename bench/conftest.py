"""`pytest bench`: options, one parameter per case and variant, one interleaved run per case, the results file.

The first test of a case measures all its variants, interleaved; each test then hands its variant's samples to
pytest-benchmark, whose tables group by case. `--json` writes everything; `report.py` and `targets.py` read that file.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.case import DTYPES, Case
from harness.environment import environment
from harness.interleave import replay_clock
from harness.suite import Options
from report import details

SCHEMA = 1
_DEFAULT = Options()
_RECORDS = pytest.StashKey[dict[Case, dict[str, Any]]]()
_FAILURES = pytest.StashKey[dict[Case, Exception]]()


def _integers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in text.split(","))


def _names(text: str) -> tuple[str, ...]:
    return tuple(text.split(","))


def _dtypes(text: str) -> tuple[str, ...]:
    names = _names(text)
    unknown = [name for name in names if name not in DTYPES]
    if unknown:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}; got {unknown[0]!r}")
    return names


def pytest_addoption(parser: pytest.Parser) -> None:
    add = parser.getgroup("fastalign benchmarks").addoption
    add("--rows", type=_integers, default=_DEFAULT.rows, metavar="N,N", help="tokens, each even (default: %(default)s)")
    add("--vocab", type=_integers, default=_DEFAULT.vocabs, metavar="V,V", help="vocabularies (default: %(default)s)")
    add("--dtype", type=_dtypes, default=_DEFAULT.dtypes, metavar="D,D", help="of the logits (default: %(default)s)")
    add("--variants", type=_names, default=(), metavar="N,N", help="only these variants (default: all)")
    add("--rounds", type=int, default=_DEFAULT.rounds, help="rounds that count (default: %(default)s)")
    add("--warmup", type=int, default=_DEFAULT.warmup, help="rounds before them (default: %(default)s)")
    add("--threads", type=int, default=_DEFAULT.threads, help="of torch and of our kernels (default: %(default)s)")
    add("--seed", type=int, default=_DEFAULT.seed, help="of the inputs and the orders (default: %(default)s)")
    add("--device", default=_DEFAULT.device, choices=("cpu", "cuda", "xpu"), help="(default: %(default)s)")
    add("--no-memory", action="store_true", help="leave the fresh process per case, and so peak memory, out")
    add("--json", metavar="OUT", help="write the results to this file")


def _options(config: pytest.Config) -> Options:
    get = config.getoption
    return Options(
        rows=get("--rows"),
        vocabs=get("--vocab"),
        dtypes=get("--dtype"),
        variants=get("--variants"),
        rounds=get("--rounds"),
        warmup=get("--warmup"),
        threads=get("--threads"),
        seed=get("--seed"),
        memory=not get("--no-memory"),
        device=get("--device"),
    )


def pytest_configure(config: pytest.Config) -> None:
    config.stash[_RECORDS] = {}
    config.stash[_FAILURES] = {}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    suite = getattr(metafunc.module, "SUITE", None)
    if suite is None or "variant" not in metafunc.fixturenames:
        return
    parameters = []
    options = _options(metafunc.config)
    for case in suite.cases(options):
        for name, variant in suite.variants_of(case, options).items():
            marks = [pytest.mark.benchmark(group=str(case), timer=replay_clock)]
            if variant.missing:
                marks.append(pytest.mark.skip(reason=f"{variant.missing} is not installed"))
            parameters.append(pytest.param(case, name, id=f"{case}-{name}", marks=marks))
    metafunc.parametrize(("case", "variant"), parameters)


@pytest.fixture
def record_of(request: pytest.FixtureRequest) -> Callable[[Case], dict[str, Any]]:
    """case → its record in the results; measured when first asked for."""
    config, suite = request.config, request.module.SUITE
    records, failures = config.stash[_RECORDS], config.stash[_FAILURES]

    def get(case: Case) -> dict[str, Any]:
        if case in failures:
            pytest.fail(f"measuring {case} failed before: {failures[case]!r}")
        if case not in records:
            options = _options(config)
            torch.set_num_threads(options.threads)
            try:
                records[case] = suite.measure(case, options)
            except Exception as error:  # once a case and not once a variant: it took long enough
                failures[case] = error
                raise
        return records[case]

    return get


def _results(config: pytest.Config) -> dict[str, Any]:
    cases = list(config.stash[_RECORDS].values())
    return {"schema": SCHEMA, "environment": environment(_options(config)), "cases": cases}


def pytest_sessionfinish(session: pytest.Session) -> None:
    target = session.config.getoption("--json")
    if target and session.config.stash[_RECORDS]:
        path = Path(session.config.invocation_params.dir, target)
        path.write_text(json.dumps(_results(session.config), indent=1) + "\n")


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    if config.stash[_RECORDS]:
        terminalreporter.section("fastalign benchmarks")
        terminalreporter.write_line(details(_results(config)))
