"""What a machine can check in the documents: links, anchors, options, paths, length."""

import re
from functools import cache
from pathlib import Path

import pytest

from tests.helpers import ROOT
from utils.options import OPTIONS

PAGES = [ROOT / n for n in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
# extending.md names options and files that its reader adds; test_extending.py runs its examples.
CHECKED_PAGES = [page for page in PAGES if page.name != "extending.md"]
# Options of torchrun.
TORCHRUN = {"standalone", "nnodes", "nproc_per_node", "rdzv_id", "rdzv_backend", "rdzv_endpoint",
           "signals_to_handle"}  # fmt: skip
FENCED = re.compile(r"^```\w*\n(.*?)^```", re.DOTALL | re.MULTILINE)
FLAG = re.compile(r"(?<![\w-])--(?:no-)?([A-Za-z]\w+)(?![\w-])")
FOLDERS = sorted(p.name for p in ROOT.iterdir() if p.is_dir() and p.name not in ("data", "logs"))
PATH = re.compile(
    rf"(?<![\w./<-])((?:{'|'.join(map(re.escape, FOLDERS))})/[\w./-]+\w|(?<=python )\w+\.py)\b"
)

by_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
by_checked_page = pytest.mark.parametrize("page", CHECKED_PAGES, ids=lambda page: page.name)


@cache
def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", FENCED.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", h.lower()).replace(" ", "-") for h in headings}


@cache
def known_flags() -> set[str]:
    """Options of train.py, and those that other programs define in their own code."""
    programs = [*ROOT.glob("*.py"), *ROOT.glob("tools/*.py"), *ROOT.glob("gallery/*.py"), ROOT / "utils/command_line.py",
                ROOT / "datasets/mini/__main__.py", ROOT / "tests/conftest.py"]  # fmt: skip
    definition = re.compile(r"\(\s*\"--(\w+)\"")
    return {*OPTIONS, *TORCHRUN, "help"}.union(
        *(definition.findall(p.read_text()) for p in programs)
    )


def test_the_readme_has_fewer_than_200_lines():
    assert len((ROOT / "README.md").read_text().splitlines()) < 200


@by_page
def test_every_relative_link_leads_to_a_file_and_an_anchor_that_exist(page):
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCED.sub("", page.read_text())):
        if not target.startswith("https://"):
            path, _, anchor = target.partition("#")
            file = (page.parent / path).resolve() if path else page
            assert file.exists(), target
            assert not anchor or anchor in anchors(file), target


@by_checked_page
def test_every_option_in_a_document_exists(page):
    # The table of attempts quotes messages about options that do not exist.
    lines = [line for line in page.read_text().splitlines() if not re.match(r"\| \d \|", line)]
    assert {*FLAG.findall("\n".join(lines))} <= known_flags() | {
        "test"
    }  # an option of the original code


@by_checked_page
def test_a_training_command_in_a_document_has_only_options_of_train_py(page):
    for line in "\n".join(FENCED.findall(page.read_text())).splitlines():
        if command := re.search(r"(?:\btrain\.py|\btrain\.slurm) (.*)", line.split("  #")[0]):
            assert {*FLAG.findall(command[1])} <= {*OPTIONS, "config_file"}, line


@by_checked_page
def test_every_file_of_the_repository_in_a_code_block_exists(page):
    for block in FENCED.findall(page.read_text()):
        for path in PATH.findall(block):
            assert (ROOT / path).exists(), path
        for module in re.findall(r"python -m ((?:datasets|utils|tools)[\w.]*)", block):
            file = ROOT / module.replace(".", "/")
            assert file.with_suffix(".py").exists() or (file / "__main__.py").exists(), module


@pytest.mark.parametrize("page", ["README.md", "docs/training.md", "docs/resuming.md"])
def test_a_document_that_the_checks_read_has_commands(page):
    """Otherwise a change of layout could make the checks skip everything."""
    text = "\n".join(FENCED.findall((ROOT / page).read_text()))
    assert "python train.py" in text and FLAG.search(text)
