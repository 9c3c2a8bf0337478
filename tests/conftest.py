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

# Where a shell starts the tests in the background, they are told to ignore these.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=20, help="SIGKILLs that a training must survive")
    parser.addoption("--fuzz", type=int, default=100, help="examples of each kind of file")
    parser.addoption("--attempts", action="store_true", help="print what strangers handed over")


def pytest_terminal_summary(terminalreporter):
    if terminalreporter.config.getoption("attempts"):
        terminalreporter.write_line("| | what was made | before | now |\n|---|---|---|---|")
        for row in sorted(ATTEMPTS):
            terminalreporter.write_line(f"| {' | '.join(row)} |")
        TALLY["attempts of strangers that are refused or do no harm"] = len(ATTEMPTS)
    for name, count in TALLY.items():
        terminalreporter.write_line(f"{count:6d} {name}")


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # one of several processes (pytest -n)
        session.config.workeroutput |= {"tally": dict(TALLY), "attempts": ATTEMPTS}


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    found = getattr(node, "workeroutput", {})
    TALLY.update(found.get("tally", {}))
    ATTEMPTS.extend(found.get("attempts", []))


@pytest.fixture(scope="session")
def tally():
    """Counts that the summary shows."""
    return TALLY


@pytest.fixture
def attempt(request, tmp_path):
    """For a test of what a stranger may hand over: note in the table of attempts, when it holds.

    attempt("2", "train_log.txt links elsewhere", "written through the link", str(error.value))
    """
    rows: list[list[str]] = []

    def note(kind: str, made: str, before: str, now: object) -> None:
        now = " ".join(str(now).replace(str(tmp_path), "...").split())
        now = now if len(now) <= 300 else f"{now[:300]} ..."
        rows.append([kind, *map(in_markdown, (made, before, now))])

    yield note
    ATTEMPTS.extend(rows)


@pytest.fixture(scope="session", autouse=True)
def two_threads():
    """Of all test processes together: threads that wait for each other's cores take many times as
    long. Processes that tests start do the same."""
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
    """Rendered once; tests that change files take `mini_copy`."""
    from datasets.mini import render

    root = tmp_path_factory.mktemp("data") / "mini"
    render(root, seed=3, train_ids=8, val_ids=4, test_ids=6, pairs=2, workers=1)
    return root


@pytest.fixture(scope="session")
def like_real(tmp_path_factory):
    """Rendered with the real data's names and the faults of its splits."""
    from datasets.mini import render

    root = tmp_path_factory.mktemp("data") / "real"
    render(root, seed=3, train_ids=8, val_ids=4, test_ids=4, pairs=2, val="like_real", workers=1)
    return root


@pytest.fixture
def mini_copy(mini_root, tmp_path):
    return shutil.copytree(mini_root, tmp_path / "mini")


@pytest.fixture(scope="session")
def rendered(tmp_path_factory):
    """Rendered in another layout, once each: rendered("CUHK-PEDES")."""
    from functools import cache

    from datasets.mini import render

    folder = tmp_path_factory.mktemp("layouts")

    @cache
    def make(layout):
        sizes = {"train_ids": 8, "val_ids": 4, "test_ids": 6, "pairs": 2}
        render(folder / layout, seed=3, layout=layout, workers=1, **sizes)
        return folder / layout

    return make
