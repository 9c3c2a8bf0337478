"""Machines as in containers and on clusters: another home, user, console or limit."""

import ast
import importlib
import io
import os
import resource
import signal
import subprocess
import sys

import pytest
import torch

from tests.helpers import ROOT
from utils import distributed
from utils.command_line import parse_options
from utils.config import write_config
from utils.errors import UserError, run_main
from utils.files import check_writable
from utils.machine import allow_open_files
from utils.run_log import setup_logger
from utils.runs import run_folders

ENTRY_POINTS = [ROOT / "train.py", ROOT / "test.py", *(ROOT / "tools").glob("[!_]*.py")]
OTHER_USER = 54321  # a user id without an account
as_root = pytest.mark.skipif(os.getuid() != 0, reason="only root can become another user")


def python(code, **environment):
    """Run code in a new process: its exit status and stderr."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("OMP_WAIT_POLICY", *environment)}
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
        env={**inherited, **{k: v for k, v in environment.items() if v is not None}},
    )  # fmt: skip
    return process.returncode, process.stderr


def call_as_other_user(call):
    """The result of a call, or its error, as text when another user makes the call."""
    reader, writer = os.pipe()
    child = os.fork()
    if not child:
        os.setgroups([])
        os.setuid(OTHER_USER)
        try:
            outcome = repr(call())
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"
        os.write(writer, outcome.encode())
        os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with open(reader, encoding="utf-8") as file:
        return file.read()


def run_entry_point(main, capsys):
    """Run an entry point: its exit status and stderr."""
    with pytest.raises(SystemExit) as stopped:
        run_main(main)
    return stopped.value.code, capsys.readouterr().err


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
def test_every_command_expands_a_home_in_its_paths(command, tmp_path, monkeypatch):
    module, *argv = command.split()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", [module, *argv])
    with pytest.raises(UserError) as error:
        importlib.import_module(module).main()
    assert f"{tmp_path}/x" in str(error.value) and "~" not in str(error.value)


@pytest.mark.parametrize("path", ENTRY_POINTS, ids=lambda path: path.name)
def test_every_entry_point_imports_utils_before_it_loads_torch(path):
    imports = [
        n for n in ast.parse(path.read_text()).body if isinstance(n, ast.Import | ast.ImportFrom)
    ]
    names = [getattr(node, "module", None) or node.names[0].name for node in imports]
    before = {name.split(".")[0] for name in names[: names.index("utils")]}
    assert before <= sys.stdlib_module_names


@pytest.mark.skipif(sys.platform != "linux", reason="GNU's OpenMP says so")
@pytest.mark.parametrize(
    ("environment", "spins"),
    [({}, 0), ({"OMP_WAIT_POLICY": "ACTIVE"}, 30_000_000_000), ({"GOMP_SPINCOUNT": "7"}, 7)],
)
def test_threads_wait_passively_unless_the_user_says_otherwise(environment, spins):
    status, stderr = python("import utils, torch", OMP_DISPLAY_ENV="VERBOSE", **environment)
    assert status == 0 and f"GOMP_SPINCOUNT = '{spins}'" in stderr


@pytest.mark.parametrize("module", ["fcntl", "resource", "pwd"])
def test_a_system_without_a_needed_module_gets_a_one_line_error(module):
    code = f"import sys; sys.modules['{module}'] = None; import utils.files"
    status, stderr = python(code)
    assert status == 2 and stderr == (
        f"error: {sys.platform} lacks {module}; this runs on Linux and macOS (on Windows, in WSL)\n"
    )


@pytest.mark.parametrize(
    ("raised", "stderr"),
    [("KeyboardInterrupt", "interrupted\n"), ("ValueError('x')", "ValueError: x\n")],
)
def test_ctrl_c_while_libraries_are_imported_is_one_line(tmp_path, raised, stderr):
    (tmp_path / "library.py").write_text(f"raise {raised}")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import utils, library"
    status, printed = python(code)
    if raised == "KeyboardInterrupt":
        assert (status, printed) == (-signal.SIGINT, stderr)
    else:  # a bug keeps its traceback
        assert status == 1 and printed.startswith("Traceback") and printed.endswith(stderr)


@as_root
def test_a_user_without_an_account_has_a_name():
    """torch asks for the name on import. Without one, train.py failed on --help."""
    unknown = f"""
