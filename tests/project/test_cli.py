"""The command line: typed keys, YAML under overrides, mistakes met with a suggestion, help without heavy imports."""

from __future__ import annotations

import enum
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from typing import Literal

import pytest

import fastalign as fa
from fastalign.cli import commands as cli
from fastalign.trainers.common import arguments


class Color(enum.Enum):
    RED = "red"
    BLUE = "blue"


@dataclass
class Config:
    """What the tests configure."""

    name: str | None = arguments.key(None, "A name", group="Model and data")
    rate: float = arguments.key(0.5, "A rate")
    count: int = arguments.key(3, "A count")
    flag: bool = arguments.key(False, "A flag")
    color: Color = Color.RED
    either: str | list[str] | dict[str, float] = "one"
    choice: Literal["a", "b"] = "a"


def parse(*argv: str, **options) -> Config:
    return arguments.parse(Config, argv, command="test", **options)


@pytest.mark.parametrize(
    ("argv", "name", "value"),
    [
        (["--rate", "1e-5"], "rate", 1e-5),
        (["--rate=-3"], "rate", -3.0),
        (["--count", "12"], "count", 12),
        (["--flag"], "flag", True),
        (["--flag", "no"], "flag", False),
        (["--flag", "--count", "1"], "flag", True),
        (["--name", "null"], "name", None),
        (["--name", "a=b"], "name", "a=b"),
        (["--color", "blue"], "color", Color.BLUE),
        (["--either", "sigmoid"], "either", "sigmoid"),
        (["--either", '{"sigmoid": 1, "sft": 0.5}'], "either", {"sigmoid": 1, "sft": 0.5}),
        (["--choice", "b"], "choice", "b"),
    ],
)
def test_values_are_converted(argv, name, value):
    got = getattr(parse(*argv), name)
    assert got == value
    assert type(got) is type(value)


def test_command_line_wins_over_yaml(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("rate: 1e-5\ncount: 7\neither: [x, y]\n")
    config = parse("--config", str(path), "--count", "8")
    assert (config.rate, config.count, config.either) == (1e-5, 8, ["x", "y"])


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--rat", "1"], "unknown key --rat; did you mean --rate"),
        (["--zzz", "1"], "unknown key --zzz; see fastalign test --help"),
        (["--rate", "fast"], "--rate must be a number; got 'fast'"),
        (["--count", "1.5"], "--count must be a whole number"),
        (["--flag", "maybe"], "--flag must be true or false"),
        (["--choice", "c"], "--choice must be a or b"),
        (["rate", "1"], "expected --key value; got 'rate'"),
        (["--config", "absent.yaml"], "there is no absent.yaml"),
    ],
)
def test_mistakes_name_the_key(argv, message):
    with pytest.raises(ValueError, match=message):
        parse(*argv)


@pytest.mark.parametrize("content", ["- 1\n- 2\n", "a: [1\n", "rate: fast\n", "ratee: 1\n"])
def test_bad_yaml_is_refused(tmp_path, content):
    path = tmp_path / "run.yaml"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"--config|--rate"):
        parse("--config", str(path))


def test_missing_key_is_named():
    with pytest.raises(ValueError, match="test needs --name"):
        parse(needs=("name",))


def test_help_shows_groups_defaults_and_the_rest():
    with pytest.raises(arguments.Helped) as caught:
        parse("--help", needs=("name",))
    text = str(caught.value)
    assert text.index("Model and data:") < text.index("Run:")
    assert "A rate [a number; default: 0.5]" in text
    assert "A name [text or null; required]" in text
    assert "color, either, choice" in text


def test_commands_answer_help_and_mistakes(capsys):
    assert cli.main([]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in cli.COMMANDS)
    assert cli.main(["dop"]) == 2
    assert "must be one of demo, sft, dpo" in capsys.readouterr().err


def test_backends_command_prints_what_there_is(capsys):
    assert cli.main(["backends"]) == 0
    out = capsys.readouterr().out
    for name, state in fa.backends().items():
        assert f"{name:<8} {state}" in out
    assert cli.main(["backends", "--all"]) == 2


@pytest.mark.parametrize(
    ("command", "key"),
    [
        *((name, "output_dir") for name in ("sft", "dpo", "pro", "reward", "demo")),
        ("eval", "models"),
        ("sample", "prompt"),
        ("doctor", "dataset"),
    ],
)
def test_commands_explain_themselves(command, key, capsys):
    pytest.importorskip("transformers", reason="needs transformers (the extra `train`)")
    assert cli.main([command, "--help"]) == 0
    assert f"  --{key}\n" in capsys.readouterr().out
    assert cli.main([command, f"--{key[:-1]}x", "x"]) == 2
    assert f"did you mean --{key}" in capsys.readouterr().err


@pytest.mark.parametrize("command", cli.COMMANDS)
def test_every_command_has_help(command, capsys):
    pytest.importorskip("transformers", reason="needs transformers (the extra `train`)")
    assert cli.main([command, "--help"]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith(f"usage: fastalign {command}")
    assert not shown.err


def test_help_answers_at_once_and_without_torch():
    """Half a second of the processor at most: the clock would count what else runs on the machine."""
    code = (
        "import resource, sys\nfrom fastalign import cli\nstatus = cli.main(['--help'])\nuse = resource.getrusage(0)\n"
    )
    code += "print(status, use.ru_utime + use.ru_stime, *sys.modules, file=sys.stderr)"
    resource = pytest.importorskip("resource", reason="needs a POSIX system")
    assert resource
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tempfile.gettempdir())
    assert done.stdout.startswith("usage: fastalign COMMAND")
    status, seconds, *modules = done.stderr.split()
    assert status == "0"
    assert float(seconds) < 0.5
    assert not {"torch", "numpy", "transformers"} & set(modules)
    same = [sys.executable, "-m", "fastalign", "--help"]
    assert subprocess.run(same, capture_output=True, text=True, cwd=tempfile.gettempdir()).stdout == done.stdout


def test_missing_required_key_is_an_error_of_usage(capsys):
    pytest.importorskip("transformers", reason="needs transformers (the extra `train`)")
    assert cli.main(["dpo", "--model", "x"]) == 2
    assert "dpo needs --dataset, --output_dir" in capsys.readouterr().err


def run_python(code: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=tempfile.gettempdir()
    )


def test_missing_extra_is_named():
    done = run_python(
        "import sys; sys.modules['transformers'] = None\n"
        "from fastalign.cli import main\n"
        "sys.exit(main(['sft', '--model', 'x']))"
    )
    assert done.returncode == 1
    assert "'transformers' is missing" in done.stderr
    assert "pip install 'fastalign[train]'" in done.stderr


def test_help_imports_no_trainer():
    done = run_python(
        "import sys\nfrom fastalign.cli import main\nmain(['--help'])\n"
        "sys.exit(any(name in sys.modules for name in ('transformers', 'datasets', 'sklearn', 'matplotlib')))"
    )
    assert done.returncode == 0, done.stderr


def test_a_reader_that_goes_away_is_no_error():
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "fastalign", "--help"], stdout=writer, stderr=subprocess.PIPE, cwd=tempfile.gettempdir()
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, b"")
