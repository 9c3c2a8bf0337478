"""Machines as containers and clusters have them: another home, user, console, or limit."""

import ast
import importlib
import io
import os
import resource
import subprocess
import sys

import pytest
import torch

from tests.helpers import ROOT
from utils import distributed
from utils.command_line import parse_options
from utils.config import write_config
from utils.devices import allow_open_files
from utils.errors import UserError, run_main
from utils.files import check_writable
from utils.run_log import setup_logger
from utils.runs import run_folders

ENTRY_POINTS = [ROOT / "train.py", ROOT / "test.py", *(ROOT / "tools").glob("[!_]*.py")]
STRANGER = 54321  # a user id that no machine knows
as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can become somebody else")


def python(code, **environment):
    """A new process's (status, stderr)."""
    known = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", *environment)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
        env={**known, **{k: v for k, v in environment.items() if v is not None}},
    )  # fmt: skip
    return done.returncode, done.stderr


def told_to_a_stranger(call):
    """What a UserError says to another user, who is in a process of their own."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.setgroups([])
        os.setuid(STRANGER)
        try:
            told = repr(call())
        except Exception as error:
            told = f"{type(error).__name__}: {error}"
        os.write(writer, told.encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with open(reader, encoding="utf-8") as file:
        return file.read()


def ended(main, capsys):
    """(status, what is told on stderr) of an entry point."""
    with pytest.raises(SystemExit) as leave:
        run_main(main)
    return leave.value.code, capsys.readouterr().err


@pytest.mark.parametrize(
    "command",
    [
        "train --config_file ~/x/preset.yaml",
        "train --loss_names sdm --root_dir ~/x",
        "test --config_file ~/x/configs.yaml",
        "tools.check_dataset --root_dir ~/x",
        "tools.report ~/x",
        "tools.compare_runs ~/x ~/y",
        "tools.export --config_file ~/x/configs.yaml --output y",
        "tools.bench --compare ~/x ~/y",
        "tools.reproduce --table mini --root_dir ~/x",
        "tools.reproduce --table ~/x/table.yaml --root_dir .",
        "datasets.mini.__main__ --out ~/x --figure ~/y",
    ],
)
def test_every_command_takes_a_home_in_its_paths(command, tmp_path, monkeypatch):
    module, *argv = command.split()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [module, *argv])
    with pytest.raises(UserError) as error:
        importlib.import_module(module).main()
    assert f"{tmp_path}/x" in str(error.value) and "~" not in str(error.value)


@pytest.mark.parametrize("path", ENTRY_POINTS, ids=lambda path: path.name)
def test_every_entry_point_settles_its_machine_before_it_loads_torch(path):
    imports = [
        n for n in ast.parse(path.read_text()).body if isinstance(n, ast.Import | ast.ImportFrom)
    ]
    names = [getattr(node, "module", None) or node.names[0].name for node in imports]
    before = {name.split(".")[0] for name in names[: names.index("utils")]}
    assert before <= sys.stdlib_module_names


@pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP says so")
@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, 0), ({"OMP_WAIT_POLICY": "ACTIVE"}, 30_000_000_000), ({"GOMP_SPINCOUNT": "7"}, 7)],
)
def test_threads_wait_passively_unless_the_user_says_how(given, spins):
    status, told = python("import utils, torch", OMP_DISPLAY_ENV="VERBOSE", **given)
    assert status == 0 and f"GOMP_SPINCOUNT = '{spins}'" in told


@pytest.mark.parametrize("module", ["fcntl", "resource", "pwd"])
def test_a_system_that_lacks_what_is_needed_is_told_in_a_line(module):
    hidden = f"import sys; sys.modules['{module}'] = None; import utils.files"
    status, told = python(hidden)
    assert status == 2 and told == (
        f"error: {sys.platform} lacks {module}; this runs on Linux and macOS (on Windows, in WSL)\n"
    )


@as_root
def test_a_user_whom_the_machine_does_not_know_has_a_name():
    """torch asks for it on import; without one train.py died on --help."""
    unknown = f"""
