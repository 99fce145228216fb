"""Environment variables are read in one file, and a wrong one is refused at import; what commands tell OpenMP."""

import ast
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import fastalign
from fastalign import _backends, cli
from fastalign.utils import environment
from fastalign.utils.processors import allowed_processors

PACKAGE = Path(fastalign.__file__).parent
OURS = ("FASTALIGN_", "GOMP_", "OMP_")
WRONG = [
    ("FASTALIGN_BACKEND", "cdua", "one of cpu, cuda, triton, eager"),
    ("FASTALIGN_BACKEND", "CPU", "one of cpu, cuda, triton, eager"),
    ("FASTALIGN_CPU_ISA", "mmx", "one of avx512_bf16, avx512, avx2, neon, portable"),
    ("FASTALIGN_KEPT_MIB", "1.5", "a whole number of MiB, 0 for none"),
    ("FASTALIGN_KEPT_MIB", "-1", "a whole number of MiB, 0 for none"),
    ("FASTALIGN_KEPT_MIB", "٣", "a whole number of MiB, 0 for none"),
]


def python(*arguments, **variables):
    """Python outside of the source tree, with these variables of ours and no others."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(OURS)}
    return subprocess.run(
        [sys.executable, *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=inherited | {"PYTHONIOENCODING": "utf-8", "PYTHONUTF8": "1"} | variables,
        cwd=tempfile.gettempdir(),
    )


@pytest.mark.parametrize(("name", "value", "wanted"), WRONG, ids=lambda x: x)
def test_a_wrong_value_is_refused_at_import(name, value, wanted):
    message = f"{name} must be {wanted}; got {value!r}"
    assert f"ValueError: {message}\n" in python("-c", "import fastalign", **{name: value}).stderr
    for arguments in (["--help"], ["backends"]):  # a command says it in one line, as it says all that it is given wrong
        done = python("-m", "fastalign", *arguments, **{name: value})
        assert (done.returncode, done.stdout, done.stderr) == (2, "", f"fastalign: error: {message}\n")
    assert "Traceback" in python("-m", "fastalign", "--help", **{name: value, "FASTALIGN_TRACEBACK": "1"}).stderr


def test_a_package_that_is_run_is_no_command_of_ours(tmp_path):
    (tmp_path / "theirs.py").write_text("import fastalign\n")
    path = os.pathsep.join(filter(None, (str(tmp_path), os.environ.get("PYTHONPATH"))))
    assert "ValueError: FASTALIGN_BACKEND" in python("-m", "theirs", PYTHONPATH=path, FASTALIGN_BACKEND="x").stderr
    assert environment.starts_command(["/usr/bin/fastalign", "dpo"], [])
    assert not environment.starts_command([], [])


def test_empty_is_not_set():
    values = dict.fromkeys(("FASTALIGN_BACKEND", "FASTALIGN_CPU_ISA", "FASTALIGN_KEPT_MIB"), "")
    code = "from fastalign.utils.environment import *; print(BACKEND, CPU_ISA, KEPT_BYTES)"
    assert python("-c", code, **values).stdout == "None None None\n"


def test_right_values():
    values = {"FASTALIGN_BACKEND": "eager", "FASTALIGN_CPU_ISA": "portable", "FASTALIGN_KEPT_MIB": "3"}
    code = "import sys; from fastalign.utils.environment import *; print(BACKEND, CPU_ISA, KEPT_BYTES)\n"
    code += "assert 'torch' not in sys.modules"
    assert python("-c", code, **values).stdout == f"eager portable {3 << 20}\n"


def test_an_instruction_set_that_the_processor_lacks(monkeypatch):
    monkeypatch.setattr(environment, "CPU_ISA", "avx512")
    monkeypatch.setattr(_backends.cpu, "cpu_isas", lambda: ("avx2", "portable"))
    with pytest.raises(ValueError, match="FASTALIGN_CPU_ISA must be one of avx2, portable on this processor; got 'avx"):
        _backends.cpu._default_isa()


def test_the_names_are_those_that_there_are():
    assert tuple(_backends.BACKENDS) == environment.BACKEND_NAMES
    assert set(_backends.cpu_isas()) <= set(environment.ISA_NAMES)


def test_no_other_file_reads_the_environment():
    def reads(path):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
        names |= {alias.name for n in ast.walk(tree) if isinstance(n, ast.ImportFrom) for alias in n.names}
        return bool(names & {"environ", "environb", "getenv", "getenvb", "putenv"})

    found = [path.relative_to(PACKAGE).as_posix() for path in sorted(PACKAGE.rglob("*.py")) if reads(path)]
    assert found == ["utils/environment.py"]


# ------------------------------------------------------------------------------------------------------------- threads
COMMAND = """
import os, sys
from fastalign.cli import commands as cli
def run(argv):
    assert "torch" not in sys.modules
    print(*(os.environ.get(name) for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")))
    return 0
cli.COMMANDS["sft"] = cli.COMMANDS["bench"] = cli.Command("", run)
cli.main([sys.argv[1]])
"""


def test_commands_let_idle_threads_sleep():
    count = str(environment.SPIN_COUNT)
    assert python("-c", COMMAND, "sft").stdout == f"{count} None\n"
    assert python("-c", COMMAND, "sft", GOMP_SPINCOUNT="7").stdout == "7 None\n"
    assert python("-c", COMMAND, "sft", OMP_WAIT_POLICY="active").stdout == "None active\n"
    assert python("-c", COMMAND, "bench").stdout == "None None\n"  # peers are measured as they run without us


def test_a_program_that_has_loaded_torch_is_left_alone(monkeypatch):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    assert cli.main(["backends"]) == 0
    assert not {"GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_NUM_THREADS"} & os.environ.keys()


def groups(root, membership, quotas):
    """A file system whose control groups are these."""
    for path, text in {"proc/self/cgroup": membership, **quotas}.items():
        target = root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    return str(root)


CGROUPS = "sys/fs/cgroup"
QUOTAS = {
    "none": ("0::/\n", {}, None),
    "version 2": ("0::/\n", {f"{CGROUPS}/cpu.max": "150000 100000\n"}, 2),
    "version 2, no limit": ("0::/\n", {f"{CGROUPS}/cpu.max": "max 100000\n"}, None),
    "less than one": ("0::/\n", {f"{CGROUPS}/cpu.max": "20000 100000\n"}, 1),
    "more than there are": ("0::/\n", {f"{CGROUPS}/cpu.max": "6400000 100000\n"}, None),
    "of a parent": (
        "0::/a/b\n",
        {f"{CGROUPS}/a/b/cpu.max": "max 100000\n", f"{CGROUPS}/a/cpu.max": "300000 100000\n"},
        3,
    ),
    "of a container that knows the host's path": ("0::/host/x\n", {f"{CGROUPS}/cpu.max": "200000 100000\n"}, 2),
    "version 1": (
        "4:memory:/m\n3:cpu,cpuacct:/c\n",
        {
            f"{CGROUPS}/cpu,cpuacct/c/cpu.cfs_quota_us": "250000\n",
            f"{CGROUPS}/cpu,cpuacct/c/cpu.cfs_period_us": "100000\n",
        },
        3,
    ),
    "version 1, no limit": (
        "3:cpu:/\n",
        {f"{CGROUPS}/cpu/cpu.cfs_quota_us": "-1\n", f"{CGROUPS}/cpu/cpu.cfs_period_us": "100000\n"},
        None,
    ),
    "unreadable": ("3:cpu\n\n::\n", {f"{CGROUPS}/cpu.max": "much\n"}, None),
}


@pytest.mark.parametrize("name", QUOTAS)
def test_a_containers_quota(name, tmp_path, monkeypatch):
    membership, quotas, expected = QUOTAS[name]
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert allowed_processors(groups(tmp_path, membership, quotas)) == expected


def test_threads_follow_the_quota():
    code = "import os, sys\nfrom fastalign.utils import environment as e\ne.allowed_processors = lambda: 1\n"
    code += "e.prepare_threads()\nimport torch\nprint(os.environ['OMP_NUM_THREADS'], torch.get_num_threads())"
    assert python("-c", code).stdout == "1 1\n"
    assert python("-c", code, OMP_NUM_THREADS="2").stdout == "2 2\n"


def test_a_package_without_its_compiled_modules_says_so(tmp_path):
    """As where nothing was built, or no CUDA: names are imported all the same, and plain torch operations serve."""
    import fastalign.kernels

    source, kernels = Path(fastalign.__file__).parent, Path(fastalign.kernels.__file__).parent
    ignored = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__", "kernels")
    shutil.copytree(source, tmp_path / "fastalign", ignore=ignored)
    shutil.copytree(kernels, tmp_path / "fastalign" / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    code = """
import sys
sys.path.insert(0, {path!r})
sys.meta_path = [f for f in sys.meta_path if "editable" not in repr(f)]  # which would find the built ones
import torch
import fastalign as fa
assert fa.__file__.startswith({path!r})
loss = fa.losses.DPOLoss()(torch.zeros(2, 3, 5, requires_grad=True), torch.zeros(2, 3, dtype=torch.int64)).loss
loss.backward()
print(round(loss.item(), 4), fa.backends()["cpu"])
"""
    done = python("-c", code.format(path=str(tmp_path)))
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("0.6931 the compiled module fastalign._C cannot be imported")
