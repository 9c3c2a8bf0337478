"""Fixtures: the golden CLIP as a file, and a small rendered mini-TBAGPR."""

import utils  # noqa: F401  before torch is loaded

# isort: split

import collections
import os
import shutil
import signal

import pytest
import torch

from tests.helpers import golden_clip
from utils.tables import in_markdown

TALLY = collections.Counter()
ATTEMPTS: list[list[str]] = []  # rows of the table of docs/reliability.md

# A shell that starts the tests in the background makes them ignore these signals.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=20, help="SIGKILLs that a training must survive")
    parser.addoption("--fuzz", type=int, default=100, help="examples of each kind of file")
    parser.addoption("--attempts", action="store_true", help="print the table of attempts")


def pytest_terminal_summary(terminalreporter):
    if terminalreporter.config.getoption("attempts"):
        terminalreporter.write_line("| | what was tried | before | now |\n|---|---|---|---|")
        for row in sorted(ATTEMPTS):
            terminalreporter.write_line(f"| {' | '.join(row)} |")
        TALLY["attempts with untrusted files that are refused or do no harm"] = len(ATTEMPTS)
    for name, count in TALLY.items():
        terminalreporter.write_line(f"{count:6d} {name}")


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # one of several processes (pytest -n)
        session.config.workeroutput |= {"tally": dict(TALLY), "attempts": ATTEMPTS}


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    output = getattr(node, "workeroutput", {})
    TALLY.update(output.get("tally", {}))
    ATTEMPTS.extend(output.get("attempts", []))


@pytest.fixture(scope="session")
def tally():
    """Counts that the summary shows."""
    return TALLY


@pytest.fixture
def attempt(request, tmp_path):
    """Add a row to the table of attempts if the test passes.

    attempt("2", "train_log.txt is a link", "written through the link", error.value)
    """
    rows: list[list[str]] = []

    def add(kind: str, tried: str, before: str, now: object) -> None:
        now = " ".join(str(now).replace(str(tmp_path), "...").split())
        now = now if len(now) <= 300 else f"{now[:300]} ..."
        rows.append([kind, *map(in_markdown, (tried, before, now))])

    yield add
    ATTEMPTS.extend(rows)


@pytest.fixture(scope="session", autouse=True)
def two_threads():
    """Use two threads in all test processes together, and in the processes that tests start: threads
    that wait for each other's cores take many times longer."""
    threads = max(1, 2 // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1)))
    torch.set_num_threads(threads)
    os.environ["OMP_NUM_THREADS"] = str(threads)


@pytest.fixture(scope="session")
def clip_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "clip.pt"
    torch.save(golden_clip(), path)
    return path


@pytest.fixture(scope="session")
def mini_root(tmp_path_factory):
    """mini-TBAGPR, rendered once. Tests that change files use `mini_copy`."""
    from datasets.mini import render

    root = tmp_path_factory.mktemp("data") / "mini"
    render(root, seed=3, train_ids=8, val_ids=4, test_ids=6, pairs=2, workers=1)
    return root


@pytest.fixture(scope="session")
def like_real(tmp_path_factory):
    """mini-TBAGPR with the names of the real data and the overlaps of its splits."""
    from datasets.mini import render

    root = tmp_path_factory.mktemp("data") / "real"
    render(root, seed=3, train_ids=8, val_ids=4, test_ids=4, pairs=2, val="like_real", workers=1)
    return root


@pytest.fixture
def mini_copy(mini_root, tmp_path):
    return shutil.copytree(mini_root, tmp_path / "mini")


@pytest.fixture(scope="session")
def rendered(tmp_path_factory):
    """mini-TBAGPR in another layout, rendered once for each: rendered("CUHK-PEDES")."""
    from functools import cache

    from datasets.mini import render

    folder = tmp_path_factory.mktemp("layouts")

    @cache
    def make(layout):
        sizes = {"train_ids": 8, "val_ids": 4, "test_ids": 6, "pairs": 2}
        render(folder / layout, seed=3, layout=layout, workers=1, **sizes)
        return folder / layout

    return make