import __future__, fcntl, getpass, os, pwd, resource  # of folders that may be root's alone
os.setuid({STRANGER})
import utils
assert getpass.getuser() == "uid{STRANGER}"
"""
    assert python(unknown, LOGNAME=None, USER=None, LNAME=None, USERNAME=None, HOME=None) == (0, "")


@pytest.mark.parametrize("size", ["", " ", "1"])
def test_a_world_of_one_needs_no_torchrun(size, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.setenv("RANK", "x")
    assert distributed.start("cpu")[0] == distributed.SINGLE_PROCESS


@pytest.mark.parametrize("size", ["4", "four"])
def test_a_world_size_that_torchrun_did_not_set_is_told(size, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", size)
    for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(
        UserError, match=f"WORLD_SIZE={size} .* LOCAL_RANK= .*with torchrun, or unset"
    ):
        distributed.start("cpu")


def test_a_console_without_the_letters_shows_their_numbers(monkeypatch):
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    run_main(lambda: print("gr\xf6\xdfe ± \udce9"))
    sys.stdout.flush()
    assert shown.getvalue() == rb"gr\xf6\xdfe \xb1 \udce9" + b"\n"


def test_names_that_are_no_unicode_reach_the_log_and_the_config(tmp_path, capsys):
    log = setup_logger(tmp_path / "log.txt")
    run_main(lambda: log.info("caf\udce9.jpg"))
    setup_logger()  # closes the file
    assert r"caf\udce9.jpg" in (tmp_path / "log.txt").read_text(encoding="utf-8")
    args = parse_options(["--root_dir", "caf\udce9"])
    write_config(tmp_path / "configs.yaml", args)
    assert parse_options(["--config_file", str(tmp_path / "configs.yaml")]) == args


def test_a_file_name_that_the_system_cannot_spell_is_told(monkeypatch, capsys):
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    status, told = ended(lambda: "gr\xf6\xdfe".encode("ascii"), capsys)
    assert status == 2 and told.count("\n") == 1
    assert r"'gr\xf6\xdfe': names of files are in ascii here" in told and "PYTHONUTF8=1" in told


@as_root
def test_what_is_not_permitted_is_told_as_that(tmp_path, capsys):
    for parent in (tmp_path, *tmp_path.parents):  # pytest keeps its folders to its user
        if parent.name.startswith(("pytest-", "popen-", tmp_path.name)):
            parent.chmod(0o755)
    closed = tmp_path / "AGDataAttr"
    closed.mkdir(mode=0o700)
    told = told_to_a_stranger(lambda: run_folders(str(tmp_path), "AGDataAttr"))
    assert told == f"UserError: {closed}: Permission denied (--output_dir)"
    told = told_to_a_stranger(lambda: check_writable(tmp_path))
    assert told == f"UserError: {tmp_path}: Permission denied; results are written into it"
    (closed / "run").mkdir(mode=0o700)  # of a colleague, in a folder of all
    closed.chmod(0o755)
    assert "run" in told_to_a_stranger(lambda: run_folders(str(tmp_path), "AGDataAttr"))
    ask = ["--resume", "--name", "x", "--output_dir", str(tmp_path)]
    assert "has no run 'x'" in told_to_a_stranger(lambda: parse_options(ask))
    (closed / "20260101_000000_x").mkdir(mode=0o700)
    told = told_to_a_stranger(lambda: parse_options(ask))
    assert told == f"UserError: {closed}/20260101_000000_x: Permission denied (--resume)"


def test_a_system_error_is_a_line_with_the_file(capsys):
    def refused():
        raise PermissionError(13, "Permission denied", "/data/x")

    assert ended(refused, capsys) == (2, "error: /data/x: Permission denied\n")


def test_too_few_open_files_are_told_before_loaders_wait_for_ever(monkeypatch, capsys):
    limits = [40, 40]
    monkeypatch.setattr(resource, "getrlimit", lambda kind: tuple(limits))
    monkeypatch.setattr(
        resource, "setrlimit", lambda kind, new: limits.__setitem__(slice(None), new)
    )
    allow_open_files(0)
    with pytest.raises(UserError, match=r"40 open files at once \(ulimit -n\).*--num_workers 0"):
        allow_open_files(2)

    def loader():
        raise RuntimeError("unable to open shared memory object: Too many open files (24)")

    status, told = ended(loader, capsys)
    assert status == 2 and told.count("\n") == 1 and "40 at once are allowed here" in told
    limits[1] = 100_000  # the shell's own may be raised
    allow_open_files(2)
    assert limits == [4096, 100_000]


def test_memory_that_runs_out_before_training_is_told_in_a_line(capsys):
    def build():
        torch.empty(2**46)

    status, told = ended(build, capsys)
    assert status == 2 and told.count("\n") == 1 and "can't allocate memory" in told