import __future__, fcntl, getpass, os, pwd, resource  # from folders that only root may read
os.setuid({OTHER_USER})
import utils
assert getpass.getuser() == "uid{OTHER_USER}"
"""
    assert python(unknown, LOGNAME=None, USER=None, LNAME=None, USERNAME=None, HOME=None) == (0, "")


@pytest.mark.parametrize("size", ["", " ", "1"])
def test_a_single_process_needs_no_torchrun(size, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.setenv("RANK", "x")
    assert distributed.start("cpu")[0] == distributed.SINGLE_PROCESS


@pytest.mark.parametrize("size", ["4", "four"])
def test_a_world_size_that_torchrun_did_not_set_is_refused(size, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", size)
    for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(
        UserError, match=f"WORLD_SIZE={size} .* LOCAL_RANK= .*with torchrun, or unset"
    ):
        distributed.start("cpu")


def test_a_console_shows_characters_that_it_lacks_as_escapes(monkeypatch):
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    run_main(lambda: print("gr\xf6\xdfe ± \udce9"))
    sys.stdout.flush()
    assert shown.getvalue() == rb"gr\xf6\xdfe \xb1 \udce9" + b"\n"


def test_names_that_are_not_unicode_are_in_the_log_and_the_config(tmp_path, capsys):
    log = setup_logger(tmp_path / "log.txt")
    run_main(lambda: log.info("caf\udce9.jpg"))
    setup_logger()  # closes the file
    assert r"caf\udce9.jpg" in (tmp_path / "log.txt").read_text(encoding="utf-8")
    args = parse_options(["--root_dir", "caf\udce9"])
    write_config(tmp_path / "configs.yaml", args)
    assert parse_options(["--config_file", str(tmp_path / "configs.yaml")]) == args


def test_a_file_name_that_the_system_cannot_encode_gets_a_one_line_error(monkeypatch, capsys):
    monkeypatch.setattr(sys, "getfilesystemencoding", lambda: "ascii")
    status, stderr = run_entry_point(lambda: "gr\xf6\xdfe".encode("ascii"), capsys)
    assert status == 2 and stderr.count("\n") == 1
    assert r"'gr\xf6\xdfe': names of files are in ascii here" in stderr and "PYTHONUTF8=1" in stderr


@as_root
def test_a_missing_permission_is_reported_as_such(tmp_path, capsys):
    for parent in (tmp_path, *tmp_path.parents):  # pytest closes its folders to other users
        if parent.name.startswith(("pytest-", "popen-", tmp_path.name)):
            parent.chmod(0o755)
    closed = tmp_path / "AGDataAttr"
    closed.mkdir(mode=0o700)
    outcome = call_as_other_user(lambda: run_folders(str(tmp_path), "AGDataAttr"))
    assert outcome == f"UserError: {closed}: Permission denied (--output_dir)"
    outcome = call_as_other_user(lambda: check_writable(tmp_path))
    assert outcome == f"UserError: {tmp_path}: Permission denied; results are written into it"
    (closed / "run").mkdir(mode=0o700)  # a colleague's, in a shared folder
    closed.chmod(0o755)
    assert "run" in call_as_other_user(lambda: run_folders(str(tmp_path), "AGDataAttr"))
    argv = ["--resume", "--name", "x", "--output_dir", str(tmp_path)]
    assert "has no run 'x'" in call_as_other_user(lambda: parse_options(argv))
    (closed / "20260101_000000_x").mkdir(mode=0o700)
    outcome = call_as_other_user(lambda: parse_options(argv))
    assert outcome == f"UserError: {closed}/20260101_000000_x: Permission denied (--resume)"


def test_a_system_error_gets_a_one_line_error_with_the_file(capsys):
    def refused():
        raise PermissionError(13, "Permission denied", "/data/x")

    assert run_entry_point(refused, capsys) == (2, "error: /data/x: Permission denied\n")


def test_too_few_open_files_are_reported_before_loaders_wait_for_ever(monkeypatch, capsys):
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

    status, stderr = run_entry_point(loader, capsys)
    assert status == 2 and stderr.count("\n") == 1 and "40 at once are allowed here" in stderr
    limits[1] = 100_000  # the soft limit may be raised
    allow_open_files(2)
    assert limits == [4096, 100_000]


def test_memory_that_runs_out_before_training_gets_a_one_line_error(capsys):
    def build():
        torch.empty(2**46)

    status, stderr = run_entry_point(build, capsys)
    assert status == 2 and stderr.count("\n") == 1 and "can't allocate memory" in stderr
